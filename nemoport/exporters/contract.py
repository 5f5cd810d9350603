"""What loaders expect of a quantized Hugging Face directory (vLLM, SGLang, TensorRT-LLM, transformers): names, shapes,
dtypes, scales the right way round, a description that fits. Headers are read, and of scales a few rows; no weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from nemoport import plugins
from nemoport.errors import NemoportError
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.computed import single
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.encoding import NUMBERS, Encoding, Field, Form, bits
from nemoport.exporters.exclusion import excludes
from nemoport.exporters.quantized import KV_CACHE, Quantization, encoding, quantization
from nemoport.exporters.tensor import LazyTensor, cut, read

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that loaders join, in Hugging Face's words."""
ROUTERS = ("gate", "router", "shared_expert_gate")
LARGEST_CODE = {"fp8": 448, "fp8_dynamic": 448, "fp8_block": 448, "int8": 127, "int8_sq": 127, "int4_awq": 7}
LARGEST_BLOCK = 6 * 448
"""E2M1's largest number times E4M3's, which a scale of scales is a factor of."""
LEAST, MOST = 2.0**-24, 64.0
"""Between them lies the largest weight of a matrix, or of most of its groups. A scale turned over is far beyond: one of
E4M3 numbers up to 0.3 would make them up to 670 000."""
_ROWS = 64
KV_NAMES = ("k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class Breach:
    at: str
    """A tensor, or the file that says otherwise."""
    found: str
    needed: str
    fix: str = "convert again from the checkpoint that it came from"

    def __str__(self) -> str:
        return f"{self.found}; needed: {self.needed}; fix: {self.fix}"


@dataclass(frozen=True)
class _Held:
    stored: Checkpoint
    said: Quantization
    how: Encoding
    module: ModuleType
    linears: tuple[str, ...]
    """Those that are quantized by their numbers' dtype, with a dot behind."""

    @property
    def dialect(self) -> str:
        assert self.said.dialect is not None
        return self.said.dialect

    @property
    def fields(self) -> tuple[tuple[Field, Form], ...]:
        return self.how.in_dialect(self.dialect)

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        return self.stored.tensors


def is_quantized(directory: Path) -> bool:
    """A Hugging Face directory that says it is quantized."""
    try:
        return (directory / "config.json").is_file() and quantization(source.checkpoint(directory)) is not None
    except (NemoportError, OSError):
        return False


def breaches(directory: Path) -> tuple[Breach, ...]:
    """All that a loader would trip over, or load and compute wrongly with."""
    try:
        stored = source.checkpoint(directory)
        said = quantization(stored)
        if said is None:
            return ()
        how = encoding(stored, said)
    except (NemoportError, OSError) as error:
        return (Breach("config.json", str(error), "a description that loaders know"),)
    assert said.dialect is not None
    (form,) = (form for each, form in how.in_dialect(said.dialect) if each.name == NUMBERS)
    (numbers,) = (each for each in how.fields if each.name == NUMBERS)
    linears = tuple(
        name.removesuffix(form.suffix)
        for name, tensor in stored.tensors.items()
        if name.endswith(f".{form.suffix}") and tensor.dtype in form.kinds(numbers) and len(tensor.shape) == 2
    )
    held = _Held(stored, said, how, plugins.load(QUANTIZERS, how.method), linears)
    return tuple(breach for look in LOOKS for breach in look(held))


def _fields(held: _Held) -> Iterator[Breach]:
    """Every field with its dtype and shape."""
    ((numbers, how),) = [(each, form) for each, form in held.fields if each.name == NUMBERS]
    follows = how.packing.follows if how.packing else numbers.follows
    for linear in held.linears:
        stored = held.tensors[linear + how.suffix].shape
        weight = tuple(size * step for size, (_, step) in zip(stored, follows, strict=True))
        for each, form in held.fields:
            if not form.may_be_of(linear):
                continue
            name = form.name(linear)
            if (tensor := held.tensors.get(name)) is None:
                if not (each.optional or each.neutral is not None):
                    yield Breach(name, f"{name} is missing", f"the {each.name} of every weight of {held.how.method}")
                continue
            shape = (2,) if each.of_shape else form.shape(each, weight)
            found = (1,) if form.single and not tensor.shape else tensor.shape
            if tensor.dtype not in form.kinds(each) or found != shape:
                yield Breach(
                    name,
                    f"{name} is {tensor.dtype} {list(tensor.shape)}",
                    f"{' or '.join(form.kinds(each))} {list(shape)}",
                )


def _scaled_and_not_quantized(held: _Held) -> Iterator[Breach]:
    ((numbers, how),) = [(each, form) for each, form in held.fields if each.name == NUMBERS]
    others = [form.suffix for each, form in held.fields if each.name != NUMBERS and not form.above]
    for linear in dict.fromkeys(
        name.removesuffix(suffix) for name in held.tensors for suffix in others if name.endswith(f".{suffix}")
    ):
        name = linear + how.suffix
        if linear not in held.linears and name in held.tensors:
            yield Breach(
                name,
                f"{name} is {held.tensors[name].dtype} and has scales beside it",
                f"{' or '.join(how.kinds(numbers))} for {held.how.method}",
            )


def _description(held: _Held) -> Iterator[Breach]:
    """What is listed as not quantized is not, and what is not listed is."""
    for linear in held.linears:
        if pattern := next((each for each in held.said.excluded if excludes(each, linear[:-1])), None):
            yield Breach(
                held.said.where,
                f"{linear[:-1]} is quantized, and {held.said.where} lists {pattern} as not",
                "a description of these weights",
                f"take {pattern} out of the list, or convert again",
            )
    if held.dialect not in ("modelopt", "compressed-tensors"):
        return
    for name, tensor in held.tensors.items():
        linear = name.removesuffix(".weight")
        plain = tensor.dtype in ("bfloat16", "float16", "float32") and len(tensor.shape) == 2
        if not plain or linear == name or ".layers." not in name or linear.rpartition(".")[2] in ROUTERS:
            continue
        listed = any(excludes(each, linear) for each in held.said.excluded)
        if not listed and not _has_scales(held, f"{linear}."):
            yield Breach(
                held.said.where,
                f"{linear} is plain {tensor.dtype}, and {held.said.where} does not list it",
                "every linear that stays as it is in the list, or its loader waits for scales",
                f"add {linear} to the list, or convert again",
            )


def _has_scales(held: _Held, linear: str) -> bool:
    return any(linear + form.suffix in held.tensors for each, form in held.fields if each.name != NUMBERS)


def _tied_head(held: _Held) -> Iterator[Breach]:
    if held.stored.config.get("tie_word_embeddings") and "lm_head." in held.linears:
        yield Breach(
            "lm_head.weight",
            "lm_head is quantized, and config.json ties it to the embedding",
            "a plain lm_head, or none: loaders take the embedding in its place",
        )


def _directions(held: _Held) -> Iterator[Breach]:
    """Scales are numbers above zero, and come to weights of a size that models have."""
    for linear in held.linears:
        for each, form in held.fields:
            tensor = held.tensors.get(name := form.name(linear))
            if tensor is None or each.name == NUMBERS or each.of_shape or tensor.dtype not in form.kinds(each):
                continue
            if not form.may_be_of(linear):
                continue
            rows = cut(tensor, 0, 0, min(_ROWS, tensor.shape[0])) if tensor.shape else tensor
            numbers = single(read(rows)).reshape(-1)
            if not (np.isfinite(numbers).all() and (numbers > 0).all()):
                yield Breach(name, f"{name} is not above zero, or not finite", "a number to multiply with")
                continue
            largest = _largest(held, each.name, float(np.median(numbers)))
            if largest is not None and not LEAST < largest < MOST:
                yield Breach(
                    name,
                    f"{name} makes weights of up to {largest:.3g}, as if it were turned over",
                    f"between {LEAST:.1g} and {MOST:g}: {_way(each.name)}",
                )


def _largest(held: _Held, field: str, scale: float) -> float | None:
    """What the largest code comes to."""
    if field == "global_scale":
        return LARGEST_BLOCK / scale
    if field == "scale_2":
        return LARGEST_BLOCK * scale
    code = LARGEST_CODE.get(held.how.method)
    return code * scale if field == "scale" and code else None


def _way(field: str) -> str:
    return "loaders divide by a global scale" if field == "global_scale" else "loaders multiply with it"


def _shared(held: _Held) -> Iterator[Breach]:
    """What loaders take from one of the linears that they join."""
    if not held.module.SHARES.get(held.dialect):
        return
    alike = [(each, form) for each, form in held.fields if not each.has_rows and not form.above and not each.of_shape]
    for linear in held.linears:
        prefix, _, last = linear[:-1].rpartition(".")
        group = next((group for group in FUSED if last == group[0]), ())
        members = [name for each in group if (name := f"{prefix}.{each}.") in held.linears]
        for _, form in alike:
            found = [held.tensors[name] for each in members if (name := form.name(each)) in held.tensors]
            if len({bits(tensor) for tensor in found}) > 1:
                names = ", ".join(form.name(each) for each in members)
                yield Breach(
                    form.name(members[0]), f"{names} differ", "one number for linears that loaders join into one"
                )


def _kv_cache(held: _Held) -> Iterator[Breach]:
    forms = [form for each in KV_CACHE if (form := each.forms.get(held.dialect))]
    known = {form.name(linear) for linear in held.linears for form in forms if form.may_be_of(linear)}
    stored = {name for name in held.tensors if name.rpartition(".")[2] in KV_NAMES}
    if stored and held.said.kv_cache is None:
        name = min(stored)
        yield Breach(name, f"{name} is stored, and {held.said.where} says nothing of a KV cache", "a KV cache of FP8")
        return
    for name in sorted(stored - known):
        yield Breach(
            name, f"{name} is no name for the scale of a KV cache", f"a name like {min(known, default='none')}"
        )
    if held.said.kv_cache is not None:
        for name in sorted(known - stored):
            yield Breach(name, f"{name} is missing", f"the scales of the KV cache that {held.said.where} speaks of")


LOOKS: tuple[Callable[[_Held], Iterator[Breach]], ...] = (
    _fields,
    _scaled_and_not_quantized,
    _description,
    _tied_head,
    _directions,
    _shared,
    _kv_cache,
)
