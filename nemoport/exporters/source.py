"""From a path to a Model: which reader, which family, and the proof that names, shapes and rules match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nemoport import plugins
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.exporters import configs, lora, masters
from nemoport.exporters.checkpoint import Checkpoint, Model
from nemoport.exporters.configs import Dialect
from nemoport.exporters.encoding import Gathered
from nemoport.exporters.formats import tokenizer
from nemoport.exporters.quantized import check_description, gathered, quantization
from nemoport.exporters.rules import Column, resolve
from nemoport.spec import ModelSpec, VocabPolicy, Weights, tensors

READERS, FAMILIES = "nemoport.exporters.readers", "nemoport.exporters.families"
ADAPTERS = "nemoport.exporters.adapters"


def reader(path: Path) -> tuple[str, ModuleType]:
    """The one reader whose layout this is: of those that recognise the path, the one that no other wraps."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    found = {name: module for name, module in plugins.load_all(READERS).items() if module.recognises(path)}
    wrapped = {name for module in found.values() for name in module.WRAPS}
    if not (chosen := {name: module for name, module in found.items() if name not in wrapped}):
        raise UnsupportedInput(
            f"{path} is no checkpoint that nemoport reads; it looked for "
            + ", ".join(f"{module.LOOKS_FOR} ({name})" for name, module in plugins.load_all(READERS).items())
        )
    assert len(chosen) == 1, f"{sorted(chosen)} all recognise {path}"
    return next(iter(chosen.items()))


def checkpoint(path: Path, config: Mapping[str, Any] | None = None, weights: Weights = "model") -> Checkpoint:
    """What is stored at a path, unread. `config` goes before what the files say."""
    _, module = reader(path)
    found: Checkpoint = module.read(path, config)
    return masters.in_place(found) if weights == "optimizer" else found


def model(
    path: Path,
    config: Mapping[str, Any] | None = None,
    vocab: VocabPolicy = "true",
    adapter: Path | None = None,
    weights: Weights = "model",
) -> Model:
    """The model at a path, with an adapter merged into it: every tensor explained and none read."""
    if adapter is None:
        return resolved(checkpoint(path, config, weights), vocab)
    return lora.merged(*with_adapter(path, adapter, config, vocab, weights))


def with_adapter(
    path: Path,
    adapter: Path,
    config: Mapping[str, Any] | None = None,
    vocab: VocabPolicy = "true",
    weights: Weights = "model",
) -> tuple[Model, lora.Bound]:
    """The base at a path and the adapter that fits it, apart. They may lie in one checkpoint."""
    found, together = adapter_at(adapter), path.resolve() == adapter.resolve()
    if found.others and not together:
        raise UnsupportedInput(
            f"{len(found.others)} tensors of {adapter} are of no LoRA, the first is {found.others[0]}; "
            "nemoport merges low-rank adapters of linears only"
        )
    stored = checkpoint(path, config, weights)
    base = resolved(lora.without(stored) if together else stored, vocab)
    if base.quantized:
        raise UnsupportedInput(
            f"{path} is quantized ({base.quantized.encoding.method}), and an adapter is not merged into rounded "
            "weights nor carried beside them yet; merge it into the checkpoint from before quantization"
        )
    names = column(base.spec.family, found.naming, "merge the adapter where it was trained")
    return base, lora.bind(found, names, tensors(base.spec))


def adapter_at(path: Path) -> lora.Adapter:
    """The adapter at a path, unread."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    chosen = _adapter_reader(path) or plugins.load(ADAPTERS, "megatron")
    found: lora.Adapter = chosen.read(path)
    return found


def adapter_alone(path: Path) -> lora.Adapter | None:
    """The adapter at a path where nothing but an adapter is; else None."""
    if _adapter_reader(path) is None or (found := adapter_at(path)).others:
        return None
    return found


def _adapter_reader(path: Path) -> ModuleType | None:
    return next((module for module in plugins.load_all(ADAPTERS).values() if module.recognises(path)), None)


def resolved(stored: Checkpoint, vocab: VocabPolicy = "true") -> Model:
    if adapted := [name for name in stored.tensors if lora.is_adapter(name)]:
        raise UnsupportedInput(
            f"{len(adapted)} tensors of {stored.path} are of an adapter, the first is {adapted[0]}; give the adapter "
            "with --adapter DIR beside the base, twice the same directory where it holds both"
        )
    given, quantized = Gathered(stored.tensors, {}), None
    if (said := quantization(stored)) is not None:
        given, quantized = gathered(stored, said)
    config = dict(stored.config)
    if not config:
        raise UsageError(
            f"{stored.path} is a {stored.format} checkpoint and carries no architecture; give it with --config FILE "
            "(JSON or YAML in Megatron-core's words: num_layers, hidden_size, num_attention_heads, ...)"
        )
    if config.get("vocab_size") is None and stored.tokenizer:
        config["vocab_size"] = tokenizer.size(stored.tokenizer)
    family, column = _family(stored.naming, config)
    spec = _with_vocabulary(configs.read(family, column.dialects, config), stored, column, vocab)
    found = resolve(column, tensors(spec), given.tensors)
    if said is not None:
        check_description(stored, said, found.tensors, found.sources)
    return Model(
        checkpoint=replace(stored, skipped={**stored.skipped, **found.skipped}),
        spec=spec,
        tensors=found.tensors,
        sources={
            part: tuple(member for name in names for member in given.members.get(name, (name,)))
            for part, names in found.sources.items()
        },
        quantized=quantized,
        transforms={
            part: "the optimizer's float32 copy"
            for part, names in found.sources.items()
            if any(name in stored.masters and stored.tensors.get(name) is stored.masters[name] for name in names)
        },
    )


def column(family: str, naming: str, instead: str) -> Column:
    """A family's table for one naming; `instead` ends the error when it has none."""
    columns: Mapping[str, Column] = plugins.load(FAMILIES, family).COLUMNS
    if naming not in columns:
        raise UnsupportedInput(f"family {family} has no {naming} names; {instead}")
    return columns[naming]


def _family(naming: str, config: Mapping[str, Any]) -> tuple[str, Column]:
    """The family whose marks the config bears, else an error with the nearest one and what differs."""
    nearest: tuple[tuple[bool, int], str, list[str], Dialect] | None = None
    for family, module in plugins.load_all(FAMILIES).items():
        if (found := module.COLUMNS.get(naming)) is None:
            continue
        for dialect in found.dialects:
            if not (differs := dialect.mismatches(config)):
                return family, found
            distance = bool(dialect.marks[0].differs(config)), len(differs)
            if nearest is None or distance < nearest[0]:
                nearest = distance, family, differs, dialect
    if nearest is None:
        raise UnsupportedInput(f"no family reads {naming} names")
    _, family, differs, dialect = nearest
    unknown = dialect.unknown(config)
    its = f", which does not know {_some(unknown)}" if unknown else ""
    raise UnsupportedInput(
        f"the config matches no family; the nearest is {family}{its}, but {'; '.join(differs)}; "
        "correct it with --config FILE, or supply a family as an entry point"
    )


def _some(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more keys" if len(keys) > most else "")


def _with_vocabulary(spec: ModelSpec, stored: Checkpoint, column: Column, policy: VocabPolicy) -> ModelSpec:
    """The vocabulary is what the config or the tokenizer says, never the rows of the embedding, which training pads."""
    if policy == "padded":
        names = [rule.stored for rule in column.rules if rule.parts == ("embed.weight",)]
        if (name := next((name for name in names if name in stored.tensors), None)) is None:
            raise DamagedInput(f"the embedding {names[0]} is missing; the checkpoint is incomplete")
        return replace(spec, vocab_size=stored.tensors[name].shape[0])
    if spec.vocab_size is None:
        raise UsageError(
            f"neither the config nor a tokenizer in {stored.path} says the size of the vocabulary; "
            "give vocab_size with --config FILE, or keep every row with --vocab padded"
        )
    known = tokenizer.size(stored.tokenizer) if stored.tokenizer else None
    if known is not None and known > spec.vocab_size:
        raise DamagedInput(
            f"the tokenizer knows {known} ids and the model {spec.vocab_size}; correct vocab_size with --config FILE"
        )
    return spec
