"""Layouts and rules are read in both directions, and the directions are inverse, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from nemoport import plugins
from nemoport.errors import UnsupportedInput
from nemoport.exporters import configs, layouts, rules, source
from nemoport.exporters.dtypes import words
from nemoport.exporters.tensor import Held, LazyTensor, read
from nemoport.spec import Axis, ModelSpec, TensorSpec, spec_from_json, tensors, to_json

from .fixtures import LLAMA, LLAMA_GQA, Fixture, every_llama
from .made import SAID, SPECS, bound, config, random_tensors, stored

COLUMNS = [
    (family, naming)
    for family, module in plugins.load_all(source.FAMILIES).items()
    for naming in module.COLUMNS
    if family in SPECS
]
"""Every family is looked at in `tests/families`."""
MODELS = [(family, naming, name) for family, naming in COLUMNS for name in SPECS[family]]
every_model = pytest.mark.parametrize("family, naming, name", MODELS)


@every_model
def test_splitting_undoes_joining(family: str, naming: str, name: str) -> None:
    spec = SPECS[family][name]
    canonical = random_tensors(spec)
    for binding in bound(spec, naming):
        parts = [canonical[part.name] for part in binding.parts]
        back = binding.layout.split(binding.layout.join(parts, binding.parts), binding.parts)
        for part, before, after in zip(binding.parts, parts, back, strict=True):
            np.testing.assert_array_equal(_bits(after), _bits(before), part.name)


@every_model
def test_joining_undoes_splitting(family: str, naming: str, name: str) -> None:
    spec = SPECS[family][name]
    for binding in bound(spec, naming):
        whole = _counted(binding.shape)
        back = binding.layout.join(binding.layout.split(whole, binding.parts), binding.parts)
        np.testing.assert_array_equal(_bits(back), _bits(whole), binding.stored)


@every_model
def test_every_tensor_has_one_place_and_reads_back_from_it(family: str, naming: str, name: str) -> None:
    spec = SPECS[family][name]
    if name not in SAID[family, naming]:
        pytest.skip("no config of this naming says this model")
    canonical = random_tensors(spec)
    resolved = rules.resolve(
        source.column(family, naming, "give it one"), tensors(spec), stored(spec, naming, canonical)
    )
    assert resolved.tensors.keys() == canonical.keys()
    for place, tensor in canonical.items():
        np.testing.assert_array_equal(_bits(resolved.tensors[place]), _bits(tensor), place)


@pytest.mark.parametrize("hidden", [1, 10])
@pytest.mark.parametrize("groups, queries, head_dim", [(5, 2, 6), (1, 7, 3), (4, 1, 2), (3, 3, 1)])
def test_query_groups_are_each_groups_queries_then_its_key_then_its_value(
    groups: int, queries: int, head_dim: int, hidden: int
) -> None:
    sizes = {"q": groups * queries, "k": groups, "v": groups}
    specs = [
        TensorSpec(name, (Axis("heads", heads * head_dim, heads), Axis("hidden", hidden, hidden)))
        for name, heads in sizes.items()
    ]
    q, k, v = (np.random.default_rng(i).integers(0, 2**16, spec.shape, dtype=np.uint16) for i, spec in enumerate(specs))
    joined = layouts.QUERY_GROUPS.join([Held(part, "bfloat16") for part in (q, k, v)], specs)
    expected = []
    for group in range(groups):
        expected.append(q[group * queries * head_dim : (group + 1) * queries * head_dim])
        expected.append(k[group * head_dim : (group + 1) * head_dim])
        expected.append(v[group * head_dim : (group + 1) * head_dim])
    np.testing.assert_array_equal(_bits(joined), np.concatenate(expected))


def test_padding_rows_are_no_part_of_the_model() -> None:
    spec = TensorSpec("embed.weight", (Axis("vocab", 131, 131), Axis("hidden", 10, 10)))
    (true,) = layouts.PADDED.split(_counted((256, 10)), [spec])
    np.testing.assert_array_equal(_bits(true), _bits(_counted((256, 10)))[:131])


@every_model
def test_a_config_says_exactly_its_model_or_is_refused(family: str, naming: str, name: str) -> None:
    spec = SPECS[family][name]
    column = source.column(family, naming, "give it one")
    if name not in SAID[family, naming]:
        with pytest.raises(UnsupportedInput, match="no config of this format says this"):
            config(spec, naming)
        return
    assert configs.read(family, column.dialects, config(spec, naming)) == spec


@every_model
def test_a_config_that_was_read_is_written_again_as_it_was(family: str, naming: str, name: str) -> None:
    if name not in SAID[family, naming]:
        pytest.skip("no config of this naming says this model")
    written = config(SPECS[family][name], naming)
    again = configs.read(family, source.column(family, naming, "give it one").dialects, written)
    assert config(again, naming) == written


@every_llama
def test_configs_of_real_checkpoints_say_one_model_in_every_naming(fixture: Fixture) -> None:
    spec = source.model(fixture.path, fixture.config).spec
    assert spec == source.model(LLAMA["huggingface"].path).spec
    for naming in ("megatron", "huggingface", "trtllm"):
        column = source.column("llama", naming, "give it one")
        assert configs.read("llama", column.dialects, config(spec, naming)) == spec


@pytest.mark.parametrize("spec", [spec for models in SPECS.values() for spec in models.values()])
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    import json

    assert spec_from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_dialects_of_a_family_are_told_apart_by_their_marks() -> None:
    """A config that two dialects claim would mean what their order says."""
    for family, naming in COLUMNS:
        for name in SAID[family, naming]:
            column = source.column(family, naming, "give it one")
            written = config(SPECS[family][name], naming)
            assert sum(not dialect.mismatches(written) for dialect in column.dialects) == 1, (naming, name)


@pytest.mark.parametrize(
    "model_type, words, expected",
    [
        ("mistral", {"sliding_window": 4096}, {"window": 4096, "qkv_bias": False}),
        ("mistral", {"sliding_window": None}, {"window": None}),
        ("qwen2", {}, {"qkv_bias": True, "out_bias": False, "qk_norm": False}),
        ("qwen3", {}, {"qkv_bias": False, "qk_norm": True}),
        ("llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    ],
)
def test_relatives_of_llama_differ_by_a_flag(
    model_type: str, words: dict[str, object], expected: dict[str, object]
) -> None:
    base = source.checkpoint(LLAMA_GQA).config
    column = source.column("llama", "huggingface", "give it one")
    spec = configs.read("llama", column.dialects, {**base, "model_type": model_type, **words})
    assert {name: getattr(spec.mixers[0], name) for name in expected} == expected


def _bits(tensor: LazyTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    whole = read(tensor)
    return np.ascontiguousarray(whole).view(words(tensor.dtype)).reshape(whole.shape)


def _counted(shape: tuple[int, ...]) -> LazyTensor:
    """Every element another one."""
    return Held(np.arange(np.prod(shape), dtype=np.uint32).reshape(shape), "int32")
