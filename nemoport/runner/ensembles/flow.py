"""A request through an ensemble: each step is asked as soon as its inputs are there.

A decoupled member answers any number of times, and each of its answers goes on by itself. The ensemble answers as often
as a way comes to its end:

    request -> split -> "a" -> upper -> "A"
                     -> "b" -> upper -> "B"
                     -> the end
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, get_ident
from typing import Any

from nemoport.runner.datatypes import BY_NUMPY
from nemoport.runner.ensembles.wiring import may_be_equal, needed_steps, version_of
from nemoport.runner.jobs import Job, Outcome, Reply, WhenIdle
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InputTensor, Response
from nemoport.runner.statistics import Statistics
from nemoport.runner.tensors import Array

Find = Callable[[str, int | None], Any]
"""The model of that name and version, now."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    array: Array
    rows: int
    """Of its batch; 0 where the model that made it does not batch."""

    def turned(self, dims: Sequence[int], batches: bool) -> Array:
        """For a model of these dims. Between one that batches and one that does not, a batch of one comes or goes,
        unless the shape fits as it is (Triton's core, `EnsembleContext::ReshapeTensorDims`)."""
        fits = may_be_equal(tuple(dims), self.array.shape)
        if batches and not self.rows and fits:
            return self.array[None]
        if not batches and self.rows == 1 and not fits:
            return self.array.reshape(self.array.shape[1:])
        return self.array


_Made = Mapping[str, _Tensor | None]
"""None is what a client or a model left out: a step is asked without it, and may refuse."""


@dataclass(eq=False, slots=True)
class _Strand:
    """What belongs together: the request, or one answer of a decoupled step, and all that comes of it. No step takes
    tensors of two strands (`wiring` sees to it); `steps` are those that have not been asked for this one."""

    steps: list[Any]
    tensors: dict[str, _Tensor | None] = field(default_factory=dict)

    def take(self, made: _Made) -> list[Any]:
        """The steps that can be asked now."""
        self.tensors.update(made)
        ready = [step for step in self.steps if self.has(step.input_map.values())]
        self.steps = [step for step in self.steps if step not in ready]
        return ready

    def has(self, names: Iterable[str]) -> bool:
        return all(name in self.tensors for name in names)


class Ensemble:
    """Takes jobs as a scheduler does. Members are looked up for every request, so that they may be reloaded."""

    def __init__(self, config: ModelConfig, find: Find, statistics: Statistics) -> None:
        self.config, self.find, self.statistics = config, find, statistics
        self.decoupled = config.model_transaction_policy.decoupled
        self.inputs = [tensor.name for tensor in config.input]
        self.dims = {output.name: output.reshape.shape or output.dims for output in config.output}
        self._closed = False

    def submit(self, job: Job, when_idle: WhenIdle | None = None) -> None:
        if self._closed:
            raise Refusal(f"{job.request.label}model '{self.config.name}' is being unloaded", Code.UNAVAILABLE)
        job.queued = time.monotonic_ns()
        _Flow(self, job, when_idle).begin()

    def is_busy(self) -> bool:
        """Never itself: its members are."""
        return False

    def close(self) -> None:
        self._closed = True


class _Flow:
    """One request. Members answer from threads of their own, or, when quick, from the one that reads requests."""

    def __init__(self, ensemble: Ensemble, job: Job, when_idle: WhenIdle | None) -> None:
        self._ensemble, self._job = ensemble, job
        self._when_idle, self._reader = when_idle, get_ident()
        self._batches = ensemble.config.max_batch_size > 0
        self._steps = needed_steps(ensemble.config, job.wanted)
        self._lock, self._ended = Lock(), False
        self._under_way = 1
        """Members whose last answer is still to come, and first of all the request."""

    def begin(self) -> None:
        rows = self._job.items if self._batches else 0
        given = {name: _Tensor(array, rows) for name, array in self._job.feeds.items()}
        self._go_on(_Strand(self._steps), {**dict.fromkeys(self._ensemble.inputs), **given}, True)

    def _go_on(self, strand: _Strand, made: _Made, last: bool) -> None:
        """With what the request or a step brought, `last` of it or not: answer if all is there, and ask every step that
        can be asked now."""
        with self._lock:
            ready = strand.take(made)
            self._under_way += len(ready) - last
            if made and strand.has(self._job.wanted):
                self._answer(self._outputs(strand.tensors), not self._under_way)
            elif not self._under_way:
                self._answer(None, True)
        for step in ready:
            self._ask(step, strand)

    def _ask(self, step: Any, strand: _Strand) -> None:
        asked = self._job.request
        try:
            if self._job.cancelled:
                raise Refusal(f"{asked.label}request is cancelled", Code.CANCELLED)
            member = self._ensemble.find(step.model_name, version_of(step))
            if member.decoupled and not self._ensemble.decoupled:
                raise Refusal(
                    f"{asked.label}model '{member.name}' was loaded again and is decoupled now; unload this ensemble "
                    "and load it again",
                    Code.UNAVAILABLE,
                )
            batches = member.contract.max_batch_size > 0
            inputs = tuple(
                _input(name, found.turned(member.contract.inputs[name].dims, batches))
                for name, tensor in sorted(step.input_map.items())
                if (found := strand.tensors[tensor]) is not None
                and name in member.contract.inputs  # it may have been reloaded, and refuses what is not there
            )
            rows = next((each.shape[0] for each in inputs if batches and each.shape), 0)
            request = InferRequest(inputs, tuple(sorted(step.output_map)), asked.id, asked.parameters)
            when_idle = self._when_idle if get_ident() == self._reader else None
            onto = None if member.decoupled else strand
            member.submit(request, partial(self._answered, step, onto, rows), when_idle).whole = self._job
        except Refusal as refusal:
            self._fail(refusal)

    def _answered(self, step: Any, onto: _Strand | None, rows: int, response: Response) -> None:
        """One answer of a step goes on with the strand that it was asked for, or begins its own."""
        if isinstance(response.content, Refusal):
            self._fail(response.content)
            return
        made: _Made = {}
        if response.content is not None:
            arrays = response.content.arrays()
            made = {
                tensor: _Tensor(arrays[name], rows) if name in arrays else None
                for name, tensor in step.output_map.items()
            }
        self._go_on(onto or _Strand(self._steps), made, response.last)

    def _outputs(self, tensors: _Made) -> Reply:
        found = {name: tensor for name in self._job.wanted if (tensor := tensors[name]) is not None}
        return {name: tensor.turned(self._ensemble.dims[name], self._batches) for name, tensor in found.items()}

    def _fail(self, refusal: Refusal) -> None:
        """The first refusal is the last answer; what is under way for it is not wanted any more."""
        with self._lock:
            self._answer(Refusal(f"in ensemble '{self._ensemble.config.name}', {refusal}", refusal.code), True)
        self._job.cancel()

    def _answer(self, reply: Reply | None, last: bool) -> None:
        """With the lock, so that none comes after the last."""
        if self._ended:
            return
        self._ended = last
        if isinstance(reply, Refusal):
            self._ensemble.statistics.dropped(self._job, reply)
        elif last:
            ended = time.monotonic_ns()
            outcome = Outcome([reply], self._job.queued, ended)
            self._ensemble.statistics.executed([self._job], outcome, self._job.queued, ended)
        self._job.deliver(reply, last)


def _input(name: str, array: Array) -> InputTensor:
    return InputTensor(name, BY_NUMPY[array.dtype], array.shape, array)
