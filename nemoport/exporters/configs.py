"""Configs as rows: our word, their key, so that one table reads a config and writes it.

A decoder whose blocks are all alike is a flat set of words (`heads`, `kv_heads`, `rope_base`...); `spec_of` builds the
ModelSpec from them and `words_of` is its inverse. A `Dialect` is one program's way of saying them: what marks the
config as this dialect's, the words that follow from that alone, and rows for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope

Config = Mapping[str, Any]
Words = dict[str, Any]
REQUIRED = object()


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One key for one word."""

    word: str
    key: str
    default: Any = REQUIRED
    """What an absent or null key means: a value, or a function of the words read so far."""
    into: Callable[[Any], Any] = _same
    """The value as our word has it, ValueError if it cannot be."""

    def read(self, config: Config, words: Words) -> Any:
        if (value := config.get(self.key)) is None:
            if self.default is REQUIRED:
                raise DamagedInput(f"the config does not say {self.key}; add it with --config FILE")
            return self.default(words) if callable(self.default) else self.default
        try:
            return self.into(value)
        except (TypeError, ValueError) as error:
            raise DamagedInput(f"the config says {self.key}: {value!r}, which is no {self.word}") from error

    def write(self, value: Any) -> dict[str, Any]:
        return {self.key: value}


@dataclass(frozen=True)
class Keys:
    """Several keys for one word."""

    word: str
    of: Callable[[Config], Any]
    write: Callable[[Any], dict[str, Any]]

    def read(self, config: Config, words: Words) -> Any:
        return self.of(config)


@dataclass(frozen=True)
class Mark:
    """A key by which a config is known as this dialect's. An absent or null key counts as `absent`."""

    key: str
    value: Any
    absent: Any = None

    def found(self, config: Config) -> Any:
        value = config.get(self.key)
        return self.absent if value is None else value


@dataclass(frozen=True, kw_only=True)
class Dialect:
    marks: tuple[Mark, ...]
    fixed: Mapping[str, Any]
    """Words that every config of this dialect means without saying them."""
    rows: Sequence[Key | Keys]
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written and never read."""

    def mismatches(self, config: Config) -> list[str]:
        return [
            f"{mark.key} is {found!r}, not {mark.value!r}"
            for mark in self.marks
            if (found := mark.found(config)) != mark.value
        ]

    def read(self, config: Config) -> Words:
        words: Words = dict(self.fixed)
        for row in self.rows:
            words[row.word] = row.read(config, words)
        return words

    def write(self, words: Words) -> dict[str, Any]:
        config: dict[str, Any] = {mark.key: mark.value for mark in self.marks} | dict(self.constants)
        for row in self.rows:
            config |= row.write(words[row.word])
        return config


def read(family: str, dialects: Sequence[Dialect], config: Config) -> ModelSpec:
    """The model that a config describes; one of the dialects must be its own."""
    (dialect, *_) = (dialect for dialect in dialects if not dialect.mismatches(config))
    return spec_of(family, dialect.read(config))


def write(dialects: Sequence[Dialect], spec: ModelSpec, otherwise: str) -> dict[str, Any]:
    """The config in the first dialect that says exactly this model: what is written must read back equal. `otherwise`
    ends the error when none does."""
    words = words_of(spec)
    for dialect in dialects:
        config = dialect.write(words)
        if dialect.read(config) == words:
            return config
    raise UnsupportedInput(f"no config of this format says this {spec.family} model ({_flags(spec)}); {otherwise}")


def whole_number(value: Any) -> int:
    """A positive integer; configs are also written by hand."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(value)
    return int(value)


def spec_of(family: str, words: Mapping[str, Any]) -> ModelSpec:
    """A decoder whose blocks are all alike."""
    dims = int(words["head_dim"] * words["rope_fraction"])
    if words["heads"] % words["kv_heads"]:
        raise DamagedInput(f"{words['heads']} heads do not divide over {words['kv_heads']} KV heads; check the config")
    if dims % 2 or not 0 < dims <= words["head_dim"]:
        raise DamagedInput(f"rotary embedding on {dims} of {words['head_dim']} dimensions; an even part is needed")
    attention = Attention(
        heads=words["heads"],
        kv_heads=words["kv_heads"],
        head_dim=words["head_dim"],
        rope=Rope(dims=dims, base=words["rope_base"], scaling=words["rope_scaling"]),
        window=words["window"],
        qkv_bias=words["qkv_bias"],
        out_bias=words["out_bias"],
        qk_norm=words["qk_norm"],
    )
    dense = Dense(
        intermediate=words["intermediate"],
        activation=words["activation"],
        gated=words["gated"],
        bias=words["ffn_bias"],
    )
    return ModelSpec(
        family=family,
        vocab_size=words["vocab_size"],
        hidden_size=words["hidden_size"],
        max_positions=words["max_positions"],
        norm=Norm(kind=words["norm"], eps=words["eps"]),
        head=LanguageModel(tied=words["tied"]),
        blocks=(Block(mixer=attention, ffn=dense),) * words["layers"],
    )


def words_of(spec: ModelSpec) -> Words:
    """The inverse of `spec_of`."""
    if len(set(spec.blocks)) != 1:
        raise UnsupportedInput(f"the {spec.family} model has blocks of different kinds, which this config cannot say")
    mixer, ffn = spec.blocks[0].mixer, spec.blocks[0].ffn
    assert mixer.rope is not None, "decoders of these families rotate"
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "max_positions": spec.max_positions,
        "layers": len(spec.blocks),
        "norm": spec.norm.kind,
        "eps": spec.norm.eps,
        "tied": spec.head.tied,
        "heads": mixer.heads,
        "kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_fraction": mixer.rope.dims / mixer.head_dim,
        "rope_base": mixer.rope.base,
        "rope_scaling": mixer.rope.scaling,
        "window": mixer.window,
        "qkv_bias": mixer.qkv_bias,
        "out_bias": mixer.out_bias,
        "qk_norm": mixer.qk_norm,
        "intermediate": ffn.intermediate,
        "activation": ffn.activation,
        "gated": ffn.gated,
        "ffn_bias": ffn.bias,
    }


def _flags(spec: ModelSpec) -> str:
    mixer = spec.blocks[0].mixer
    flags = {"qkv_bias": mixer.qkv_bias, "out_bias": mixer.out_bias, "qk_norm": mixer.qk_norm, "window": mixer.window}
    return ", ".join(f"{name} {value}" for name, value in flags.items() if value) or "plain"
