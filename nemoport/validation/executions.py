"""How each kind of artifact is executed, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport import reference
from nemoport.exporters import source
from nemoport.runner.client import Client
from nemoport.runner.model import LoadOptions, load_version
from nemoport.runner.serve import serving
from nemoport.runner.server import Server
from nemoport.validation.measures import Logits
from nemoport.validation.prompts import Prompt
from nemoport.validation.subject import Subject, in_repository

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """An artifact that answers."""

    by: str
    """Who executes it, for the report."""
    logits: Callable[[Prompt], Logits]
    """[batch, length, vocabulary]; at padding, anything."""
    decode: Callable[[Prompt, int], Logits] | None = None
    """The same for a prompt without padding, with its last `steps` tokens fed one at a time through the cache."""
    computes_in: str = "float32"
    notes: tuple[str, ...] = ()


@contextmanager
def huggingface(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    model = source.model(subject.files)
    yield Execution(
        by="the reference, from config.json and safetensors",
        logits=lambda prompt: reference.logits(model.spec, model.tensors, prompt.tokens, mask=prompt.mask),
    )


@contextmanager
def ranks(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    world = subject.artifact.plan.world
    yield Execution(
        by=f"the reference, simulating {world} ranks from config.json and rank files",
        logits=lambda prompt: reference.rank_logits(subject.files, prompt.tokens, mask=prompt.mask),
    )


@contextmanager
def served_graph(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    """ONNX on the runner's own path: the version loaded under its config, real requests over HTTP."""
    with in_repository(subject) as (model, version):
        loaded = load_version(model, version, options)
        server = Server()
        server.adopt(loaded)
        with serving(server) as address, Client(address) as client:
            decoder = GraphDecoder(client, loaded.name, subject)
            yield Execution(
                by=f"the runner over HTTP, on {'the CPU' if loaded.placement.gpu is None else f'GPU {loaded.placement.gpu}'}",
                logits=decoder.logits,
                decode=decoder.decode,
                computes_in=subject.artifact.dtype,
                notes=loaded.notes,
            )


EXECUTIONS: dict[str, Callable[[Subject, LoadOptions], AbstractContextManager[Execution]]] = {
    "hf": huggingface,
    "trtllm": ranks,
    "onnx": served_graph,
}


@dataclass(frozen=True)
class GraphDecoder:
    """A decoder graph behind the protocol: prefill, and steps through its cache."""

    client: Client
    model: str
    subject: Subject

    def logits(self, prompt: Prompt) -> Logits:
        return self._step(prompt.tokens, prompt.mask, self._empty_cache(len(prompt.tokens)))[0]

    def decode(self, prompt: Prompt, steps: int) -> Logits:
        """The prefix at once, then one token at a time."""
        start = prompt.tokens.shape[1] - steps
        logits, cache = self._step(
            prompt.tokens[:, :start], prompt.mask[:, :start], self._empty_cache(len(prompt.tokens))
        )
        collected = [logits]
        for position in range(start, prompt.tokens.shape[1]):
            token = prompt.tokens[:, position : position + 1]
            logits, cache = self._step(token, prompt.mask[:, : position + 1], cache)
            collected.append(logits)
        return np.concatenate(collected, axis=1)

    def _step(self, tokens: Array, mask: Array, cache: dict[str, Array]) -> tuple[Logits, dict[str, Array]]:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **cache}
        outputs = self.client.infer(self.model, inputs)
        past = {f"past_key_values{name.removeprefix('present')}": each for name, each in outputs.items() if "." in name}
        return outputs["logits"].astype(np.float32), past

    def _empty_cache(self, batch: int) -> dict[str, Array]:
        signature = self.subject.artifact.signature
        assert signature is not None, "a graph has a signature"
        sizes = {"batch": batch, "past": 0}
        return {
            each.name: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in each.shape], each.dtype)
            for each in signature.inputs
            if each.name.startswith("past_key_values.")
        }
