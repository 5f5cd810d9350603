"""How each kind of artifact is executed, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemoport import reference
from nemoport.artifact import Artifact, Signature
from nemoport.exporters import source
from nemoport.exporters.adapters import huggingface as peft
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.serving import WEIGHTS
from nemoport.exporters.tensor import LazyTensor
from nemoport.reference import rank_files
from nemoport.runner.client import Client
from nemoport.runner.model import LoadOptions, ModelVersion, load_version
from nemoport.runner.serve import serving
from nemoport.runner.server import Server
from nemoport.spec import LanguageModel, ModelSpec, attention_windows
from nemoport.validation import quantized_ranks, sights, weights
from nemoport.validation.measures import Logits
from nemoport.validation.prompts import Prompt
from nemoport.validation.subject import Subject, in_repository
from nemoport.validation.texts import answer_of
from nemoport.validation.weights import Share

if TYPE_CHECKING:
    from nemoport.reference.decoder import Runs
    from nemoport.reference.weights import Sight

Array = NDArray[Any]
HELD: dict[str, Callable[[Path, ModelSpec], tuple[Share, ...]]] = {
    "onnx": weights.of_graph,
    "torchscript": weights.of_script,
    "tensorrt": lambda plan, spec: (),
}
"""The canonical tensors in a file that is executed; a plan shows none."""

KEEP = 1 << 30
"""Bytes of weights that the reference keeps between prompts."""
ANY = 1 << 40
"""A limit that nothing reaches: rows of a batch, bytes of a request."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """An artifact that answers."""

    by: str
    """Who executes it, for the report."""
    holds: tuple[Share, ...]
    logits: Callable[[Prompt], Logits]
    """[batch, length, vocabulary], at padding anything; of an encoder [batch, what it gives]."""
    decode: Callable[[Prompt, int], Logits] | None = None
    """The same, with the last `steps` tokens fed one at a time through the cache."""
    batch: int = ANY
    """Rows that it takes at once."""
    computes_in: str = "float32"
    gives: str = "logits"
    sight: Sight | None = None
    """What it rounds of the input of a linear with packed weights."""
    folded: bool = False
    """It was compiled: some weights are no longer there by themselves."""
    notes: tuple[str, ...] = ()


@contextmanager
def huggingface(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    yield from _huggingface(subject.files)


@contextmanager
def below(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    """The same, of the weights that an engine is pointed at."""
    yield from _huggingface(subject.files / WEIGHTS)


def _huggingface(directory: Path) -> Iterator[Execution]:
    carried = directory / peft.DIRECTORY
    model = source.model(directory, adapter=carried if peft.recognises(carried) else None)
    yield Execution(
        by=f"the reference on {reference.device()}, from config.json and safetensors",
        holds=weights.of_model(model),
        logits=answering(model.spec, all_dequantized(model.tensors)),
        gives=answer_of(model.spec),
        notes=_not_rounded(model.tensors),
    )


@contextmanager
def ranks(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    world, told = subject.artifact.plan.world, attention_windows(subject.artifact.spec)
    if quantized_ranks.is_quantized(subject.files):
        found = quantized_ranks.read(subject.files, told or None)
        runs = quantized_ranks.load(found, keep=KEEP, device=reference.device())
    else:
        found, device = rank_files.read(subject.files), reference.device()
        runs = reference.load_ranks(subject.files, max_attention_window=told or None, keep=KEEP, device=device)
    given = (
        f"max_attention_window {' '.join(map(str, told))} is not in the files: "
        "TensorRT-LLM must be given it at run time, as it was here"
    )
    yield Execution(
        by=f"the reference on {reference.device()}, simulating {world} ranks from config.json and rank files",
        holds=weights.of_ranks(found, subject.artifact.spec),
        logits=lambda prompt: ask(runs, prompt),
        notes=(*((given,) if told else ()), *_not_rounded(found.ranks[0])),
    )


_PACKED = (
    "ONNX Runtime rounds the inputs of packed linears to 8 bits, so answers are held to what the reference loses when "
    "it does so; fields are held to the bit"
)


@contextmanager
def served(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    """On the runner's own path: the version loaded under its config, real requests over HTTP."""
    with in_repository(subject) as (model, version):
        loaded = load_version(model, version, options)
        server = Server()
        server.adopt(loaded)
        with serving(server, http_max_input_size=ANY) as address, Client(address) as client:
            place = "the CPU" if loaded.placement.gpu is None else f"GPU {loaded.placement.gpu}"
            graph = model / version / loaded.config.default_model_filename
            made, holds = subject.artifact, held(subject.artifact, graph)
            assert made.signature, "a graph has a signature"
            sight = sights.of_graphs([graph], holds)
            yield graph_execution(made, made.signature, client, loaded, holds, sight, place)


def graph_execution(
    made: Artifact,
    signature: Signature,
    client: Client,
    loaded: ModelVersion,
    holds: tuple[Share, ...],
    sight: Sight | None,
    place: str,
) -> Execution:
    """A model behind the protocol that has the signature of a graph."""
    spec, decoder = made.spec, GraphDecoder(client, loaded.name, signature)
    steps = isinstance(spec.head, LanguageModel)
    return Execution(
        by=f"the runner over HTTP, on {place}",
        holds=holds,
        logits=decoder.logits if steps else partial(_answers, client, loaded.name),
        decode=decoder.decode if steps else None,
        batch=loaded.config.max_batch_size or ANY,
        computes_in=made.dtype,
        gives=answer_of(spec),
        sight=sight,
        folded=bool(made.built_with),
        notes=(*loaded.notes, *((_PACKED,) if sight else ())),
    )


def held(made: Artifact, file: Path) -> tuple[Share, ...]:
    """The weights of what the runner loads, as it was converted or as a compiler left it."""
    folded = made.kind == "onnx" and made.built_with
    return (weights.of_optimized if folded else HELD[made.kind])(file, made.spec)


def _not_rounded(tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """What is not seen of a quantization: only weights are executed as they are stored."""
    encoded = (tensor for tensor in tensors.values() if isinstance(tensor, Encoded))
    if not any("input_scale" in tensor.fields for tensor in encoded):
        return ()
    return ("the runtime rounds the inputs of quantized linears too; here they were not, only their scales compared",)


EXECUTIONS: dict[str, Callable[[Subject, LoadOptions], AbstractContextManager[Execution]]] = {
    "hf": huggingface,
    "vllm": below,
    "llmapi": below,
    "trtllm": ranks,
    **dict.fromkeys(HELD, served),
}


def answering(
    spec: ModelSpec, weights: Mapping[str, LazyTensor], dtype: str = "float32", sight: Sight | None = None
) -> Callable[[Prompt], Logits]:
    """How the reference answers, whatever kind of model it is."""
    how: dict[str, Any] = {"dtype": dtype, "keep": KEEP, "device": reference.device(), "sight": sight}
    if isinstance(spec.head, LanguageModel):
        return partial(ask, reference.load(spec, weights, **how))
    encoder = reference.load_encoder(spec, weights, **how)
    return lambda texts: encoder.answers(texts.tokens, texts.mask, texts.token_types, texts.dimensions)


def ask(model: Runs, prompt: Prompt) -> Logits:
    """The reference's answer, at the prompt's own positions."""
    import torch

    from nemoport.reference.steps import PADDING, Places

    seen = np.where(prompt.real, prompt.positions, PADDING)
    tokens, queries, keys = (torch.tensor(x, device=model.device) for x in (prompt.tokens, prompt.positions, seen))
    with torch.inference_mode():
        answer: Logits = model.logits(model.hidden(tokens, Places(queries, keys), None)).cpu().numpy()
    return answer


def _answers(client: Client, model: str, texts: Prompt) -> Logits:
    """An encoder graph's, behind the protocol."""
    given = {
        "input_ids": texts.tokens,
        "attention_mask": texts.mask,
        "token_type_ids": texts.token_types,
        "dimensions": None if texts.dimensions is None else texts.dimensions[:, None],
    }
    (answer,) = client.infer(model, {name: array for name, array in given.items() if array is not None}).values()
    return answer.astype(np.float32)


@dataclass(frozen=True)
class GraphDecoder:
    """A decoder graph behind the protocol: prefill, and steps through its cache."""

    client: Client
    model: str
    signature: Signature

    def logits(self, prompt: Prompt) -> Logits:
        return self._step(prompt, 0, prompt.tokens.shape[1], self._empty_cache(len(prompt.tokens)))[0]

    def decode(self, prompt: Prompt, steps: int) -> Logits:
        """The prefix at once, then one token at a time."""
        length = prompt.tokens.shape[1]
        start, cache, collected = 0, self._empty_cache(len(prompt.tokens)), []
        for stop in range(length - steps, length + 1):
            logits, cache = self._step(prompt, start, stop, cache)
            collected.append(logits)
            start = stop
        return np.concatenate(collected, axis=1)

    def _step(self, prompt: Prompt, start: int, stop: int, cache: dict[str, Array]) -> tuple[Logits, dict[str, Array]]:
        inputs = {
            "input_ids": prompt.tokens[:, start:stop],
            "attention_mask": prompt.mask[:, :stop],
            "position_ids": prompt.positions[:, start:stop],
            **cache,
        }
        outputs = self.client.infer(self.model, inputs)
        past = {f"past_key_values{name.removeprefix('present')}": each for name, each in outputs.items() if "." in name}
        return outputs["logits"].astype(np.float32), past

    def _empty_cache(self, batch: int) -> dict[str, Array]:
        sizes = {"batch": batch, "past": 0}
        return {
            each.name: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in each.shape], real(each.dtype))
            for each in self.signature.inputs
            if each.name.startswith("past_key_values.")
        }
