"""Rows and readings that the keys of several programs share."""

from __future__ import annotations

from collections.abc import Sequence
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
            return yarn_of(rope)
    raise UnsupportedInput(f"the config scales rope by {kind!r}; nemoport knows default, linear, llama3 and yarn")


def yarn_of(rope: Config) -> YarnScaling:
    """transformers takes both of `mscale` and `mscale_all_dim` or none (modeling_rope_utils.py)."""
    mscales = {key: number(rope[key]) for key in ("mscale", "mscale_all_dim") if rope.get(key)}
    said = rope.get("attention_factor")
    return YarnScaling(
        factor=number(rope["factor"]),
        original_max_positions=whole_number(rope["original_max_position_embeddings"]),
        beta_fast=number(rope.get("beta_fast") or 32.0),
        beta_slow=number(rope.get("beta_slow") or 1.0),
        **(mscales if len(mscales) == 2 else {}),
        attention_factor=None if said is None else number(said),
        truncate=flag(rope.get("truncate", True)),
    )


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
            mscales = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
            factor = scaling.attention_factor
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                **(mscales if scaling.mscale_all_dim else {}),
                **({} if factor is None else {"attention_factor": factor}),
            }
    return None


def softcap(word: str, key: str, absent: float | None = None) -> Keys:
    """A bound whose null is no bound, whatever its absence means."""

    def of(config: Config) -> float | None:
        return None if (value := config.get(key, absent)) is None else number(value)

    return Keys(word, of, lambda bound: {key: bound})
