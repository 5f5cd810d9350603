"""What is said of an adapter: in ledger and manifest, by the command, and by validation, which sees a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemoport import artifact
from nemoport.errors import UsageError
from nemoport.exporters import convert, lora, source, stream
from nemoport.spec import Plan
from nemoport.validation import Request, validate

from .adapters import (
    ADAPTER,
    merged,
)
from .commands import command, contents, sentence
from .fixtures import HUGGINGFACE


def test_an_adapter_is_never_written_into(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    with pytest.raises(UsageError, match="lies inside the adapter"):
        merged("hf", adapter / "out", adapter)


def test_the_ledger_accounts_for_the_adapter(merged_llama: Path) -> None:
    rows = [json.loads(line) for line in (merged_llama / artifact.LEDGER).read_text().splitlines()]
    used = {row["source"] for row in rows if row.get("fate") == "used"}
    assert {lora.OWN + name for name in source.adapter_at(ADAPTER).tensors} < used
    (row,) = (row for row in rows if row.get("target") == "model.layers.2.self_attn.k_proj.weight")
    assert row["transform"] == "merge adapter (r 4, alpha 8)"
    assert row["sources"] == [
        "adapter/decoder.layers.2.self_attention.linear_qkv.adapter.linear_in.weight",
        "adapter/decoder.layers.2.self_attention.linear_qkv.adapter.linear_out.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ]
    assert artifact.read_manifest(merged_llama).source["adapter"]["scaling"] == ["r 4, alpha 8"]


def test_the_same_command_with_another_adapter_is_another_job(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    first = merged("hf", tmp_path / "out", adapter)
    assert merged("hf", tmp_path / "out", adapter) == first
    (adapter / "lora.json").write_text('{"dim": 4, "alpha": 9}')
    with pytest.raises(UsageError, match="is not the result of this conversion"):
        merged("hf", tmp_path / "out", adapter)


@pytest.mark.parametrize("to, plan", [("hf", {}), ("trtllm", {"tp": 2}), ("onnx", {"dtype": "float32"})])
def test_a_merged_model_is_validated_without_another_word(to: str, plan: dict[str, Any], tmp_path: Path) -> None:
    report = validate(Request(subject=merged(to, tmp_path / "out", **plan)))
    assert report.passed
    assert report.source["adapter"]["scaling"] == ["r 4, alpha 8"]


def test_a_carried_adapter_is_validated_with_its_base(tmp_path: Path) -> None:
    carried = merged("hf", tmp_path / "out", mode="carry")
    assert validate(Request(subject=carried)).passed


def test_validate_sees_an_adapter_that_was_not_merged(merged_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    stream.run(convert.plan(HUGGINGFACE, "hf", bare, plan=Plan()))
    assert not validate(Request(subject=bare, against=HUGGINGFACE, adapter=ADAPTER)).passed
    assert not validate(Request(subject=shutil.copytree(merged_llama, tmp_path / "made"), against=HUGGINGFACE)).passed


def test_validate_sees_a_wrong_scale(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    out = merged("hf", tmp_path / "out", adapter)
    (adapter / "lora.json").write_text('{"dim": 4, "alpha": 8.5}')
    report = validate(Request(subject=out))
    failed = {check.name for check in report.checks if not check.passed}
    assert "weights of the source" in failed
    assert any(name.startswith("logits of the source") for name in failed)


def test_the_command_line_merges_carries_and_inspects(merged_llama: Path, tmp_path: Path) -> None:
    arguments = ("convert", HUGGINGFACE, "--to", "hf", "--adapter", ADAPTER)
    result = command(*arguments, "-o", tmp_path / "merged")
    assert result.exit_code == 0
    assert "r 4, alpha 8" in result.output
    assert contents(tmp_path / "merged") == contents(merged_llama)
    result = command(*arguments, "--adapter-mode", "carry", "-o", tmp_path / "carried", "--json")
    assert json.loads(result.stdout)["adapter"]["mode"] == "carry"
    for adapter, format_name in ((ADAPTER, "megatron"), (tmp_path / "carried/adapter", "huggingface")):
        facts = json.loads(command("inspect", adapter, "--json").stdout)
        assert facts["format"] == f"adapter ({format_name})"
        assert facts["adapter"]["scaling"] == ["r 4, alpha 8"]
    result = command("convert", ADAPTER, "--to", "hf", "-o", tmp_path / "no")
    assert result.exit_code in (2, 3)
    assert sentence(result.stderr)
