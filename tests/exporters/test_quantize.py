"""Quantization: the numbers are ModelOpt's where it has the same method, and do not depend on how a model is cut."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemoport import reference
from nemoport.artifact import read_manifest
from nemoport.exporters import contract, convert, source, statistics, stream
from nemoport.exporters.dequantized import all_dequantized, dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.methods import rows
from nemoport.exporters.tensor import cut, read
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Plan, Recipe, Rope

from . import made
from .commands import artifact_of, command, contents, sentence
from .fixtures import LLAMA
from .modelopt import SPEC, save
from .quantizing import EXPORTS, JUDGE, METHODS, WIDE, digest, digests, digests_of, normal, quantized, statistics_for

TO_TRTLLM = tuple(row.method for row in rows() if row.dialect == "trtllm" and row.loads)
ZERO_CENTRED = ModelSpec(
    family="nemotron",
    vocab_size=131,
    hidden_size=128,
    max_positions=64,
    norm=Norm(kind="layer", zero_centered=True),
    head=LanguageModel(),
    blocks=(
        Block(
            mixer=Attention(heads=4, kv_heads=2, head_dim=32, rope=Rope(dims=16)),
            ffn=Dense(intermediate=256, activation="relu2", gated=False),
        ),
    ),
)
FUSED = replace(SPEC, family="phi3", blocks=SPEC.blocks[:1])
WHOLE_BLOCKS = replace(
    FUSED,
    blocks=(replace(FUSED.blocks[0], mixer=Attention(heads=2, kv_heads=1, head_dim=128, rope=Rope(dims=128))),),
)
"""A head is a block of 128 rows."""
OF_METHODS = [name.removeprefix("hf ") for name in EXPORTS if re.fullmatch(r"hf \w+", name)]
every_method = pytest.mark.parametrize("method", METHODS)
CACHE_NAMES = {
    "modelopt": "model.layers.0.self_attn.{0}_proj.{0}_scale",
    "compressed-tensors": "model.layers.0.self_attn.{0}_scale",
}
"""Of the scales of a cache. ModelOpt's is this whatever linears there are: `postprocess_state_dict` in
modelopt/torch/export/quant_utils.py renames what the attention has."""


@pytest.mark.parametrize("method", OF_METHODS)
def test_hf_equals_modelopts_export_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Given the same activations: every code, scale, pre-scale and folded norm."""
    out = quantized(JUDGE, "hf", tmp_path / "out", method, stats=JUDGE / "statistics.npz")
    wanted = EXPORTS[f"hf {method}"]
    assert digests(out / "model.safetensors") == digests_of(wanted["tensors"])
    said = json.loads((out / "hf_quant_config.json").read_text())
    assert said.pop("written_by").startswith("nemoport")
    assert said == wanted["hf_quant_config.json"]
    assert json.loads((out / "config.json").read_text())["quantization_config"] == wanted["quantization_config"]


@pytest.mark.parametrize("method", OF_METHODS)
def test_the_numbers_are_those_that_modelopt_unpacks(method: str, tmp_path: Path) -> None:
    model = source.model(quantized(JUDGE, "hf", tmp_path / "out", method, stats=JUDGE / "statistics.npz"))
    wanted, seen = EXPORTS[f"hf {method}"]["unpacked"], 0
    for name, stored in model.sources.items():
        if (theirs := wanted.get(stored[0].removesuffix(".weight"))) is not None:
            numbers = torch.from_numpy(read(dequantized(model.tensors[name])))
            assert digest(numbers + 0) == theirs, name  # a zero below zero is zero
            seen += 1
    assert seen == len(wanted) == 7


@pytest.mark.parametrize("method", [name.split()[1] for name in EXPORTS if re.fullmatch(r"trtllm \w+", name)])
def test_ranks_equal_modelopts_export_bit_for_bit(method: str, tmp_path: Path) -> None:
    wanted = EXPORTS[f"trtllm {method}"]
    out = quantized(JUDGE, "trtllm", tmp_path / "out", method, stats=JUDGE / "statistics.npz", tp=wanted["tp"])
    for rank, theirs in enumerate(wanted["ranks"]):
        ours = digests(out / f"rank{rank}.safetensors")
        assert set(ours) == set(theirs)
        ends = ("transformer.vocab_embedding.weight", "lm_head.weight")  # cut and padded by ModelOpt's own choice
        assert {name: row for name, row in ours.items() if name not in ends} == {
            name: row for name, row in digests_of(theirs).items() if name not in ends
        }
    said = json.loads((out / "config.json").read_text())["quantization"]
    assert {key: said[key] for key in wanted["quantization"]} == wanted["quantization"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and statistics of it."""
    at = tmp_path_factory.mktemp("wide")
    path = made.save_huggingface(at / "model", WIDE, normal(WIDE))
    return path, statistics_for(WIDE, at / "statistics.npz")


def whole(ranks: list[dict[str, Tensor]], name: str) -> Tensor:
    """A tensor of rank files put together again."""
    parts = [rank[name].view(torch.uint8) if rank[name].element_size() == 1 else rank[name] for rank in ranks]
    field = name.rpartition(".")[2]
    by_input = re.search(r"\.(dense|proj)\.", name) is not None
    if parts[0].numel() == 1 or "norm" in name or "ln_f" in name or "vocab_embedding" in name:
        axis = None
    elif field == "prequant_scaling_factor":
        axis = 0 if by_input else None
    elif by_input:
        axis = 1 if parts[0].dim() == 2 else None
    else:
        axis = 0
    if axis is None:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    if ".qkv." in name:
        rows = [torch.tensor_split(part, [len(part) // 2, len(part) * 3 // 4]) for part in parts]
        return torch.cat([rank[index] for index in range(3) for rank in rows])
    return torch.cat(parts, axis)


@pytest.mark.parametrize("method", TO_TRTLLM)
def test_the_result_does_not_depend_on_tp(method: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    path, stats = wide

    def ranks_of(tp: int) -> list[dict[str, Tensor]]:
        out = quantized(path, "trtllm", tmp_path / str(tp), method, stats=stats, tp=tp, kv_cache="fp8")
        return [load_file(out / f"rank{rank}.safetensors") for rank in range(tp)]

    (one,) = ranks_of(1)
    assert one["transformer.layers.0.attention.kv_cache_scaling_factor"] == torch.tensor([900.0]) / 448
    for tp in (2, 4):
        ranks = ranks_of(tp)
        for name, tensor in one.items():
            found, wanted = whole(ranks, name), tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            assert torch.equal(found[: len(wanted)] if name == "lm_head.weight" else found, wanted), name


@every_method
def test_the_bytes_do_not_depend_on_workers_or_blocks(
    method: str, wide: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stats = wide
    one = quantized(path, "hf", tmp_path / "one", method, stats=stats, workers=1)
    monkeypatch.setattr(stream, "BLOCK", 4096)
    monkeypatch.setattr("nemoport.exporters.computed._TILE", 1000)
    many = quantized(path, "hf", tmp_path / "many", method, stats=stats, workers=4)
    assert contents(one, "manifest.json") == contents(many, "manifest.json")
    artifact_of(many)


@every_method
def test_any_box_of_a_quantized_weight_is_that_box_of_it(method: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    path, stats = wide
    model = source.model(quantized(path, "hf", tmp_path / "out", method, stats=stats))
    tensor = dequantized(model.tensors["layers.0.ffn.down.weight"])
    box = cut(cut(tensor, 0, 3, 201), 1, 17, 300)
    np.testing.assert_array_equal(read(box), read(tensor)[3:201, 17:300])


APART = {
    "fp8": 0.03,
    "fp8_block": 0.03,
    "fp8_dynamic": 0.03,
    "int8": 0.012,
    "int8_sq": 0.03,
    "int4": 0.12,
    "int4_awq": 0.2,
    "nvfp4": 0.11,
    "nvfp4_weights": 0.11,
}
"""||x (w' - w)|| / ||x w|| that a method may cost a weight of normal numbers, where x is the size of each input; a
wrong scale or order costs more than 0.5."""


@pytest.mark.parametrize("to", ["hf", "trtllm"])
@every_method
def test_what_is_stored_stands_for_the_weights(method: str, to: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    """Read back by the readers of quantized checkpoints; norms that took a pre-scale give it back."""
    from nemoport.validation import quantized_ranks

    path, stats = wide
    if to == "trtllm" and method not in TO_TRTLLM:
        return
    out, base = quantized(path, to, tmp_path / "out", method, stats=stats), source.model(path)
    activations, _ = statistics.read(stats)
    found = source.model(out).tensors if to == "hf" else quantized_ranks.read(out, None).ranks[0]
    plain, seen = all_dequantized(found), 0
    for name, tensor in found.items():
        if isinstance(tensor, Encoded):
            norm = {"attn.q": "attn_norm", "attn.k": "attn_norm", "attn.v": "attn_norm"}.get(name[9:-7], "ffn_norm")
            after, before = (read(of[f"layers.0.{norm}.weight"]).astype(np.float32) for of in (found, base.tensors))
            folded = np.ones(1, np.float32) if name[9:-7] in ("attn.o", "ffn.down") else after / before
            ours, theirs = (read(of[name]).astype(np.float32) for of in (plain, base.tensors))
            ours *= folded
            sizes = activations.of(name.removesuffix(".weight"), "amax")
            assert np.linalg.norm((ours - theirs) * sizes) < APART[method] * np.linalg.norm(theirs * sizes), name
            seen += 1
    assert seen == 7


def test_folding_respects_norms_that_are_zero_centred_and_have_a_bias(tmp_path: Path) -> None:
    """Nemotron's: what the norm gives, times the pre-scale, is what the new norm gives."""
    path = made.save_huggingface(tmp_path / "model", ZERO_CENTRED, normal(ZERO_CENTRED))
    stats = statistics_for(ZERO_CENTRED, tmp_path / "statistics.npz")
    base = load_file(path / "model.safetensors")
    folded = load_file(quantized(path, "hf", tmp_path / "hf", "int4_awq", stats=stats) / "model.safetensors")
    beside = load_file(quantized(path, "trtllm", tmp_path / "ranks", "int4_awq", stats=stats) / "rank0.safetensors")
    for norm, linear in (("input_layernorm", "attention.qkv"), ("post_attention_layernorm", "mlp.fc")):
        pre_scale = beside[f"transformer.layers.0.{linear}.prequant_scaling_factor"].float()
        weight, bias = (f"model.layers.0.{norm}.{kind}" for kind in ("weight", "bias"))
        assert torch.equal(folded[weight], ((base[weight].float() + 1) * pre_scale - 1).bfloat16())
        assert torch.equal(folded[bias], (base[bias].float() * pre_scale).bfloat16())
        assert pre_scale.max() > 2 * pre_scale.min()


def test_linears_that_a_format_fuses_have_one_scale(tmp_path: Path) -> None:
    """Phi-3's q, k and v are one matrix in Hugging Face's names."""
    path = made.save_huggingface(tmp_path / "model", FUSED, normal(FUSED))
    stats = statistics_for(FUSED, tmp_path / "statistics.npz")
    base, out = load_file(path / "model.safetensors"), quantized(path, "hf", tmp_path / "out", "fp8", stats=stats)
    found = load_file(out / "model.safetensors")
    for linear in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        name = f"model.layers.0.{linear}"
        assert found[f"{name}.weight_scale"] == base[f"{name}.weight"].abs().max().float() / 448


@pytest.mark.parametrize(
    ("method", "dialect"), [(row.method, row.dialect) for row in rows() if row.dialect in CACHE_NAMES and row.loads]
)
def test_what_is_fused_has_the_scales_of_its_cache(method: str, dialect: str, tmp_path: Path) -> None:
    """Phi-3 has no k_proj. They are written, known to loaders, and read back."""
    path = made.save_huggingface(tmp_path / "model", WHOLE_BLOCKS, normal(WHOLE_BLOCKS))
    stats = statistics_for(WHOLE_BLOCKS, tmp_path / "statistics.npz")
    out = quantized(path, "hf", tmp_path / "out", method, stats=stats, kv_cache="fp8", dialect=dialect)
    found = load_file(out / "model.safetensors")
    scales = {name: float(tensor) for name, tensor in found.items() if name.endswith(("k_scale", "v_scale"))}
    wanted = {"k": np.float32(700) / np.float32(448), "v": np.float32(900) / np.float32(448)}
    assert scales == {CACHE_NAMES[dialect].format(last): scale for last, scale in wanted.items()}
    assert contract.breaches(out) == ()
    stream.run(convert.plan(out, "hf", tmp_path / "again", plan=Plan()))
    assert contents(tmp_path / "again")["model.safetensors"] == contents(out)["model.safetensors"]


def test_text_and_ids_of_the_same_tokens_calibrate_alike(tmp_path: Path) -> None:
    fixture = LLAMA["nemo2"]
    text = "The quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    from tokenizers import Tokenizer

    (stored,) = fixture.path.rglob("tokenizer.json")
    ids = Tokenizer.from_file(str(stored)).encode(text, add_special_tokens=False).ids
    np.savez(tmp_path / "ids.npz", tokens=np.array(ids[: len(ids) // 24 * 24]).reshape(-1, 24))
    outs = [tmp_path / name for name in ("text", "jsonl", "npz")]
    for out, file in zip(outs, ("text.txt", "text.jsonl", "ids.npz"), strict=True):
        result = command(
            "convert", fixture.path, "--to", "hf", "-o", out, "--quantize", "fp8", "--calib", tmp_path / file,
            "--calib-length", 24,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    first, *others = (contents(out) for out in outs)
    assert all(other == first for other in others)
    assert read_manifest(outs[0]).plan.recipe == Recipe(method="fp8", calibration=_digest(outs[0]))
    again = command(
        "convert", fixture.path, "--to", "hf", "-o", tmp_path / "again", "--quantize", "fp8", "--calib-stats", outs[0]
    )
    assert again.exit_code == 0, again.output
    assert contents(tmp_path / "again")["model.safetensors"] == first["model.safetensors"]
    assert (tmp_path / "again" / "calibration.npz").read_bytes() == first["calibration.npz"]


def _digest(out: Path) -> str:
    found, _ = statistics.read(out)
    digest_of_tokens: str = found.said["tokens"]
    return digest_of_tokens


@pytest.mark.parametrize("to", ["hf", "trtllm"])
@pytest.mark.parametrize("method", [row.method for row in rows() if row.dialect == "trtllm" and row.needs])
def test_a_dry_run_calibrates_nothing(method: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "layer_by_layer", None)
    result = command(
        "convert", JUDGE, "--to", to, "-o", tmp_path / "out", "--quantize", method, "--kv-cache", "fp8", "--calib",
        JUDGE / "tokens.npz", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(rf"{method} \(\w+\), KV cache FP8, calibrated", result.output)


def test_what_is_excluded_stays_as_it_is(tmp_path: Path) -> None:
    base = load_file(JUDGE / "model.safetensors")
    out = quantized(JUDGE, "hf", tmp_path / "out", "int8", exclude=("*.mlp.*", "layers.0.attn.o"))
    found = load_file(out / "model.safetensors")
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    for linear in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
        assert torch.equal(found[f"model.layers.0.{linear}.weight"], base[f"model.layers.0.{linear}.weight"])
    excluded = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"lm_head", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.o_proj"} <= set(excluded)
    source.model(out)  # which holds the description against the weights


def test_a_quantized_source_is_undone_only_when_asked(tmp_path: Path) -> None:
    twin = save(tmp_path / "twin", "fp8")
    asked = ("convert", twin.path, "--to", "hf", "-o", tmp_path / "out", "--quantize", "int8")
    said = command(*asked)
    assert said.exit_code == 3
    assert "is quantized already (fp8)" in sentence(said.stderr)
    assert "say --requantize" in sentence(said.stderr)
    assert command(*asked, "--requantize").exit_code == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.plan.recipe
    assert manifest.plan.recipe.requantize
    assert (manifest.source["quantization"]["algorithm"], manifest.source["quantization"]["undone"]) == ("FP8", True)
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    done = {row["transform"] for row in ledger if row.get("target", "").endswith("q_proj.weight")}
    assert done == {"dequantize fp8 to bfloat16, quantize int8"}
    for name, tensor in source.model(tmp_path / "out").tensors.items():
        if isinstance(tensor, Encoded):
            wanted = twin.numbers[source.model(twin.path).sources[name][0]].float().numpy()
            ours = read(dequantized(tensor))
            assert np.linalg.norm(ours - wanted) < 0.012 * np.linalg.norm(wanted)
