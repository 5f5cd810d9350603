"""What a config says, and that it says nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from jinja2 import UndefinedError
from tritonclient.grpc import model_config_pb2

from nemoport import artifact
from nemoport.artifact import Signature, Tensor
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.repository import config
from nemoport.repository.config import DATA_TYPES, Config, from_artifact, mismatch, parse, render, with_versions
from nemoport.repository.kinds import KINDS

from .made import IDS, LOGITS, SIGNATURE, make_artifact


def _config(tmp_path: Path, signature: Signature = SIGNATURE, **options: int) -> Config:
    made = artifact.read_manifest(make_artifact(tmp_path / "artifact", signature=signature))
    return from_artifact(made, "m", 1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_config_reads_back_as_the_value_it_came_from(tmp_path: Path, kind: str) -> None:
    value = _config(tmp_path)
    assert parse(render(value), "here") == value


def test_the_batch_axis_is_left_out_of_dims_and_other_named_axes_vary(tmp_path: Path) -> None:
    value = _config(tmp_path)
    assert value.max_batch_size == config.MAX_BATCH_SIZE
    assert [tensor.dims for tensor in (*value.inputs, *value.outputs)] == [(-1,), (-1, 5)]


def test_a_model_without_a_batch_axis_has_whole_shapes(tmp_path: Path) -> None:
    signature = Signature(inputs=(IDS,), outputs=(Tensor("logits", "float32", (5, "batch")),))
    value = _config(tmp_path, signature)
    assert value.max_batch_size == 0
    assert [tensor.dims for tensor in (*value.inputs, *value.outputs)] == [(-1, -1), (5, -1)]
    assert parse(render(value), "here") == value


def test_the_batch_size_is_an_option(tmp_path: Path) -> None:
    assert _config(tmp_path, max_batch_size=3).max_batch_size == 3


def test_every_data_type_is_one_of_tritons() -> None:
    known = set(model_config_pb2.DataType.keys()) - {"TYPE_INVALID"}
    assert sorted(DATA_TYPES.values()) == sorted(known)


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "/layers.0/Add:0", "ünïcode", "{{ braces }}", "new\nline"])
def test_any_tensor_name_survives(tmp_path: Path, name: str) -> None:
    value = _config(tmp_path, Signature(inputs=(Tensor(name, "int64", ("batch", 1)),), outputs=(LOGITS,)))
    assert parse(render(value), "here") == value


def test_kinds_that_cannot_be_published_are_refused_by_name(tmp_path: Path) -> None:
    made = artifact.read_manifest(make_artifact(tmp_path / "artifact", kind="trtllm"))
    with pytest.raises(
        UnsupportedInput, match="kind trtllm cannot be published: compile it with nemoport compile --to trtllm"
    ):
        from_artifact(made, "m", 1)


def test_a_tensor_of_one_number_per_item_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="score is a single number"):
        _config(tmp_path, Signature(inputs=(IDS,), outputs=(Tensor("score", "float32", ("batch",)),)))


def test_a_misspelt_field_is_refused_with_its_place() -> None:
    with pytest.raises(DamagedInput, match=r"repo/m/config.pbtxt.*2:1.*max_batch"):
        parse('name: "m"\nmax_batch: 8\n', "repo/m/config.pbtxt")


def test_a_template_that_uses_an_unknown_name_fails() -> None:
    with pytest.raises(UndefinedError):
        config._environment().from_string("{{ config.nothing }}").render(config=object())


def test_changing_the_live_versions_keeps_everything_else(tmp_path: Path) -> None:
    text = render(_config(tmp_path)) + "\n# mine\noptimization { priority: PRIORITY_MAX }\n"
    changed = with_versions(text, (2, 1), "here")
    assert parse(changed, "here").versions == (1, 2)
    assert changed.replace("[ 1, 2 ]", "[ 1 ]") == text


@pytest.mark.parametrize(
    "policy",
    ["", "version_policy { latest { num_versions: 1 } }", "# version_policy { specific { versions: [1] } }"],
)
def test_a_policy_that_cannot_be_edited_safely_is_left_alone(policy: str) -> None:
    with pytest.raises(UnsupportedInput, match="version_policy"):
        with_versions(f'name: "m"\n{policy}\n', (1,), "here")


def test_a_policy_in_other_words_is_understood() -> None:
    text = 'name: "m"\nversion_policy: {\n  specific: { versions: [1,\n 2] }\n}\n'
    text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parse(with_versions(text, (1, 2, 3), "here"), "here").versions == (1, 2, 3)


@pytest.mark.parametrize(
    "has, needs, reason",
    [
        (SIGNATURE, SIGNATURE, None),
        (Signature((IDS,), ()), SIGNATURE, None),
        (Signature((Tensor("input_ids", "int64", ("batch", 16)),), (LOGITS,)), SIGNATURE, None),
        (SIGNATURE, Signature((Tensor("input_ids", "int64", ("batch", 16)),), (LOGITS,)), "'input_ids' as TYPE_INT64"),
        (SIGNATURE, Signature((Tensor("input_ids", "int32", IDS.shape),), (LOGITS,)), "TYPE_INT32"),
        (
            SIGNATURE,
            Signature((IDS,), (Tensor("logits", "float32", ("batch", "sequence", 6)),)),
            "'logits' as TYPE_FP32",
        ),
        (SIGNATURE, Signature((IDS, Tensor("mask", "int64", IDS.shape)), (LOGITS,)), "input 'mask'"),
        (SIGNATURE, Signature((IDS,), (Tensor("scores", "float32", LOGITS.shape),)), "no output 'logits'"),
    ],
)
def test_a_config_serves_what_it_describes_or_less(
    tmp_path: Path, has: Signature, needs: Signature, reason: str | None
) -> None:
    found = mismatch(_config(tmp_path / "1", has), _config(tmp_path / "2", needs))
    assert found is None if reason is None else reason in str(found)
