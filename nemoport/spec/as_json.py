"""Specs and plans as JSON data, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any

from nemoport.spec.feed_forward import Dense, Groups, Mixture, Router
from nemoport.spec.heads import Classifier, Embedding, LanguageModel
from nemoport.spec.mixers import Attention, LatentAttention, Mamba
from nemoport.spec.model import Block, ModelSpec
from nemoport.spec.norm import Norm
from nemoport.spec.plan import Plan, Recipe
from nemoport.spec.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling


def to_json(value: Any) -> Any:
    """A spec or plan as JSON data. Unions carry their class in `kind`; runs of equal blocks are written once."""
    if isinstance(value, ModelSpec):
        data = {field.name: to_json(getattr(value, field.name)) for field in fields(value) if field.name != "blocks"}
        return data | {"blocks": [{"repeat": len(list(run)), **to_json(block)} for block, run in groupby(value.blocks)]}
    if is_dataclass(value):
        data = {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **data} if type(value).__name__ in _KINDS else data
    return value


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    recipe = data.get("recipe")
    exclude = tuple(recipe["exclude"]) if recipe else ()
    return Plan(**{**data, "recipe": Recipe(**{**recipe, "exclude": exclude}) if recipe else None})


def spec_from_json(data: Mapping[str, Any]) -> ModelSpec:
    blocks = tuple(
        block
        for row in data["blocks"]
        for block in [Block(**{key: _from_json(value) for key, value in row.items() if key != "repeat"})]
        * row["repeat"]
    )
    norm, head = Norm(**data["norm"]), _from_json(data["head"])
    return ModelSpec(**{**data, "norm": norm, "head": head, "blocks": blocks})


_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Attention, LatentAttention, Mamba, Dense, Mixture, Router, Groups),
        *(LanguageModel, Embedding, Classifier),
        *(LinearScaling, Llama3Scaling, YarnScaling),
    )
}


def _from_json(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    data = {key: _from_json(value) for key, value in data.items()}
    if kind := data.pop("kind", None):
        return _KINDS[kind](**data)
    return Rope(**data)
