"""A request through an ensemble: each step is asked as soon as its inputs are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class Ensemble:
    """Takes jobs as a scheduler does. Members are looked up for every request, so that they may be reloaded."""

    def __init__(self, config: ModelConfig, find: Find, statistics: Statistics) -> None:
        self.config, self.find, self.statistics = config, find, statistics
        self._closed = False

    def submit(self, job: Job, when_idle: WhenIdle | None = None) -> None:
        if self._closed:
            raise Refusal(f"{job.request.label}model '{self.config.name}' is being unloaded", Code.UNAVAILABLE)
        job.queued = time.monotonic_ns()
        _Flow(self, job, when_idle).advance({})

    def close(self) -> None:
        self._closed = True


class _Flow:
    """One request. Members answer from threads of their own, or, when quick, from the one that reads requests."""

    def __init__(self, ensemble: Ensemble, job: Job, when_idle: WhenIdle | None) -> None:
        self._ensemble, self._job = ensemble, job
        self._when_idle, self._reader = when_idle, get_ident()
        self._lock, self._ended = Lock(), False
        self._batches = ensemble.config.max_batch_size > 0
        rows = job.items if self._batches else 0
        self._tensors = {name: _Tensor(array, rows) for name, array in job.feeds.items()}
        self._steps = needed_steps(ensemble.config, job.wanted)
        self._under_way = 0

    def advance(self, made: dict[str, _Tensor]) -> None:
        """Take what a step made, and ask every step that can be asked now."""
        with self._lock:
            self._tensors.update(made)
            ready = [step for step in self._steps if all(name in self._tensors for name in step.input_map.values())]
            self._steps = [step for step in self._steps if step not in ready]
            self._under_way += len(ready)
            finished = not self._under_way
        if finished:
            dims = {output.name: output.reshape.shape or output.dims for output in self._ensemble.config.output}
            self._end({name: self._tensors[name].turned(dims[name], self._batches) for name in self._job.wanted})
        for step in ready:
            self._ask(step)

    def _ask(self, step: Any) -> None:
        asked = self._job.request
        try:
            if self._job.cancelled:
                raise Refusal(f"{asked.label}request is cancelled", Code.CANCELLED)
            member = self._ensemble.find(step.model_name, version_of(step))
            batches = member.contract.max_batch_size > 0
            inputs = tuple(
                _input(name, self._tensors[tensor].turned(member.contract.inputs[name].dims, batches))
                for name, tensor in sorted(step.input_map.items())
                if name in member.contract.inputs  # it may have been reloaded, and refuses what is not there
            )
            rows = next((each.shape[0] for each in inputs if batches and each.shape), 0)
            request = InferRequest(inputs, tuple(sorted(step.output_map)), asked.id, asked.parameters)
            when_idle = self._when_idle if get_ident() == self._reader else None
            member.submit(request, partial(self._answered, step, rows), when_idle)
        except Refusal as refusal:
            self._fail(refusal)

    def _answered(self, step: Any, rows: int, response: Response) -> None:
        try:
            arrays = response.value().arrays()
            missing = sorted(set(step.output_map) - set(arrays))
            if missing:
                raise Refusal(f"model '{step.model_name}' gave no output '{missing[0]}'", Code.INTERNAL)
        except Refusal as refusal:
            self._fail(refusal)
            return
        with self._lock:
            self._under_way -= 1
        self.advance({tensor: _Tensor(arrays[name], rows) for name, tensor in step.output_map.items()})

    def _fail(self, refusal: Refusal) -> None:
        self._end(Refusal(f"in ensemble '{self._ensemble.config.name}', {refusal}", refusal.code))

    def _end(self, reply: Reply) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        ended = time.monotonic_ns()
        outcome = Outcome([reply], self._job.queued, ended)
        self._ensemble.statistics.executed([self._job], outcome, self._job.queued, ended)
        self._job.deliver(reply, True)


def _input(name: str, array: Array) -> InputTensor:
    return InputTensor(name, BY_NUMPY[array.dtype], array.shape, array)
