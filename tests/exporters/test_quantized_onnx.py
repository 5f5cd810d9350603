"""Quantized graphs: the numbers are those that were rounded, ONNX Runtime keeps them packed, and it answers what the
reference answers on the dequantized weights."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from families.models import models
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from nemoport import calibration, plugins, reference
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters import convert, stream
from nemoport.exporters.dequantized import QUANTIZERS, all_dequantized, dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.job import Job
from nemoport.exporters.methods import rows
from nemoport.exporters.targets.onnx.latent import WHOLE
from nemoport.exporters.targets.onnx.packed import Blocked, Flipped, Repeated, along_inputs, along_rows
from nemoport.exporters.targets.onnx.quantized import LAYOUTS
from nemoport.exporters.tensor import Held, LazyTensor, read
from nemoport.exporters.words import spec_of, words_of
from nemoport.spec import Mixture, ModelSpec, Plan, Recipe, tensors
from nemoport.validation import weights

from . import made
from .commands import command, sentence
from .dynamic import products
from .quantizing import WIDE, statistics_for

Array = NDArray[Any]

DEMO = Path(__file__).parents[2] / "examples/demo"
METHODS = tuple(row.method for row in rows() if row.dialect == "onnx" and row.loads)
PROFILES = ("portable", "ort")
WRITTEN = [
    (method, profile)
    for method in METHODS
    for profile in PROFILES
    if (plugins.load(QUANTIZERS, method).encoding(None).method, profile) in LAYOUTS
]
UNROUNDED = [each for each in WRITTEN if each[0] != "int8_dynamic"]
"""What can be asked to leave its inputs as they are."""
OWN_ROUNDING = "session.qdq_matmulnbits_accuracy_level"
"""1 where the input is not to be rounded to INT8."""
SIZES = {
    "hidden_size": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "intermediate": 48,
    "expert_intermediate": 32,
    "shared_intermediate": 32,
    "q_rank": 32,
    "kv_rank": 16,
    "nope_dims": 16,
    "rope_dims": 16,
    "v_dims": 32,
    "ssm_heads": 4,
    "ssm_head_dim": 16,
    "ssm_groups": 2,
    "ssm_state_dims": 8,
}
KINDS = ("mixtral", "gpt_oss", "deepseek", "nemotron_h", "phi3")


def spec_with(family: str) -> ModelSpec:
    """The plain model of a family, in sizes that groups of 16 divide."""
    said = words_of(next(iter(models(family, "huggingface").values())))
    sizes = {word: size for word, size in SIZES.items() if said.get(word) is not None}
    return spec_of(family, {**said, **sizes})


SPECS = {"llama": WIDE, **{family: spec_with(family) for family in KINDS}}


def normal(spec: ModelSpec) -> dict[str, LazyTensor]:
    random, found = np.random.default_rng(8), dict[str, LazyTensor]()
    for name, tensor in tensors(spec).items():
        numbers = random.standard_normal(tensor.shape) / (8 if len(tensor.shape) == 2 else 4)
        centre = name.endswith("norm.weight") and not spec.norm.zero_centered
        found[name] = Held((numbers + centre).astype(bfloat16), "bfloat16")
    return found


def job(spec: ModelSpec, at: Path, method: str, profile: Any, group: int | None = None, **recipe: Any) -> Job:
    path = at / "model"
    if not path.exists():
        made.save_huggingface(path, spec, normal(spec))
    found = None
    if method == "int4_awq":
        found = calibration.from_statistics(statistics_for(spec, at / "statistics.npz"))
    plan = Plan(recipe=Recipe(method=method, group=group, **recipe), profile=profile, dtype="float32")
    return convert.plan(path, "onnx", at / f"{method}-{profile}", plan=plan, calibration=found)


def written(job: Job) -> Path:
    stream.run(replace(job, workers=2))
    return job.destination / "model.onnx"


def unrounded(path: Path) -> onnxruntime.InferenceSession:
    """A session that rounds no input."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, path.with_name("unrounded.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry(OWN_ROUNDING, "1")
    return onnxruntime.InferenceSession(path.with_name("unrounded.onnx"), options)


def inputs(session: onnxruntime.InferenceSession, ids: Array) -> dict[str, Array]:
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
    }
    for each in session.get_inputs():
        if each.name not in given:
            shape = [{"batch": len(ids), "past": 0}.get(axis, axis) for axis in each.shape]
            given[each.name] = np.zeros(shape, np.float32)
    return given


def logits(session: onnxruntime.InferenceSession, ids: Array) -> Array:
    answer: Array = session.run(["logits"], inputs(session, ids))[0]
    return answer


@pytest.mark.parametrize("method, profile", UNROUNDED)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_graph_answers_as_the_reference_on_the_dequantized_weights(
    spec: ModelSpec, method: str, profile: str, tmp_path: Path
) -> None:
    if method == "int4_awq" and spec is not WIDE:
        return  # groups of 128 only
    planned = job(spec, tmp_path, method, profile, 16 if method == "int4" else None)
    path = written(planned)
    onnx.checker.check_model(path, full_check=True)
    ids: Array = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 7))
    truth = reference.logits(spec, all_dequantized(planned.model.tensors), ids)
    found = logits(unrounded(path), ids)
    np.testing.assert_allclose(found, truth, rtol=0, atol=3e-5 * np.abs(truth).max())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dynamic_linears_round_every_token_by_itself(spec: ModelSpec, tmp_path: Path) -> None:
    exclude: tuple[str, ...] = ()
    if any(isinstance(block.ffn, Mixture) for block in spec.blocks):
        with pytest.raises(UnsupportedInput, match="of an expert, which may see no token"):
            job(spec, tmp_path, "int8_dynamic", "portable")
        exclude = ("*.experts.*",)
    planned = job(spec, tmp_path, "int8_dynamic", "portable", exclude=exclude)
    path = written(planned)
    onnx.checker.check_model(path, full_check=True)
    given = inputs(onnxruntime.InferenceSession(path), np.random.default_rng(1).integers(0, spec.vocab_size, (2, 7)))
    for product in (found := list(products(path, given))):
        np.testing.assert_allclose(product.y, product.wanted, rtol=0, atol=1e-5 * np.abs(product.wanted).max())
    quantized = {name for name, tensor in planned.model.tensors.items() if isinstance(tensor, Encoded)}
    assert {f"{product.linear}.weight" for product in found} == {name for name in quantized if not name.endswith(WHOLE)}


@pytest.mark.parametrize("method, profile", WRITTEN)
def test_the_weights_read_back_are_those_that_were_rounded(method: str, profile: str, tmp_path: Path) -> None:
    planned = job(WIDE, tmp_path, method, profile)
    held = weights.of_graph(written(planned), WIDE)
    assert sum(isinstance(share.tensor, Encoded) for share in held) == 7
    assert weights.differences(replace(planned.model, tensors=_float32(planned.model.tensors)), held) == ()


def _float32(model: Any) -> dict[str, LazyTensor]:
    """As the graph holds them: pre-scales and plain tensors are widened."""
    found = {}
    for name, tensor in model.items():
        if isinstance(tensor, Encoded) and "pre_scale" in tensor.fields:
            wide = Held(read(tensor.fields["pre_scale"]).astype(np.float32), "float32")
            tensor = replace(tensor, fields={**tensor.fields, "pre_scale": wide})
        found[name] = tensor
    return found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_a_changed_number_or_scale_is_seen(method: str, profile: str, tmp_path: Path) -> None:
    planned = job(WIDE, tmp_path, method, profile)
    path = written(planned)
    places = {each.name: each.external_data for each in onnx.load(path, load_external_data=False).graph.initializer}
    for name in ("layers.0.ffn.up.weight", "layers.0.ffn.up.scale"):
        offset = int(next(entry.value for entry in places[name] if entry.key == "offset"))
        data = path.with_name("model.onnx.data")
        content = bytearray(data.read_bytes())
        content[offset] ^= 1
        data.write_bytes(content)
        assert [text.split()[0] for text in differences(planned, path)] == ["layers.0.ffn.up.weight"]
        content[offset] ^= 1
        data.write_bytes(content)


def differences(planned: Job, path: Path) -> tuple[str, ...]:
    try:
        return weights.differences(planned.model, weights.of_graph(path, WIDE))
    except DamagedInput as error:  # a row whose blocks have different scales is no row of int8
        return (str(error),)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_onnxruntime_keeps_the_numbers_packed(method: str, profile: str, tmp_path: Path) -> None:
    """What it has made of the graph when it is loaded: no operator is left that would widen a weight."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(written(job(WIDE, tmp_path, method, profile)), options)
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in loaded.node]
    assert kinds.count("MatMulNBits") == 7
    assert "DequantizeLinear" not in kinds


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_packed_as_onnxruntimes_own_quantizer_packs_them(bits: int, tmp_path: Path) -> None:
    """Of weights that are multiples of their scales, with the lowest number in each block, both find the same."""
    block, least = 32, -(2 ** (bits - 1))
    random = np.random.default_rng(3)
    numbers = random.integers(least, -least, (24, 4 * block)).astype(np.int8)
    numbers[:, ::block] = least
    scale = 2.0 ** random.integers(-6, 0, (24, 4)).astype(np.float32)
    scale = scale if bits == 4 else np.repeat(scale[:, :1], 4, axis=1)
    w = numbers * np.repeat(scale, block, axis=1)
    judge = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    theirs, found = np.zeros((24, 4, block * bits // 8), np.uint8), np.zeros((24, 4), np.float32)
    zero_points = np.zeros((24, 4 * bits // 8), np.uint8)
    judge(theirs, np.ascontiguousarray(w.T), found.reshape(-1), zero_points.reshape(-1), block, 24, 4 * block, True)
    if bits == 4:
        nibbles = numbers.view(np.uint8) & 15
        pairs = Held(nibbles[0::2] | nibbles[1::2] << 4, "uint8")
        ours: LazyTensor = Blocked(Flipped(along_inputs(pairs), 0x88, "uint8"), block // 2)
    else:
        ours = Blocked(Flipped(Held(numbers.view(np.uint8), "uint8"), 0x80, "uint8"), block)
    np.testing.assert_array_equal(read(ours), theirs)
    np.testing.assert_array_equal(scale, found)


BYTES = np.random.default_rng(4).integers(0, 256, (6, 20), dtype=np.uint8)
TURNED: dict[str, Callable[[LazyTensor], LazyTensor]] = {
    "along inputs": along_inputs,
    "along rows": along_rows,
    "along inputs, along rows": lambda each: along_rows(along_inputs(each)),
    "flipped": lambda each: Flipped(each, 0x88, "uint8"),
    "blocks": lambda each: Blocked(each, 5),
    "blocks of nibbles": lambda each: Blocked(along_inputs(each), 5),
}


@pytest.mark.parametrize("turned", TURNED.values(), ids=TURNED)
def test_any_box_of_packed_numbers_is_that_box_of_them(turned: Callable[[LazyTensor], LazyTensor]) -> None:
    whole, random = read(turned(Held(BYTES, "uint8"))), np.random.default_rng(5)
    for _ in range(60):
        spans = [tuple(sorted(random.choice(size + 1, 2, replace=False))) for size in whole.shape]
        if whole.ndim == 3 and spans[2] != (0, 5):
            spans[1] = (spans[1][0], spans[1][0] + 1)  # part of a block is cut from one
        found = read(turned(Held(BYTES, "uint8")).cut(tuple(spans)))
        np.testing.assert_array_equal(found, whole[tuple(slice(*span) for span in spans)])
    np.testing.assert_array_equal(read(along_rows(along_inputs(Held(BYTES, "uint8")))), BYTES)


def test_a_repeated_scale_is_that_of_its_row() -> None:
    scale = np.arange(7, dtype=np.float32)
    found = Repeated(Held(scale, "float32"), 5).cut(((2, 6), (1, 4)))
    np.testing.assert_array_equal(read(found), np.repeat(scale[2:6, None], 3, axis=1))


def held_out() -> Array:
    """Rows of fables that the model was not trained on, `<s>` before each; its ids are bytes."""
    told = runpy.run_path(str(DEMO / "text.py"))["tell_fables"](8, seed=4321)
    return np.array([[256, *fable.encode()[:150]] for fable in told], np.int64)


@pytest.mark.parametrize(
    ("method", "group", "most", "agree", "profile"),
    [
        *(("int4", 32, 0.05, 0.9, profile) for profile in PROFILES),
        *(("int8", None, 0.01, 0.97, profile) for profile in PROFILES),
        ("int8_dynamic", None, 0.01, 0.97, "portable"),
    ],
)
def test_a_trained_model_answers_nearly_as_before(
    method: str, group: int | None, most: float, agree: float, profile: Any, tmp_path: Path
) -> None:
    """As it is served: inputs rounded too."""
    recipe = Recipe(method=method, group=group)
    plan = Plan(recipe=recipe, profile=profile, dtype="float32")
    planned = convert.plan(DEMO / "checkpoint", "onnx", tmp_path / "made", plan=plan)
    plain = convert.plan(DEMO / "checkpoint", "onnx", tmp_path / "plain", plan=Plan(dtype="float32"))
    ids = held_out()
    ours, theirs = (_log_softmax(logits(onnxruntime.InferenceSession(written(each)), ids)) for each in (planned, plain))
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() <= most
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= agree


def _log_softmax(x: Array) -> Array:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    shares: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return shares


def test_a_checkpoint_that_is_quantized_already_keeps_its_numbers(tmp_path: Path) -> None:
    made.save_huggingface(tmp_path / "model", WIDE, normal(WIDE))
    recipe = Recipe(method="int4")
    first = convert.plan(tmp_path / "model", "hf", tmp_path / "hf", plan=Plan(recipe=recipe))
    stream.run(first)
    then = convert.plan(tmp_path / "hf", "onnx", tmp_path / "onnx", plan=Plan(dtype="float32"))
    held = {share.name: share.tensor for share in weights.of_graph(written(then), WIDE)}
    for name, tensor in first.model.tensors.items():
        if isinstance(tensor, Encoded):
            np.testing.assert_array_equal(read(dequantized(tensor)), read(dequantized(held[name])))


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "fp8": (("--quantize", "fp8", "--calib-stats", "STATS"), 3, "widen every weight anew"),
    "fp8 dynamic": (("--quantize", "fp8_dynamic"), 3, "widen every weight anew"),
    "nvfp4": (("--quantize", "nvfp4"), 3, "4-bit floats"),
    "a cache": (("--quantize", "int8", "--kv-cache", "fp8"), 3, "--kv-cache fp8 is not written by --to onnx"),
    "nothing to put in its operators": (("--profile", "ort"), 2, "differs in quantized linears only"),
    "a group that divides nothing": (("--quantize", "int4", "--group", "48"), 2, "use 128, 64, 32, 16"),
    "a group of a method that has none": (("--quantize", "int8", "--group", "32"), 2, "leave --group out"),
    "operators for what has none": (("--quantize", "int8_dynamic", "--profile", "ort"), 2, "leave --profile ort out"),
    "integers in 16 bits": (("--quantize", "int8_dynamic", "--dtype", "float16"), 2, "use --dtype float32"),
    "a group without a method": (("--group", "32"), 2, "go with --quantize"),
}


@pytest.mark.parametrize(("flags", "code", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_say_is_a_sentence(flags: Sequence[str], code: int, said: str, tmp_path: Path) -> None:
    stats = statistics_for(WIDE, tmp_path / "statistics.npz")
    path = made.save_huggingface(tmp_path / "model", WIDE, normal(WIDE))
    given = [stats if flag == "STATS" else flag for flag in flags]
    result = command("convert", path, "--to", "onnx", "--dtype", "float32", "-o", tmp_path / "out", *given)
    assert result.exit_code == code, result.output
    assert said in sentence(result.stderr)


def test_a_profile_is_of_onnx_and_a_narrow_input_is_named(tmp_path: Path) -> None:
    narrow = spec_of("llama", {**words_of(WIDE), "intermediate": 40})
    path = made.save_huggingface(tmp_path / "model", narrow, normal(narrow))
    flags = ("--quantize", "int8", "--profile", "ort", "-o", tmp_path / "out")
    for to, code, said in (("hf", 2, "is of ONNX graphs"), ("onnx", 3, "ffn.down.weight has 40 inputs")):
        result = command("convert", path, "--to", to, *flags)
        assert result.exit_code == code
        assert said in sentence(result.stderr)


@pytest.mark.parametrize("inputs, said", [(40, "or use int8"), (96, "or use --group 32, 16")])
def test_groups_that_would_divide_are_named(inputs: int, said: str, tmp_path: Path) -> None:
    narrow = spec_of("llama", {**words_of(WIDE), "intermediate": inputs})
    path = made.save_huggingface(tmp_path / "model", narrow, normal(narrow))
    result = command("convert", path, "--to", "onnx", "--quantize", "int4", "-o", tmp_path / "out")
    assert said in sentence(result.stderr)


def test_the_manifest_says_how_the_graph_was_quantized(tmp_path: Path) -> None:
    written(job(WIDE, tmp_path, "int4", "ort", 32))
    plan = json.loads((tmp_path / "int4-ort/manifest.json").read_text())["plan"]
    assert (plan["recipe"]["method"], plan["recipe"]["group"], plan["profile"]) == ("int4", 32, "ort")
