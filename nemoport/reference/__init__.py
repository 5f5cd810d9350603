"""The meaning of a model: a plain torch decoder and encoder, the oracle that everything written is compared with.

It is written from the papers and the `ModelSpec`, reads one matrix at a time, and so runs models larger than memory;
it can run the ranks of a TensorRT-LLM checkpoint too, all in this process.

Tokens are integers [batch, length]. A mask of the same shape is true (or 1) at real tokens and false at padding,
on either side; a padded row is answered as it would be alone, and the logits at its padding mean nothing. `dtype` is
what is computed in: float64, float32, float16 or bfloat16. `device` is torch's word: cpu, cuda, cuda:1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import MissingPackage
from nemoport.exporters.tensor import LazyTensor
from nemoport.spec import ModelSpec

if TYPE_CHECKING:
    from nemoport.reference.decoder import Decoder
    from nemoport.reference.encoder import Encoder
    from nemoport.reference.ranks import RankedDecoder
    from nemoport.reference.weights import Observer, Sight

__all__ = [
    "device",
    "encode",
    "greedy",
    "layer_by_layer",
    "load",
    "load_encoder",
    "load_ranks",
    "logits",
    "rank_greedy",
    "rank_logits",
    "sampled",
]

KEEP = 2 << 30
"""Bytes of weights that generation keeps in memory between its steps; the others are read again at each step."""


def logits(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    tokens: NDArray[Any],
    *,
    mask: NDArray[Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    observe: Observer | None = None,
) -> NDArray[np.float32]:
    """float32 [batch, length, vocab_size]. `weights` are the canonical tensors of the spec, in any float dtype.

    `observe(name, x)` is called with the input [batch, length, in] of every linear map (`layers.0.attn.q`, `head`)
    in the order of computation, and with the keys and values of every attention (`layers.0.attn.keys`). An expert's is
    [tokens, in], those that chose it."""
    model = load(spec, weights, dtype=dtype, device=device, observe=observe)
    from nemoport.reference import generate

    return generate.logits(model, spec.vocab_size, tokens, mask)


def encode(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    tokens: NDArray[Any],
    *,
    mask: NDArray[Any] | None = None,
    token_types: NDArray[Any] | None = None,
    dimensions: NDArray[Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    observe: Observer | None = None,
) -> NDArray[np.float32]:
    """float32 [batch, hidden_size] of an embedding model, [batch, labels] of a classifier. `token_types` are of the
    shape of `tokens`, all 0 where none are given. `dimensions` [batch]: how many of each vector are kept; the others
    are 0."""
    model = load_encoder(spec, weights, dtype=dtype, device=device, observe=observe)
    return model.answers(tokens, mask, token_types, dimensions)


def greedy(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    tokens: NDArray[Any],
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    mask: NDArray[Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    keep: int = KEEP,
) -> NDArray[np.int64]:
    """The likeliest continuation, token by token: int64 [batch, steps], steps <= max_tokens. A row that has chosen a
    token of `stop` repeats it; when all have, generation ends."""
    model = load(spec, weights, dtype=dtype, device=device, keep=keep)
    from nemoport.reference import generate

    return generate.greedy(model, spec.vocab_size, tokens, mask, max_tokens, stop)


def sampled(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    *,
    rows: int,
    length: int,
    seed: int,
    device: str = "cpu",
    keep: int = KEEP,
) -> NDArray[np.int64]:
    """What the model says when it is left to itself: int64 [rows, length], each token drawn from its own distribution,
    in float32; the first of a row from all of the vocabulary."""
    model = load(spec, weights, device=device, keep=keep)
    from nemoport.reference import generate

    return generate.sampled(model, spec.vocab_size, rows, length, seed)


def rank_logits(
    directory: Path,
    tokens: NDArray[Any],
    *,
    mask: NDArray[Any] | None = None,
    max_attention_window: int | Sequence[int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> NDArray[np.float32]:
    """float32 [batch, length, vocab_size] from the rank files of a TensorRT-LLM checkpoint directory, and from nothing
    else. A sliding window is not in these files: TensorRT-LLM is told `max_attention_window` at run time, one for all
    layers or several that they take in turns."""
    model = load_ranks(directory, max_attention_window=max_attention_window, dtype=dtype, device=device)
    from nemoport.reference import generate

    return generate.logits(model, model.spec.vocab_size, tokens, mask)


def rank_greedy(
    directory: Path,
    tokens: NDArray[Any],
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    mask: NDArray[Any] | None = None,
    max_attention_window: int | Sequence[int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    keep: int = KEEP,
) -> NDArray[np.int64]:
    """`greedy` from the rank files of a TensorRT-LLM checkpoint directory; `keep` is for all ranks together."""
    model = load_ranks(directory, max_attention_window=max_attention_window, dtype=dtype, device=device, keep=keep)
    from nemoport.reference import generate

    return generate.greedy(model, model.spec.vocab_size, tokens, mask, max_tokens, stop)


def layer_by_layer(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    batches: Sequence[NDArray[Any]],
    *,
    dtype: str,
    device: str = "cpu",
    observe: Observer,
) -> Iterator[int]:
    """All batches through one layer, then through the next: each layer is read once, and one is in memory at a time.
    Yields a layer's number when all of them are through it. `observe` as in `logits`."""
    _need_torch()
    from nemoport.reference import layerwise
    from nemoport.reference.weights import check

    check(spec, weights)
    return layerwise.run(spec, weights, batches, dtype, device, observe)


def load(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    keep: int = 0,
    observe: Observer | None = None,
    sight: Sight | None = None,
) -> Decoder:
    """The model itself, checked: for those who call `hidden` and `logits` with a cache of their own. `sight(name, x)`
    is what a linear map sees of its input."""
    _need_torch()
    from nemoport.reference.decoder import Decoder
    from nemoport.reference.weights import Weights, check

    check(spec, weights)
    return Decoder(spec, Weights(weights, dtype=dtype, device=device, keep=keep, observe=observe, sight=sight))


def load_encoder(
    spec: ModelSpec,
    weights: Mapping[str, LazyTensor],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    keep: int = 0,
    observe: Observer | None = None,
    sight: Sight | None = None,
) -> Encoder:
    """The same of a model that answers texts with vectors or with logits over labels."""
    _need_torch()
    from nemoport.reference.encoder import Encoder
    from nemoport.reference.weights import Weights, check

    check(spec, weights)
    return Encoder(spec, Weights(weights, dtype=dtype, device=device, keep=keep, observe=observe, sight=sight))


def load_ranks(
    directory: Path,
    *,
    max_attention_window: int | Sequence[int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    keep: int = 0,
) -> RankedDecoder:
    """The ranks of a TensorRT-LLM checkpoint directory, each file checked. Its `spec` is what config.json says."""
    _need_torch()
    from nemoport.reference import rank_files
    from nemoport.reference.ranks import RankedDecoder
    from nemoport.reference.weights import Weights

    found = rank_files.read(directory, max_attention_window)
    ranks = tuple(Weights(local, dtype=dtype, device=device, keep=keep // found.plan.world) for local in found.ranks)
    return RankedDecoder(found.spec, found.plan, found.embedding_axis, ranks)


def device() -> str:
    """Where the reference runs on this machine: CUDA when torch has it, else the CPU."""
    _need_torch()
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise MissingPackage("torch", "torch", "the reference decoder")
