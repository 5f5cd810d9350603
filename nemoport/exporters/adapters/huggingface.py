"""Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Names and words are those of peft (utils/save_and_load.py, tuners/lora/config.py):
`base_model.model.<linear>.lora_A.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.formats import safetensors
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.lora import OWN, Adapter, Bound, Factor, Pair, Scaling, beside, finite, paired, shared
from nemoport.exporters.rules import Column, bindings
from nemoport.exporters.tensor import Files
from nemoport.spec import tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIRECTORY = "adapter"
"""Where it is carried, beside the base."""
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_NEEDS_ITS_OWN_BASE = ("pissa", "olora", "corda", "loftq")
_REFUSED = {
    "use_dora": "DoRA, which scales as well as adds",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "an activated LoRA, which is no change of the weights",
}


def recognises(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    if not (path / WEIGHTS).is_file():
        raise UnsupportedInput(f"{path} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    scaling = _scaling(path / CONFIG)
    stored = safetensors.read(Files(), path / WEIGHTS)
    found = {name: _FACTOR.fullmatch(name.removeprefix(_PREFIX)) for name in stored}
    factors = [Factor(name, match["linear"], "", match["side"].lower()) for name, match in found.items() if match]
    own = {factor.name: stored[factor.name] for factor in factors}
    return Adapter(
        path=path,
        format="huggingface",
        writer="Hugging Face PEFT",
        naming="huggingface",
        scaling=scaling,
        tensors=own,
        pairs=paired(factors, own, scaling, CONFIG),
        others=tuple(name for name in stored if name not in own),
    )


def carried(model: Model, output: Output, bound: Bound, column: Column) -> tuple[Model, Output]:
    """The output with the adapter in a directory beside the base, and the model that accounts for it."""
    slots, pairs, sources = [], dict[str, Pair](), dict(model.sources)
    for binding in bindings(column.rules, tensors(model.spec)):
        adapted = [bound.pairs.get(part.name) for part in binding.parts]
        if len(adapted) > 1 and any(adapted):
            raise UnsupportedInput(f"{binding.stored} is fused in Hugging Face names; use --adapter-mode merge")
        if (pair := adapted[0]) is None:
            continue
        linear, (canonical,) = binding.stored.removesuffix(".weight"), binding.parts
        pairs[linear] = pair
        for factor, tensor, source in (("lora_A", pair.a, pair.names[0]), ("lora_B", pair.b, pair.names[1])):
            part = canonical.name.replace(".weight", f".{factor}")
            sources[part] = (OWN + source,)
            slots.append(Slot(f"{_PREFIX}{linear}.{factor}.weight", tensor, (part,), "carry adapter"))
    file = safetensors.file(f"{DIRECTORY}/{WEIGHTS}", sorted(slots, key=lambda slot: slot.name), {"format": "pt"})
    config = json_bytes(_written(pairs, len(model.spec.blocks)))
    return (
        replace(beside(model, bound, "carry"), sources=sources),
        replace(
            output,
            files=(*output.files, file),
            sidecars={**output.sidecars, f"{DIRECTORY}/{CONFIG}": config},
        ),
    )


def _scaling(path: Path) -> Scaling:
    config = mapping(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedInput(f"{path} describes an adapter of type {kind}; nemoport merges LORA")
    if refused := next((words for key, words in _REFUSED.items() if config.get(key)), None):
        raise UnsupportedInput(f"{path} describes {refused}; merge it with peft")
    if str(start := config.get("init_lora_weights")).lower().startswith(_NEEDS_ITS_OWN_BASE):
        raise UnsupportedInput(f"{path} was begun with {start}, which changes the base; convert it to a LoRA with peft")
    try:
        return Scaling(
            rank=_whole(config["r"]),
            alpha=finite(config["lora_alpha"]),
            root=bool(config.get("use_rslora")),
            ranks={_end(name): _whole(rank) for name, rank in (config.get("rank_pattern") or {}).items()},
            alphas={_end(name): finite(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedInput(f"{path} does not say r and lora_alpha as peft does ({error!r})") from error


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return value


def _end(pattern: str) -> str:
    """A name that peft takes as a regular expression; plain ones only, since any other could run forever."""
    if not re.fullmatch(r"[\w.]+", pattern):
        raise UnsupportedInput(f"{CONFIG} selects linears by the expression {pattern!r}; write their names")
    return pattern


def _written(pairs: Mapping[str, Pair], layers: int) -> dict[str, Any]:
    """The adapter's config, in peft's words."""
    rank = shared([pair.rank for pair in pairs.values()])
    alpha = shared([pair.alpha for pair in pairs.values()])
    last = [linear.rpartition(".")[2] for linear in pairs]
    everywhere = all(last.count(word) == layers for word in last)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha if alpha % 1 else int(alpha),
        "lora_dropout": 0.0,
        "use_rslora": any(pair.root for pair in pairs.values()),
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted(set(last if everywhere else pairs)),
        "rank_pattern": {linear: pair.rank for linear, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {linear: pair.alpha for linear, pair in pairs.items() if pair.alpha != alpha},
    }


def check_plan(to: str, dtype: str | None) -> None:
    """Refuse what cannot carry an adapter."""
    if to != "hf":
        raise UsageError(f"--to {to} has no place for an adapter beside the base; use --adapter-mode merge, or --to hf")
    if dtype is not None:
        raise UsageError(f"--dtype {dtype} would change the base under its adapter; leave it out, or merge")
