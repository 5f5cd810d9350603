"""Rows and readings that the keys of several programs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemoport.errors import UnsupportedInput
from nemoport.exporters.configs import (
    Config,
    Key,
    Keys,
    Mark,
    Row,
    Together,
    flag,
    number,
    whole_number,
)
from nemoport.spec import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

Scaling = RopeScaling
Marks = tuple[Mark, ...]


def biased(key: str, *words: str, default: Any = False) -> tuple[Key, ...]:
    """One key for the biases of several linears."""
    return tuple(Key(word, key, default, flag) for word in words)


def scaled_by_root(key: str) -> Keys:
    """Embeddings are multiplied with the root of the hidden size, which no config says."""
    return Keys("embedding_scale", lambda config: whole_number(config[key]) ** 0.5, lambda scale: {})


def without(shared: Sequence[Row], rows: Sequence[Row]) -> tuple[Row, ...]:
    """The shared rows of words that a family does not say in a way of its own."""
    said = {word for row in rows for word in (row.words if isinstance(row, Together) else (row.word,))}
    return tuple(row for row in shared if isinstance(row, Together) or row.word not in said)


def scaling_of(rope: Config) -> Scaling:
    match kind := rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=number(rope["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=number(rope["factor"]),
                low_freq_factor=number(rope["low_freq_factor"]),
                high_freq_factor=number(rope["high_freq_factor"]),
                original_max_positions=whole_number(rope["original_max_position_embeddings"]),
            )
        case "yarn":
            return yarn(rope)
    raise UnsupportedInput(f"the config scales rope by {kind!r}; nemoport knows default, linear, llama3 and yarn")


def yarn(rope: Config) -> YarnScaling:
    """In transformers' words. Where it does not find both mscales, it takes the plain attention factor
    (`_compute_yarn_parameters`), while latent attention scales its scores by `mscale_all_dim` alone."""
    mscale, all_dim = (float(rope.get(key) or 0.0) for key in ("mscale", "mscale_all_dim"))
    attention_factor = rope.get("attention_factor")
    made = YarnScaling(
        factor=number(rope["factor"]),
        original_max_positions=whole_number(rope["original_max_position_embeddings"]),
        beta_fast=number(rope.get("beta_fast") or 32.0),
        beta_slow=number(rope.get("beta_slow") or 1.0),
        mscale=mscale if mscale and all_dim else 1.0,
        mscale_all_dim=all_dim,
        attention_factor=None if attention_factor is None else number(attention_factor),
        truncate=flag(rope.get("truncate", True)),
    )
    if all_dim and not mscale and attention_factor is None:
        return replace(made, attention_factor=made.temperature(1.0))
    return made


def to_scaling(scaling: Scaling) -> dict[str, Any] | None:
    match scaling:
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case YarnScaling():
            return _to_yarn(scaling)
    return None


def _to_yarn(scaling: YarnScaling) -> dict[str, Any]:
    """Its kind under both keys: DeepSeek's own code reads the older one."""
    said = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    said |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    said |= {} if scaling.truncate else {"truncate": False}
    if scaling.mscale_all_dim:
        said |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return said


def softcap(word: str, key: str, absent: float | None = None) -> Keys:
    """A bound whose null is no bound, whatever its absence means."""

    def of(config: Config) -> float | None:
        return None if (value := config.get(key, absent)) is None else number(value)

    return Keys(word, of, lambda bound: {key: bound})
