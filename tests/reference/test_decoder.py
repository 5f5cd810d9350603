"""The decoder says what transformers and megatron-core say."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemoport import reference
from nemoport.errors import DamagedInput, MachineError, MissingPackage, UnsupportedInput, UsageError
from nemoport.exporters.dtypes import Words
from nemoport.exporters.tensor import Held, LazyTensor, Span, nbytes
from nemoport.reference.rope import frequencies
from nemoport.reference.steps import Cache, places
from nemoport.spec import (
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Rope,
    tensors,
)

from .tiny import DATA, HEAD_DIM, VOCAB, Pair, answers, attention, canonical, huggingface, pair, spec, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama() -> Pair:
    return pair(huggingface("Llama"), spec(attention()))


def llama_with_all_biases() -> Pair:
    model = huggingface("Llama", attention_bias=True, mlp_bias=True)
    return pair(model, spec(attention(qkv_bias=True, out_bias=True), mlp_bias=True))


def llama3_scaling() -> Pair:
    rope = Rope(dims=HEAD_DIM, base=500.0, scaling=Llama3Scaling(original_max_positions=16))
    return pair(huggingface("Llama", rope_theta=500.0, rope_scaling=LLAMA3), spec(attention(rope=rope)))


def linear_scaling() -> Pair:
    rope = Rope(dims=HEAD_DIM, scaling=LinearScaling(factor=2.5))
    words = {"rope_type": "linear", "factor": 2.5}
    return pair(huggingface("Llama", rope_theta=10000.0, rope_scaling=words), spec(attention(rope=rope)))


def mistral_with_window() -> Pair:
    return pair(huggingface("Mistral", sliding_window=5), spec(attention(window=5)))


def qwen2_with_windows_in_later_layers() -> Pair:
    model = huggingface("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    full, windowed = attention(qkv_bias=True), attention(qkv_bias=True, window=4)
    return pair(model, spec(full, windowed, windowed))


def qwen3_tied() -> Pair:
    model = huggingface("Qwen3", tie_word_embeddings=True)
    return pair(model, spec(attention(qk_norm=True), tied=True))


MODELS = (
    llama,
    llama_with_all_biases,
    llama3_scaling,
    linear_scaling,
    mistral_with_window,
    qwen2_with_windows_in_later_layers,
    qwen3_tied,
)
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
Make = Callable[[], Pair]


@every_model
def test_logits_are_those_of_transformers(make: Make) -> None:
    model = make()
    ids = tokens()
    found = reference.logits(model.spec, model.weights, ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, answers(model.huggingface, ids), atol=5e-5, rtol=1e-5)


@every_model
def test_a_step_at_a_time_gives_the_logits_of_all_at_once(make: Make) -> None:
    model = make()
    ids = tokens()
    decoder, cache, where, found = reference.load(model.spec, model.weights), Cache(), None, []
    for piece in np.split(ids, [6, 7, *range(10, 17)], axis=1):
        step = torch.from_numpy(piece)
        where = places(torch.ones_like(step, dtype=torch.bool), where)
        found.append(decoder.logits(decoder.hidden(step, where, cache)))
    np.testing.assert_allclose(torch.cat(found, 1), reference.logits(model.spec, model.weights, ids), atol=2e-5)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_answered_as_it_would_be_alone(make: Make, side: str) -> None:
    model = make()
    ids, mask = tokens(), np.ones((2, 17), bool)
    padding = slice(0, 6) if side == "left" else slice(11, 17)
    mask[1, padding], ids[1, padding] = False, -100
    found = reference.logits(model.spec, model.weights, ids, mask=mask)
    for row in range(2):
        alone = reference.logits(model.spec, model.weights, ids[row : row + 1, mask[row]])
        np.testing.assert_allclose(found[row : row + 1, mask[row]], alone, atol=2e-5)
    theirs = answers(model.huggingface, np.where(mask, ids, 0), mask)
    np.testing.assert_allclose(found[mask], theirs[mask], atol=5e-5, rtol=1e-5)


@every_model
def test_greedy_tokens_are_those_of_the_whole_sequence_seen_again(make: Make) -> None:
    model = make()
    ids = tokens(batch=2, length=5)
    expected = ids
    for _ in range(12):
        best = reference.logits(model.spec, model.weights, expected)[:, -1].argmax(-1)
        expected = np.concatenate([expected, best[:, None]], axis=1)
    found = reference.greedy(model.spec, model.weights, ids, max_tokens=12)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected[:, 5:])


def test_greedy_continues_padded_prompts_as_if_alone_and_stops() -> None:
    model = llama()
    ids, mask = tokens(batch=3, length=7), np.ones((3, 7), bool)
    mask[0, :3], mask[2, 4:] = False, False
    found = reference.greedy(model.spec, model.weights, ids, max_tokens=8, mask=mask, keep=0)
    for row in range(3):
        alone = reference.greedy(model.spec, model.weights, ids[row : row + 1, mask[row]], max_tokens=8)
        np.testing.assert_array_equal(found[row], alone[0])
    stop = int(found[0, 2])
    first = list(found[0]).index(stop)
    stopped = reference.greedy(model.spec, model.weights, ids[:1], max_tokens=8, mask=mask[:1], stop=[stop])
    np.testing.assert_array_equal(stopped, found[:1, : first + 1])


def test_logits_are_those_of_megatron_core() -> None:
    answer = np.load(DATA / "megatron/mcore/llama_te_tp1pp1.ref.npz")
    weights = canonical(load_file(DATA / "megatron/hf/llama/model.safetensors"))
    mixer = Attention(heads=8, kv_heads=4, head_dim=16, rope=Rope(dims=16, base=500000.0))
    meaning = ModelSpec(
        family="llama",
        vocab_size=300,
        hidden_size=64,
        max_positions=128,
        norm=Norm(eps=1e-5),
        head=LanguageModel(),
        blocks=(Block(mixer=mixer, ffn=Dense(intermediate=176)),) * 4,
    )
    assert {tensor.dtype for tensor in weights.values()} == {"bfloat16"}
    found = reference.logits(meaning, weights, answer["tokens"])
    np.testing.assert_allclose(found, answer["logits_fp32"], atol=2e-5)


def test_layer_norm_plain_ffn_and_partial_rope_follow_their_papers() -> None:
    rope = Rope(dims=4)
    mixer = Attention(heads=2, kv_heads=1, head_dim=6, rope=rope)
    meaning = ModelSpec(
        family="tiny",
        vocab_size=11,
        hidden_size=8,
        max_positions=16,
        norm=Norm(kind="layer", eps=1e-3),
        head=LanguageModel(),
        blocks=(Block(mixer=mixer, ffn=Dense(intermediate=5, gated=False, bias=True)),),
    )
    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=tensor.shape) for name, tensor in tensors(meaning).items()}
    ids = np.array([[3, 10, 3, 0]])

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        return np.asarray(centred * values[f"{name}.weight"] + values[f"{name}.bias"])

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        """x as complex numbers (x0 + i x2, x1 + i x3), each turned; x4 and x5 stay."""
        pairs = (x[:2] + 1j * x[2:4]) * np.exp(1j * position * np.array([1.0, 0.01]))
        return np.concatenate([pairs.real, pairs.imag, x[4:]])

    x = values["embed.weight"][ids[0]]
    a = norm("layers.0.attn_norm", x)
    q, k, v = (a @ values[f"layers.0.attn.{part}.weight"].T for part in "qkv")
    mixed = np.zeros((4, 12))
    for head in range(2):
        for i in range(4):
            query = turn(q[i, 6 * head : 6 * head + 6], i)
            scores = np.exp([query @ turn(k[j], j) / np.sqrt(6) for j in range(i + 1)])
            mixed[i, 6 * head : 6 * head + 6] = scores / scores.sum() @ v[: i + 1]
    x = x + mixed @ values["layers.0.attn.o.weight"].T
    inner = norm("layers.0.ffn_norm", x) @ values["layers.0.ffn.up.weight"].T + values["layers.0.ffn.up.bias"]
    inner = inner / (1 + np.exp(-inner))
    x = x + inner @ values["layers.0.ffn.down.weight"].T + values["layers.0.ffn.down.bias"]
    expected = norm("norm", x) @ values["head.weight"].T
    weights = {name: Held(value, "float64") for name, value in values.items()}
    np.testing.assert_allclose(reference.logits(meaning, weights, ids, dtype="float64")[0], expected, rtol=1e-5)


@every_model
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_what_is_rounded_where_is_as_in_transformers(make: Make, dtype: str) -> None:
    """Bit for bit, with the kernel for attention that it takes. Frequencies stay float32, as it loads them."""
    model, ids = make(), tokens()
    model.huggingface.set_attn_implementation("sdpa")
    for parameter in model.huggingface.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    found = reference.logits(model.spec, model.weights, ids, dtype=dtype)
    np.testing.assert_array_equal(found, answers(model.huggingface, ids))
    mask = np.arange(17) >= np.array([[0], [6]])
    found = reference.logits(model.spec, model.weights, ids, mask=mask, dtype=dtype)
    np.testing.assert_array_equal(found[mask], answers(model.huggingface, ids, mask)[mask])


def test_bfloat16_arithmetic_stays_near_float32() -> None:
    model = llama()
    ids = tokens()
    exact = reference.logits(model.spec, model.weights, ids)
    rough = reference.logits(model.spec, model.weights, ids, dtype="bfloat16")
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


def test_one_matrix_is_in_memory_at_a_time_and_each_is_read_once() -> None:
    model = llama()
    log = Log()
    watched = {name: Watched(tensor, name, log) for name, tensor in model.weights.items()}
    reference.logits(model.spec, watched, tokens(1, 1))
    assert sorted(log.read) == sorted(model.weights)
    assert log.most == nbytes(model.weights["head.weight"]), "the largest tensor, with nothing beside it"


@dataclass
class Log:
    read: list[str] = field(default_factory=list)
    live: int = 0
    most: int = 0

    def take(self, size: int) -> None:
        self.live += size
        self.most = max(self.most, self.live)


@dataclass(frozen=True)
class Watched:
    """Counts the bytes that were read and that somebody still holds."""

    tensor: LazyTensor
    name: str
    log: Log

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, tensor=self.tensor.cut(spans))

    def fill(self, out: Words) -> None:
        self.tensor.fill(out)
        self.log.read.append(self.name)
        self.log.take(out.nbytes)
        weakref.finalize(out, self.log.take, -out.nbytes)


def test_the_input_of_every_linear_map_can_be_observed() -> None:
    model = qwen3_tied()
    seen: dict[str, tuple[int, ...]] = {}
    reference.logits(model.spec, model.weights, tokens(), observe=lambda name, x: seen.update({name: tuple(x.shape)}))
    maps = [name.removesuffix(".weight") for name, tensor in tensors(model.spec).items() if len(tensor.shape) == 2]
    cached = [f"layers.{layer}.attn.{what}" for layer in range(len(model.spec.blocks)) for what in ("keys", "values")]
    assert sorted(seen) == sorted(["head", *cached, *(name for name in maps if name != "embed")])
    assert seen["layers.1.ffn.down"] == (2, 17, 52)


def test_slow_waves_are_slowed_and_fast_ones_kept() -> None:
    plain = frequencies(Rope(dims=64, base=500000.0))
    scaled = frequencies(Rope(dims=64, base=500000.0, scaling=Llama3Scaling()))
    assert torch.equal(plain[:10], scaled[:10])
    torch.testing.assert_close(plain[-8:] / 8, scaled[-8:])


def test_a_weight_of_the_wrong_shape_is_named() -> None:
    model = llama()
    weights = {**model.weights, "layers.1.attn.k.weight": Held(np.zeros((3, 5), np.float32), "float32")}
    with pytest.raises(DamagedInput, match=r"layers\.1\.attn\.k\.weight has shape \[3, 5\], \[20, 48\] needed"):
        reference.logits(model.spec, weights, tokens())


def test_missing_and_unknown_weights_are_named() -> None:
    model = llama()
    with pytest.raises(DamagedInput, match=r"norm\.weight is missing"):
        reference.load(model.spec, {name: weight for name, weight in model.weights.items() if name != "norm.weight"})
    with pytest.raises(DamagedInput, match=r"head\.weight is not a tensor of this model"):
        reference.load(replace(model.spec, head=LanguageModel(tied=True)), model.weights)


def test_a_quantized_weight_is_refused() -> None:
    model = llama()
    shape = model.weights["layers.0.attn.o.weight"].shape
    weights = {**model.weights, "layers.0.attn.o.weight": Held(np.zeros(shape, np.int8), "int8")}
    with pytest.raises(UnsupportedInput, match=r"layers\.0\.attn\.o\.weight is stored as int8"):
        reference.logits(model.spec, weights, tokens())


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    model = llama()
    with pytest.raises(UsageError, match=f"token {VOCAB} is outside of the vocabulary of {VOCAB}"):
        reference.logits(model.spec, model.weights, np.array([[1, VOCAB]]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    model = llama()
    with pytest.raises(MachineError, match="device cuda needs a GPU that this machine lacks"):
        reference.load(model.spec, model.weights, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_logits_of_the_cpu() -> None:
    model = llama()
    found = reference.logits(model.spec, model.weights, tokens(), device="cuda")
    np.testing.assert_allclose(found, reference.logits(model.spec, model.weights, tokens()), atol=1e-4)
    whole = reference.greedy(model.spec, model.weights, tokens(), max_tokens=5)
    np.testing.assert_array_equal(
        reference.greedy(model.spec, model.weights, tokens(), max_tokens=5, device="cuda"), whole
    )


def test_without_torch_the_door_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackage, match=r"nemoport\[torch\]"):
        reference.logits(model.spec, model.weights, tokens())
