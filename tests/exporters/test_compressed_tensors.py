"""The dialect of compressed-tensors: its own numbers bit for bit, read back, passed on unchanged, and said in
ModelOpt's words and back without a number being rounded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport.artifact import read_manifest
from nemoport.exporters import source
from nemoport.exporters.dequantized import dequantized
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import cut, read

from .commands import command, sentence
from .fixtures import DATA

SOURCE = DATA / "modelopt"
EXPORTS: dict[str, Any] = json.loads((DATA / "compressed_tensors/exports.json").read_text())
STATS = ("--calib-stats", SOURCE / "statistics.npz")
CALIBRATED = ("fp8", "int8_sq", "int4_awq", "nvfp4")
METHODS = (*CALIBRATED, "fp8_dynamic", "fp8_block", "int8", "int4", "nvfp4_weights")
CT = "compressed-tensors"
Q = "model.layers.0.self_attn.q_proj"


def made(method: str, dialect: str, at: Path, *more: object) -> Path:
    out = at / f"{method}-{dialect}"
    stats = STATS if method in CALIBRATED else ()
    said = ("--quantize", method, "--dialect", dialect, *stats, *more)
    result = command("convert", SOURCE, "--to", "hf", "-o", out, *said)
    assert result.exit_code == 0, result.output
    return out


def translated(path: Path, out: Path, *more: object) -> Path:
    result = command("convert", path, "--to", "hf", "-o", out, *more)
    assert result.exit_code == 0, result.output
    return out


def refused(path: Path, at: Path, *more: object, code: int = 3, to: str = "hf") -> str:
    result = command("convert", path, "--to", to, "-o", at / "refused", *more)
    assert result.exit_code == code, result.output
    assert not (at / "refused").exists()
    return sentence(result.stderr)


def digest(tensor: Tensor) -> list[Any]:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blake3(content).hexdigest()[:32]]


def stored(path: Path) -> dict[str, list[Any]]:
    return {name: digest(tensor) for name, tensor in load_file(path / "model.safetensors").items()}


def numbers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = source.model(path)
    return {name: read(dequantized(each)) for name, each in model.tensors.items() if isinstance(each, Encoded)}


@pytest.mark.parametrize("method", EXPORTS)
def test_every_number_is_what_compressed_tensors_makes(method: str, tmp_path: Path) -> None:
    out = made(method, CT, tmp_path)
    found, wanted = stored(out), EXPORTS[method]["tensors"]
    assert {name: row for name, row in found.items() if name in wanted} == wanted
    beyond = {name for name in set(found) - set(wanted) if "_proj." in name}
    assert {name.rpartition(".")[2] for name in beyond} == ({"input_scale"} if method == "fp8" else set())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert {key: EXPORTS[method]["weights"][key] for key in weights} == weights
    assert config["quant_method"] == CT
    assert not (out / "hf_quant_config.json").exists()


@pytest.mark.parametrize("method", EXPORTS)
def test_it_decompresses_to_the_numbers_that_are_read_here(method: str, tmp_path: Path) -> None:
    out = made(method, CT, tmp_path)
    model = source.model(out)
    for name, tensor in model.tensors.items():
        if isinstance(tensor, Encoded):
            theirs = EXPORTS[method]["decompressed"][f"{model.sources[name][0].rpartition('.')[0]}.weight"]
            ours = read(dequantized(tensor)).astype(real(theirs[0]))
            assert blake3(ours.tobytes()).hexdigest()[:32] == theirs[2], name


@pytest.mark.parametrize("method", METHODS)
def test_read_back_it_passes_on_unchanged_and_any_box_of_it_is_that_box(method: str, tmp_path: Path) -> None:
    out = made(method, CT, tmp_path)
    again = translated(out, tmp_path / "again")
    assert stored(again) == stored(out)
    for name in ("config.json",):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    tensor = dequantized(source.model(out).tensors["layers.0.ffn.down.weight"])
    box = cut(cut(tensor, 0, 3, 201), 1, 17, 190)
    np.testing.assert_array_equal(read(box), read(tensor)[3:201, 17:190])


THERE = ("fp8", "fp8_dynamic", "fp8_block", "int8", "int4", "nvfp4", "nvfp4_weights")


@pytest.mark.parametrize("dialects", [("modelopt", CT), (CT, "modelopt")], ids=["to", "from"])
@pytest.mark.parametrize("method", THERE)
def test_the_other_dialect_holds_the_same_numbers(method: str, dialects: tuple[str, str], tmp_path: Path) -> None:
    """Codes as they were; of NVFP4 a scale is turned over, once to float32."""
    here, there = dialects
    first = made(method, here, tmp_path)
    second = translated(first, tmp_path / "second", "--dialect", there)
    ours, theirs = numbers(first), numbers(second)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if "nvfp4" in method:
            np.testing.assert_allclose(theirs[name], tensor, rtol=3e-7)
        else:
            np.testing.assert_array_equal(theirs[name], tensor)
    third = translated(second, tmp_path / "third", "--dialect", here)
    a, b = (load_file(path / "model.safetensors") for path in (first, third))
    assert set(a) == set(b)
    for name, tensor in a.items():
        if not name.endswith(("scale", "scale_2")):
            assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
        else:
            torch.testing.assert_close(b[name].float(), tensor.float(), rtol=3e-7, atol=0)
    assert read_manifest(second).source["quantization"]["translated from"] == here


def test_what_the_other_dialect_has_no_word_for_is_refused_by_name(tmp_path: Path) -> None:
    awq, smooth = made("int4_awq", "modelopt", tmp_path), made("int8_sq", CT, tmp_path)
    assert "attn.o.weight has a pre_scale" in refused(awq, tmp_path, "--dialect", CT).replace(
        "self_attn.o_proj", "attn.o"
    )
    assert "has no input_scale in compressed-tensors" in refused(smooth, tmp_path, "--dialect", "modelopt")
    assert "is not written by --to trtllm" in refused(smooth, tmp_path, "--dialect", CT, to="trtllm", code=2)
    assert "is not quantized" in refused(SOURCE, tmp_path, "--dialect", CT, code=2)


def test_scales_of_the_kv_cache_stand_with_the_attention(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    made_here = command(
        "convert", SOURCE, "--to", "hf", "-o", stats, "--quantize", "fp8", "--kv-cache", "fp8", "--calib",
        SOURCE / "tokens.npz",
    )  # fmt: skip
    assert made_here.exit_code == 0, made_here.output
    out = translated(stats, tmp_path / "out", "--dialect", CT)
    found, base = load_file(out / "model.safetensors"), load_file(stats / "model.safetensors")
    for letter in "kv":
        theirs = base[f"model.layers.0.self_attn.{letter}_proj.{letter}_scale"]
        assert torch.equal(found[f"model.layers.0.self_attn.{letter}_scale"], theirs.reshape(1))
    said = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (said["num_bits"], said["type"], said["strategy"], said["dynamic"]) == (8, "float", "tensor", False)
    assert stored(translated(out, tmp_path / "back", "--dialect", "modelopt")) == stored(stats)


def test_it_is_undone_only_when_asked(tmp_path: Path) -> None:
    path = made("int4", CT, tmp_path)
    asked = ("--quantize", "int8")
    assert "is quantized already (int4_awq)" in refused(path, tmp_path, *asked)
    out, before = translated(path, tmp_path / "out", *asked, "--requantize"), numbers(path)
    assert read_manifest(out).source["quantization"]["undone"] is True
    for name, after in numbers(out).items():
        assert np.linalg.norm(after - before[name]) < 0.012 * np.linalg.norm(before[name])


def deepseek(at: Path) -> Path:
    """What DeepSeek-V3's originals say: blocks of 128 x 128, `weight_scale_inv` in float32."""
    path = made("fp8_block", "modelopt", at)
    (path / "manifest.json").unlink()
    (path / "hf_quant_config.json").unlink()
    tensors = {
        name.replace("weight_scale", "weight_scale_inv"): tensor.reshape(tensor.shape[0], tensor.shape[2])
        if name.endswith("weight_scale")
        else tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_blocks_as_deepseek_stores_them(tmp_path: Path) -> None:
    path = deepseek(tmp_path)
    out = translated(path, tmp_path / "out")
    assert stored(out) == stored(path)
    ours, theirs = (json.loads((each / "config.json").read_text())["quantization_config"] for each in (out, path))
    assert ours == theirs
    given = load_file(path / "model.safetensors")
    whole = given[f"{Q}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    np.testing.assert_array_equal(numbers(path)["layers.0.attn.q.weight"], given[f"{Q}.weight"].float() * whole)
    assert "is quantized already (fp8_block)" in refused(path, tmp_path, "--quantize", "int8")
    assert translated(path, tmp_path / "int8", "--quantize", "int8", "--requantize")
    for dialect in ("modelopt", CT):
        other = translated(path, tmp_path / dialect, "--dialect", dialect)
        np.testing.assert_array_equal(numbers(other)["layers.0.attn.q.weight"], given[f"{Q}.weight"].float() * whole)


Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def _without(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[name]


def _scale_in_int8(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].to(torch.int8)


def _other_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_shape"][0] += 1


def _asymmetric(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False


def _listed(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["ignore"].append("re:.*q_proj$")


BAD: dict[str, tuple[Edit, str]] = {
    "no scale": (partial(_without, f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "no shape": (partial(_without, f"{Q}.weight_shape"), f"{Q}.weight_shape is missing"),
    "no words": (partial(_without, f"{Q}.weight_packed"), "have no weight quantized"),
    "scale of another dtype": (_scale_in_int8, "bfloat16 or float16 or float32 [256, 2] needed"),
    "another shape": (_other_shape, "says [257, 256], and the weight has [256, 256]"),
    "a scheme that is not read": (_asymmetric, "reads one symmetric scheme"),
    "ignored and quantized": (_listed, "q_proj is, though it is excluded there"),
}


@pytest.mark.parametrize("edit, said", BAD.values(), ids=BAD)
def test_bad_input_is_a_sentence(edit: Edit, said: str, tmp_path: Path) -> None:
    path = shutil.copytree(made("int4", CT, tmp_path), tmp_path / "changed")
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    result = command("convert", path, "--to", "hf", "-o", tmp_path / "out")
    assert result.exit_code in (3, 5), result.output
    assert said in sentence(result.stderr)
    assert not (tmp_path / "out").exists()
