"""The transform that quantizes: a model whose linears are fields that are computed as they stream.

Everything that can be refused is refused by names and shapes. Numbers are looked at later, in two passes: the first
solves what a whole weight or a whole group must be seen for (a largest magnitude, a pre-scale), when a field is first
wanted; the second streams. So a weight is quantized whole, then cut, then fused, and the result does not depend on TP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from nemoport import __version__, plugins
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model, Quantized
from nemoport.exporters.computed import solved
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.descriptions import described, left_plain
from nemoport.exporters.encoding import Encoded, Encoding
from nemoport.exporters.groups import Group, groups
from nemoport.exporters.methods import packed_rows
from nemoport.exporters.quantized import with_kv_cache
from nemoport.exporters.quantizing import Fields, Given, Shares
from nemoport.exporters.rules import bindings, written
from nemoport.exporters.smoothing import folded
from nemoport.exporters.source import FAMILIES
from nemoport.exporters.statistics import Statistics
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import Plan, Recipe, TensorSpec, tensors

FOLDS = {"modelopt": ("int4_awq",), "compressed-tensors": ("int4_awq", "int8_sq"), "onnx": ("int4_awq",)}
"""By dialect: whose pre-scales go into the norm that feeds a group. Elsewhere they stand beside the weight."""
BESIDE = ("modelopt", "trtllm", "onnx")
"""The dialects in which a pre-scale may stand beside a weight."""
NAMINGS = {"modelopt": "huggingface", "compressed-tensors": "huggingface", "trtllm": "trtllm"}
"""By dialect: whose names its target writes, where they are not canonical."""
KV_CACHES = {"fp8": "FP8"}
"""What `--kv-cache` takes, in ModelOpt's words."""
KV_NEEDS = ("keys", "values")
KV_SCALES: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "modelopt": {"k": ("k_scale", ("keys",)), "v": ("v_scale", ("values",))},
    "compressed-tensors": {"k": ("k_scale", ("keys",)), "v": ("v_scale", ("values",))},
    "trtllm": dict.fromkeys("qkv", ("kv_scale", KV_NEEDS)),
}
"""By dialect: the scale that each projection has, and of what."""
KV_LEAST = {"trtllm": np.float32(1)}
"""By dialect: ModelOpt 0.47 stores none below it (`get_kv_cache_scaling_factor`): E4M3 holds small keys as they are."""
_KV_MOST = np.float32(448)
_PRE_SCALE = "pre_scale"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A recipe that a target can take."""

    recipe: Recipe
    module: ModuleType
    encoding: Encoding
    dialect: str
    needs: tuple[str, ...]
    """The statistics that it takes."""


def chosen(recipe: Recipe, to: str, target: ModuleType, calibrated: bool, wanted: str | None = None) -> Chosen:
    """The method for a target, refused where they do not go together."""
    module = plugins.load(QUANTIZERS, recipe.method)
    if not calibrated and hasattr(module, "UNCALIBRATED"):
        module = plugins.load(QUANTIZERS, module.UNCALIBRATED)
    encoding: Encoding = module.encoding(recipe.group)
    what = f"--quantize {recipe.method}"
    if not (dialects := getattr(target, "DIALECTS", ())):
        raise UnsupportedInput(f"{what} is not written by --to {to} yet; use --to hf, trtllm or onnx")
    dialect = wanted or dialects[0]
    if dialect not in encoding.loads:
        why = encoding.refused.get(dialect, f"--to {to} has no words for it")
        raise UnsupportedInput(f"{what} cannot be written by --to {to}: {why}; use --to hf, or another method")
    _check_group(recipe, to, getattr(module, "GROUPS", {}).get(dialect, ()))
    needs = module.NEEDS[dialect]
    if recipe.kv_cache:
        if recipe.kv_cache not in KV_CACHES:
            raise UsageError(f"--kv-cache {recipe.kv_cache} is not known; use {', '.join(KV_CACHES)}")
        if dialect not in KV_SCALES:
            raise UnsupportedInput(f"--kv-cache {recipe.kv_cache} is not written by --to {to}; use --to hf or trtllm")
        encoding, needs = with_kv_cache(encoding, dialect), (*needs, *KV_NEEDS)
    if needs and not calibrated:
        takes = what if module.NEEDS[dialect] else f"--kv-cache {recipe.kv_cache}"
        raise UsageError(
            f"{takes} takes scales from the model's activations; give text or token ids with --calib FILE, or the "
            "statistics of an earlier run with --calib-stats FILE"
        )
    return Chosen(recipe=recipe, module=module, encoding=encoding, dialect=dialect, needs=needs)


def _check_group(recipe: Recipe, to: str, sizes: tuple[int, ...]) -> None:
    if recipe.group is not None and recipe.group not in sizes:
        takes = f"use {', '.join(map(str, sizes))}" if sizes else "leave --group out, or use --quantize int4 --to onnx"
        raise UsageError(f"--quantize {recipe.method} --to {to} has no groups of {recipe.group}; {takes}")


def quantized(model: Model, chosen: Chosen, plan: Plan, statistics: Callable[[], Statistics] | None) -> Model:
    """The transform. `statistics` is called when a number is wanted."""
    specs = tensors(model.spec)
    found = tuple(groups(specs))
    names, joined = _stored_names(model, specs), _joined(model, specs, NAMINGS.get(chosen.dialect))
    left = _excluded(chosen.recipe, found, names)
    made, transforms, pre_scales = dict(model.tensors), dict(model.transforms), dict[str, LazyTensor]()
    for group in found:
        if set(group.linears) & left:
            _check_whole(group, left)
            continue
        caches = _caches(group, chosen, statistics)
        weights = {linear: _cast(model.tensors[f"{linear}.weight"], plan) for linear in group.linears}
        for linear, weight in weights.items():
            _check_shape(linear, weight, chosen)
        for linears in _shared(group, chosen.module.SHARES[chosen.dialect], joined):
            given = Given(
                names=linears,
                weights=tuple(weights[linear] for linear in linears),
                dialect=chosen.dialect,
                pre_scaled=chosen.dialect in BESIDE or group.norm is not None,
                input=group.name,
                statistics=statistics,
                group=chosen.recipe.group,
            )
            for linear, fields in zip(linears, chosen.module.quantize(given), strict=True):
                if group.norm and chosen.recipe.method in FOLDS.get(chosen.dialect, ()):
                    pre_scales[group.norm] = fields.pop(_PRE_SCALE)
                fields |= caches.get(linear, {})
                name = f"{linear}.weight"
                made[name] = Encoded(name, weights[linear].shape, chosen.encoding, fields)
                transforms[name] = _said(transforms.get(name), f"quantize {chosen.encoding.method}")
    for norm, pre_scale in pre_scales.items():
        _fold(norm, pre_scale, model, made, transforms)
    excluded = left_plain(model, made)
    return replace(model, tensors=made, transforms=transforms, quantized=_description(chosen, excluded))


def _cast(weight: LazyTensor, plan: Plan) -> LazyTensor:
    return cast(weight, plan.dtype or weight.dtype)


def _shared(group: Group, shares: Shares, joined: frozenset[frozenset[str]]) -> Iterator[tuple[str, ...]]:
    """A group in the parts that have their scales together: where the loader wants it, or they are stored as one."""
    last = {linear.rpartition(".")[2] for linear in group.linears}
    if any(last <= set(together) for together in shares) or frozenset(group.linears) in joined:
        yield group.linears
    else:
        yield from ((linear,) for linear in group.linears)


def _check_whole(group: Group, left: frozenset[str]) -> None:
    if inside := [linear for linear in group.linears if linear not in left]:
        out = next(linear for linear in group.linears if linear in left)
        raise UsageError(
            f"--exclude leaves {out} out and not {inside[0]}, and runtimes fuse them into one linear; exclude both"
        )


def _check_shape(linear: str, weight: LazyTensor, chosen: Chosen) -> None:
    rows, inputs = weight.shape
    step = packed_rows(chosen.encoding)
    if (group := chosen.encoding.group) and inputs % group:
        raise UnsupportedInput(
            f"{linear} has {inputs} inputs, and {chosen.recipe.method} has scales for groups of {group}; "
            f"leave it plain with --exclude {linear}, or use {_instead(chosen, inputs)}"
        )
    if rows % step:
        raise UnsupportedInput(f"{linear} has {rows} rows, and {chosen.recipe.method} packs {step} to a byte")


def _instead(chosen: Chosen, inputs: int) -> str:
    """What takes such a number of inputs."""
    sizes = getattr(chosen.module, "GROUPS", {}).get(chosen.dialect, ())
    smaller = ", ".join(str(size) for size in sizes if inputs % size == 0)
    return f"--group {smaller}" if smaller else "int8" if chosen.dialect == "onnx" else "fp8_dynamic or int8"


def _caches(group: Group, chosen: Chosen, statistics: Callable[[], Statistics] | None) -> Mapping[str, Fields]:
    """By linear, the scale of what it puts into the cache."""
    mixer, _, _ = group.name.rpartition(".")
    if chosen.recipe.kv_cache is None or not mixer.endswith(".attn"):
        return {}
    assert statistics is not None
    rows, least = KV_SCALES[chosen.dialect], KV_LEAST.get(chosen.dialect, np.float32(0))

    def scale(seen: tuple[str, ...]) -> NDArray[np.float32]:
        return np.array(max(least, *(_cache_scale(statistics(), mixer, what) for what in seen)))

    scales = {field: solved((), "float32", partial(scale, seen)) for field, seen in rows.values()}
    return {f"{mixer}.{last}": {field: scales[field]} for last, (field, _) in rows.items()}


def _cache_scale(statistics: Statistics, mixer: str, seen: str) -> np.float32:
    amax = np.float32(statistics.of(mixer, seen))
    if not amax > 0:
        raise UnsupportedInput(f"the {seen} of {mixer} were zero throughout calibration; leave --kv-cache out")
    return np.float32(amax / _KV_MOST)


def _fold(
    norm: str, pre_scale: LazyTensor, model: Model, made: dict[str, LazyTensor], transforms: dict[str, str]
) -> None:
    centre = 1.0 if model.spec.norm.zero_centered else 0.0
    for name, lacks in ((f"{norm}.weight", centre), (f"{norm}.bias", 0.0)):
        if name in made:
            made[name] = folded(made[name], pre_scale, lacks)
            transforms[name] = _said(transforms.get(name), "times the pre-scale of what it feeds")


def _said(before: str | None, now: str) -> str:
    return f"{before}, {now}" if before else now


def _joined(model: Model, specs: Mapping[str, TensorSpec], naming: str | None) -> frozenset[frozenset[str]]:
    """The linears that lie in one stored tensor of a naming."""
    column = plugins.load(FAMILIES, model.spec.family).COLUMNS.get(naming) if naming else None
    found = written(column.rules, specs) if column else ()
    return frozenset(frozenset(part.name.removesuffix(".weight") for part in binding.parts) for binding in found)


def _stored_names(model: Model, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, str]]:
    """Of every linear, the name that each naming has for it."""
    found: dict[str, dict[str, str]] = {}
    for naming, column in plugins.load(FAMILIES, model.spec.family).COLUMNS.items():
        for binding in bindings(column.rules, specs):
            for part in binding.parts:
                linear = part.name.removesuffix(".weight")
                found.setdefault(linear, {}).setdefault(naming, binding.stored.removesuffix(".weight"))
    return found


def _excluded(recipe: Recipe, found: tuple[Group, ...], names: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    """The linears that the patterns mean, in canonical names or in those of any naming."""
    linears = [linear for group in found for linear in group.linears]
    left: set[str] = set()
    for pattern in recipe.exclude:
        meant = {
            linear
            for linear in linears
            if any(fnmatchcase(name, pattern) for name in (linear, *names.get(linear, {}).values()))
        }
        if not meant:
            first = names.get(linears[0], {}).get("huggingface", linears[0])
            raise UsageError(f"--exclude {pattern} means no linear of this model; they are called like {first}")
        left |= meant
    if len(left) == len(linears):
        raise UsageError("--exclude leaves nothing to quantize; leave --quantize out, or exclude less")
    return frozenset(left)


def _description(chosen: Chosen, excluded: list[str]) -> Quantized:
    algorithm, recipe = chosen.module.ALGORITHM, chosen.recipe
    kv_cache = KV_CACHES[recipe.kv_cache] if recipe.kv_cache else None
    said = {
        "where": "--quantize",
        "producer": f"nemoport {__version__}",
        "algorithm": algorithm or recipe.method,
        "kv_cache": kv_cache,
        "group": chosen.encoding.group,
        "excluded": tuple(excluded),
        "calibration": recipe.calibration,
    }
    config, files = described(chosen.dialect, algorithm, chosen.encoding, kv_cache, excluded)
    return Quantized(
        encoding=chosen.encoding,
        dialect=chosen.dialect,
        said={key: value for key, value in said.items() if value is not None},
        kv_cache=kv_cache,
        excluded=tuple(excluded),
        config=config,
        files=files,
    )
