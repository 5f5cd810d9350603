"""The ONNX target against transformers: the same weights must give the same logits, however they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Checkpoint, Model, Output
from nemoport.exporters.dtypes import words
from nemoport.exporters.rope import tables
from nemoport.exporters.targets import onnx as target
from nemoport.exporters.tensor import Held, LazyTensor, Zeros, cut, nbytes, read
from nemoport.spec import (
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Plan,
    Rope,
    tensors,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, POSITIONS = 3, 48, 6, 2, 10, 52, 131, 96
WINDOW = 5
LENGTH = 17

SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
ATTENTION = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope=Rope(dims=HEAD_DIM))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of transformers and what nemoport would say it is."""

    config: Callable[..., Any]
    words: dict[str, Any]
    attention: Attention = ATTENTION
    layers: tuple[Attention, ...] = ()
    """Where they differ."""
    ffn: Dense = Dense(intermediate=FFN)  # noqa: RUF009
    norm: Norm = Norm(eps=1e-6)  # noqa: RUF009
    tied: bool = False
    alter: Callable[[Any], None] = lambda model: None

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="test",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            max_positions=POSITIONS,
            norm=self.norm,
            head=LanguageModel(tied=self.tied),
            blocks=tuple(Block(mixer=mixer, ffn=self.ffn) for mixer in self.layers or (self.attention,) * LAYERS),
        )


class Ungated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(HIDDEN, FFN), torch.nn.Linear(FFN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(x)))
        return y


def ungate(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = Ungated()


def rope(kind: str, theta: float, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


CASES = {
    "llama": Case(config=transformers.LlamaConfig, words={"head_dim": HEAD_DIM}),
    "llama3 scaling": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, **rope("llama3", 5e5, **LLAMA3)},
        attention=replace(
            ATTENTION, rope=Rope(dims=HEAD_DIM, base=5e5, scaling=Llama3Scaling(original_max_positions=64))
        ),
    ),
    "linear scaling": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, **rope("linear", 1e4, factor=3.0)},
        attention=replace(ATTENTION, rope=Rope(dims=HEAD_DIM, scaling=LinearScaling(factor=3.0))),
    ),
    "biases, not gated": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, "attention_bias": True, "mlp_bias": True},
        attention=replace(ATTENTION, qkv_bias=True, out_bias=True),
        ffn=Dense(intermediate=FFN, gated=False, bias=True),
        alter=ungate,
    ),
    "mistral": Case(
        config=transformers.MistralConfig,
        words={"head_dim": HEAD_DIM, "sliding_window": WINDOW},
        attention=replace(ATTENTION, window=WINDOW),
    ),
    "qwen2": Case(
        config=transformers.Qwen2Config,
        words=rope("default", 1e6),
        attention=Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=Rope(dims=8, base=1e6), qkv_bias=True),
    ),
    "qwen3 tied": Case(
        config=transformers.Qwen3Config,
        words={"head_dim": HEAD_DIM, "tie_word_embeddings": True},
        attention=replace(ATTENTION, qk_norm=True),
        tied=True,
    ),
    "layers with window, without rope": Case(
        config=transformers.SmolLM3Config,
        words=rope("default", 1e4)
        | {
            "no_rope_layers": [1, 0, 1],
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
        layers=tuple(
            Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=rope, window=window)
            for rope, window in ((Rope(dims=8), WINDOW), (None, None), (Rope(dims=8), None))
        ),
    ),
    "layer norm, partial rope": Case(
        config=transformers.StableLmConfig,
        words=rope("default", 1e4, partial_rotary_factor=0.5) | {"layer_norm_eps": 1e-5},
        attention=Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=Rope(dims=4)),
        norm=Norm(kind="layer", eps=1e-5),
    ),
}

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    **{f"attn.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def hf_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    match stem.split(".", 2):
        case ["embed"]:
            return f"model.embed_tokens.{last}"
        case ["norm"]:
            return f"model.norm.{last}"
        case ["head"]:
            return f"lm_head.{last}"
        case ["layers", i, part]:
            return f"model.layers.{i}.{HF_NAMES[part]}.{last}"
    raise AssertionError(name)


def model_of(spec: ModelSpec, held: dict[str, LazyTensor]) -> Model:
    checkpoint = Checkpoint(path=Path(), format="test", writer="", naming="", config={}, tensors={})
    return Model(checkpoint=checkpoint, spec=spec, tensors=held, sources={name: (name,) for name in held})


def write(output: Output, directory: Path) -> Path:
    for file in output.files:
        with (directory / file.path).open("wb") as stream:
            stream.write(file.header)
            for slot, offset in zip(file.slots, file.offsets, strict=True):
                stream.seek(offset)
                stream.write(read(slot.tensor).tobytes())
    for path, content in output.sidecars.items():
        (directory / path).write_bytes(content)
    return directory / target.GRAPH


def run_on_cpu(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runner:
    """A graph together with its KV cache."""

    def __init__(self, path: Path, spec: ModelSpec, batch: int = 1, dtype: str = "float32") -> None:
        self.session = run_on_cpu(path)
        self.past = {
            f"past_key_values.{i}.{state.name}": np.zeros(
                (batch, *(size or 0 for size in state.shape)), "float32" if state.wide else dtype
            )
            for i, mixer in enumerate(spec.mixers)
            for state in mixer.state
        }

    def __call__(self, ids: Array, mask: Array | None = None, positions: Array | None = None) -> Array:
        past = next(iter(self.past.values())).shape[2]
        total = past + ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), total), np.int64) if mask is None else mask,
            "position_ids": np.tile(np.arange(past, total), (len(ids), 1)) if positions is None else positions,
        }
        logits, *present = self.session.run(None, given | self.past)
        assert logits.dtype == np.float32
        self.past = dict(zip(self.past, present, strict=True))
        result: Array = logits
        return result


@dataclass(frozen=True)
class Exported:
    case: Case
    model: Model
    output: Output
    path: Path
    hf: Any

    def runner(self, batch: int = 1) -> Runner:
        return Runner(self.path, self.case.spec, batch)

    def truth(self, ids: Array) -> Array:
        with torch.no_grad():
            logits: Array = self.hf(input_ids=torch.from_numpy(ids)).logits.numpy()
        return logits


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case: Case = request.param
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eps = {"rms_norm_eps": case.norm.eps} if case.norm.kind == "rms" else {}
        config = case.config(**SIZES | eps | case.words)
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    case.alter(hf)
    for name, parameter in hf.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name or "layernorm.weight" in name), std=0.2)
    hf.eval()
    state = {name: value.numpy() for name, value in hf.state_dict().items()}
    wanted = tensors(case.spec)
    assert {hf_name(name) for name in wanted} == state.keys() - ({"lm_head.weight"} if case.tied else set())
    model = model_of(case.spec, {name: Held(state[hf_name(name)], "float32") for name in wanted})
    output = target.output(model, Plan())
    return Exported(case, model, output, write(output, tmp_path_factory.mktemp("onnx")), hf)


@pytest.fixture(scope="module")
def ids() -> Array:
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH))


def test_logits_are_those_of_transformers(exported: Exported, ids: Array) -> None:
    np.testing.assert_allclose(exported.runner(2)(ids), exported.truth(ids), rtol=0, atol=1e-4)


def test_decoding_token_by_token_equals_prefill(exported: Exported, ids: Array) -> None:
    whole, step = exported.runner(2)(ids), exported.runner(2)
    steps = [step(ids[:, i : i + 1]) for i in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5)


def test_a_prompt_may_come_in_chunks(exported: Exported, ids: Array) -> None:
    whole, chunk = exported.runner(2)(ids), exported.runner(2)
    chunks = [chunk(ids[:, :6]), chunk(ids[:, 6:7]), chunk(ids[:, 7:])]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_real_rows_alone(exported: Exported, ids: Array, side: str) -> None:
    short = 9
    alone = exported.runner()(ids[1:, :short])
    real = slice(LENGTH - short, None) if side == "left" else slice(0, short)
    mask = np.ones((2, LENGTH), np.int64)
    padded = np.zeros_like(ids)
    padded[0], padded[1, real] = ids[0], ids[1, :short]
    mask[1] = 0
    mask[1, real] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits = exported.runner(2)(padded, mask, positions)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[1, real], alone[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[0], exported.runner()(ids[:1])[0], rtol=0, atol=1e-5)


def test_decoding_goes_on_after_left_padding(exported: Exported, ids: Array) -> None:
    missing = 4
    alone = exported.runner()(ids[:1, missing:])
    mask, step = np.ones((1, LENGTH), np.int64), exported.runner()
    mask[0, :missing] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    step(ids[:1, :8], mask[:, :8], positions[:, :8])
    last = [step(ids[:1, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1]) for i in range(8, LENGTH)]
    np.testing.assert_allclose(np.concatenate(last, axis=1), alone[:, 8 - missing :], rtol=0, atol=1e-5)


def test_float16_is_as_close_as_its_format(exported: Exported, ids: Array, tmp_path: Path) -> None:
    path = write(target.output(exported.model, Plan(dtype="float16")), tmp_path)
    truth = exported.truth(ids)
    logits = Runner(path, exported.case.spec, 2, "float16")(ids)
    assert np.linalg.norm(logits - truth) < 8 * 2**-11 * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graph_passes_the_checker_and_strict_shape_inference(exported: Exported, dtype: str, tmp_path: Path) -> None:
    output = target.output(exported.model, Plan(dtype=dtype))
    path = write(output, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    known = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    assert {name for node in inferred.graph.node for name in node.output} <= known.keys() | {
        value.name for value in inferred.graph.output
    }
    assert output.dtype == dtype
    cache = onnx.load(path).graph.input[3].type.tensor_type.elem_type
    assert cache == {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]


def test_graph_stays_within_what_tensorrt_takes(exported: Exported) -> None:
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    assert not {node.domain for node in graph.node} - {""}
    for node in graph.node:
        if node.op_type == "Attention":
            assert (len(node.input), len(node.output)) == (4, 1)
            assert not node.attribute
    scalars = [tensor.name for tensor in graph.initializer if tensor.name.startswith("int.")]
    assert scalars
    assert all(not tensor.dims for tensor in graph.initializer if tensor.name in scalars)


def test_signature_is_that_of_the_session(exported: Exported) -> None:
    session, signature = run_on_cpu(exported.path), exported.output.signature
    assert signature is not None
    kinds = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    for ours, theirs in ((signature.inputs, session.get_inputs()), (signature.outputs, session.get_outputs())):
        assert [(t.name, t.dtype, t.shape) for t in ours] == [(t.name, kinds[t.type], tuple(t.shape)) for t in theirs]


def test_every_canonical_tensor_is_stored_once_and_used(exported: Exported) -> None:
    (file,) = exported.output.files
    stored = [part for slot in file.slots for part in slot.parts]
    assert stored == list(tensors(exported.case.spec))
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_slots_lie_where_the_graph_says(exported: Exported) -> None:
    (file,) = exported.output.files
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    said = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    end = 0
    for slot, offset in zip(file.slots, file.offsets, strict=True):
        assert offset >= end
        assert offset % 64 == 0
        end = offset + nbytes(slot.tensor)
        assert said[slot.name] == {"location": file.path, "offset": str(offset), "length": str(nbytes(slot.tensor))}


def test_same_model_same_bytes(exported: Exported) -> None:
    again = target.output(exported.model, Plan())
    assert again.sidecars == exported.output.sidecars


def mask_of(output: Output, name: str, ids: Array, mask: Array) -> Array:
    """One mask of a graph, run alone."""
    model = onnx.load_from_string(output.sidecars[target.GRAPH])
    nodes = [node for node in model.graph.node if node.name.startswith("mask.")]
    constants = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
    result = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None)
    alone = onnx.helper.make_graph(nodes, "mask", list(model.graph.input[:2]), [result], constants)
    alone = onnx.helper.make_model(alone, ir_version=model.ir_version, opset_imports=model.opset_import)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    seen: Array = session.run([name], {"input_ids": ids, "attention_mask": mask})[0]
    return seen


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_a_query_sees_real_keys_up_to_its_own_and_never_nothing(past: int, window: int | None) -> None:
    spec = replace(
        CASES["llama"].spec, blocks=(Block(mixer=replace(ATTENTION, window=window), ffn=Dense(intermediate=4)),)
    )
    output = target.output(zeros(spec, "float32"), Plan())
    new, total = 4, past + 4
    mask = np.ones((2, total), np.int64)
    mask[0, :2], mask[1, -1:] = 0, 0
    seen = mask_of(output, "mask.causal" if window is None else f"mask.window_{window}", mask[:, past:], mask)
    assert seen.shape == (2, 1, new, total)
    for b, s, t in np.ndindex(2, new, total):
        own = past + s
        near = window is None or t > own - window
        assert seen[b, 0, s, t] == (t == own or (t < own and near and bool(mask[b, t])))


def zeros(spec: ModelSpec, dtype: str) -> Model:
    return model_of(spec, {name: Zeros(tensor.shape, dtype) for name, tensor in tensors(spec).items()})


def test_each_distinct_rope_has_its_tables() -> None:
    local = replace(ATTENTION, rope=Rope(dims=HEAD_DIM, base=1e6))
    mixers = (ATTENTION, local, replace(ATTENTION, rope=None), ATTENTION)
    blocks = tuple(Block(mixer=mixer, ffn=Dense(intermediate=FFN)) for mixer in mixers)
    output = target.output(zeros(replace(CASES["llama"].spec, blocks=blocks), "float32"), Plan())
    computed = [slot.name for slot in output.files[0].slots if not slot.parts]
    assert computed == ["rope.0.cos", "rope.0.sin", "rope.1.cos", "rope.1.sin"]
    graph = onnx.load_from_string(output.sidecars[target.GRAPH]).graph
    used = [node.input[1] for node in graph.node if node.op_type == "RotaryEmbedding"]
    assert used == ["rope.0.cos"] * 2 + ["rope.1.cos"] * 2 + ["rope.0.cos"] * 2


def test_plan_casts_and_the_ledger_says_so() -> None:
    output = target.output(zeros(CASES["llama"].spec, "float32"), Plan(dtype="float16"))
    weights = [slot for slot in output.files[0].slots if slot.parts]
    assert {(slot.tensor.dtype, slot.transform) for slot in weights} == {("float16", "cast to float16")}
    kept = target.output(zeros(CASES["llama"].spec, "bfloat16"), Plan())
    assert kept.dtype == "bfloat16"
    assert {slot.transform for slot in kept.files[0].slots if slot.parts} == {""}


@pytest.mark.parametrize("scaling", [None, "llama3", "linear"])
def test_angles_are_those_of_transformers_up_to_long_contexts(scaling: str | None) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions, dims = 131072, 64
    words_of = {"llama3": LLAMA3 | {"original_max_position_embeddings": 8192}, "linear": {"factor": 4.0}, None: {}}
    config = transformers.LlamaConfig(
        head_dim=dims, max_position_embeddings=positions, **rope(scaling or "default", 5e5, **words_of[scaling])
    )
    asked = np.concatenate([np.arange(300), np.arange(positions - 300, positions)])
    theirs = [
        turn[0, :, : dims // 2].numpy()
        for turn in LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(asked)[None])
    ]
    scalings = {"llama3": Llama3Scaling(), "linear": LinearScaling(factor=4.0), None: None}
    ours = tables(Rope(dims=dims, base=5e5, scaling=scalings[scaling]), positions)
    for table, turn in zip(ours, theirs, strict=True):
        near: Array = read(cut(table, 0, 0, 300))
        far: Array = read(cut(table, 0, positions - 300, positions))
        np.testing.assert_allclose(near, turn[:300], rtol=0, atol=1e-4)
        # One float32 rounding of the fastest frequencies is worth this much so far out.
        np.testing.assert_allclose(far, turn[300:], rtol=0, atol=2e-2)


def test_a_cut_of_a_table_is_a_part_of_it() -> None:
    cosines, _ = tables(Rope(dims=HEAD_DIM), 5000)
    whole = read(cosines)
    np.testing.assert_array_equal(read(cut(cut(cut(cosines, 0, 10, 4900), 0, 7, 4500), 1, 1, 4)), whole[17:4510, 1:4])
    out = np.empty(cosines.shape, words("float32"))
    cosines.fill(out)
    np.testing.assert_array_equal(out.view(np.float32), whole)


def test_tensor_parallel_is_refused_with_a_pointer() -> None:
    with pytest.raises(UsageError, match="--to trtllm"):
        target.output(zeros(CASES["llama"].spec, "float32"), Plan(tp=2))


def test_a_dtype_without_graph_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="--dtype float32"):
        target.output(zeros(CASES["llama"].spec, "float64"), Plan())
