"""Which requests are executed together, in which order, and which are not executed at all."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto

from nemoport.errors import DamagedInput
from nemoport.runner.batching import Batching, Execute, batching_of, merged, plan
from nemoport.runner.jobs import Job, Reply, job_of
from nemoport.runner.model import load_version
from nemoport.runner.model_config import ModelConfig, normalised
from nemoport.runner.pace import Pace
from nemoport.runner.queueing import Policy, Queue, queue_of
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, request_of
from nemoport.runner.scheduling import Scheduler
from nemoport.runner.statistics import Failure, Statistics
from nemoport.runner.tensors import Array

from .models import WEIGHT, identity, linear, write_model
from .test_control import until

MS = 1_000_000
ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4")) * 3


def a_job(rows: int = 1, width: int = 2, value: float = 0.0, to: Any = lambda *_: None, **parameters: Any) -> Job:
    feeds = {"X": np.full((rows, width), value, np.float32)}
    return job_of(InferRequest((), parameters=parameters), feeds, ("Y",), rows, to)


def planned(sizes: Sequence[int], waited: int = 0, **batching: Any) -> tuple[int, int]:
    jobs = [a_job(rows) for rows in sizes]
    return plan(jobs, Batching(**batching), now=waited * MS)


@pytest.mark.parametrize(
    "sizes, waited, preferred, delay, count",
    [
        ([1, 1, 1], 0, [8], 0, 3),
        ([1] * 12, 0, [8], 0, 8),
        ([3, 3, 3], 0, [8], 0, 2),
        ([8], 0, [4, 8], 5, 1),
        ([1, 1, 1], 0, [2], 5, 2),
        ([1, 1, 1], 0, [8], 5, 0),
        ([1, 1, 1], 5, [8], 5, 3),
        ([1] * 5, 0, [2, 4], 5, 4),
        ([1] * 5, 6, [2, 4], 5, 5),
        ([5, 5], 0, [8], 5, 1),
        ([7], 0, [4], 5, 0),
    ],
)
def test_a_batch_is_a_preferred_size_or_what_fits_when_the_delay_is_over(
    sizes: list[int], waited: int, preferred: list[int], delay: int, count: int
) -> None:
    found, left = planned(sizes, waited, max_items=8, preferred=frozenset(preferred), delay_ns=delay * MS)
    assert found == count
    assert left == (0 if count else (delay - waited) * MS)


def test_without_batching_requests_go_one_by_one() -> None:
    assert planned([1, 1]) == (1, 0)
    assert batching_of(ModelConfig(max_batch_size=8)) == Batching()


def test_unequal_shapes_are_never_merged_and_do_not_wait_for_each_other() -> None:
    jobs = [a_job(1, 2), a_job(1, 2), a_job(1, 3), a_job(1, 2)]
    assert plan(jobs, Batching(8, frozenset([8]), 5 * MS), now=0) == (2, 0)
    assert plan([a_job(), job_of(InferRequest(()), {}, (), 1, lambda *_: None)], Batching(8), now=0) == (1, 0)


class Model:
    """Answers when told to, and remembers what was asked together."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.go_on, self.entered = threading.Event(), threading.Semaphore(0)

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        self.batches.append(feeds["X"][:, 0].tolist())
        self.entered.release()
        assert self.go_on.wait(10)
        if -1 in feeds["X"]:
            raise Refusal("it is negative")
        return [feeds["X"] * 2 for _ in wanted]


@contextmanager
def scheduled(model: Model, config: str = "", instances: int = 1) -> Iterator[tuple[Scheduler, Statistics]]:
    message = text_format.Parse(f"max_batch_size: 8 {config}", ModelConfig())
    message, statistics = normalised(message), Statistics()
    scheduler = Scheduler(
        "m",
        merged(model.execute),
        instances,
        batching=batching_of(message),
        queue=queue_of(message),
        statistics=statistics,
        ordered=message.dynamic_batching.preserve_ordering,
    )
    try:
        yield scheduler, statistics
    finally:
        model.go_on.set()
        scheduler.close()


def send(
    scheduler: Scheduler, value: float, rows: int = 1, width: int = 2, to: Reader | None = None, **parameters: Any
) -> Future[Array]:
    answer: Future[Array] = Future()

    def settle(reply: Reply | None, last: bool) -> None:
        assert last
        if isinstance(reply, Refusal):
            answer.set_exception(reply)
        else:
            assert reply is not None
            answer.set_result(reply["Y"])

    scheduler.submit(a_job(rows, width, value, settle, **parameters), to.when_idle if to else None)
    return answer


def test_what_waits_is_merged_and_each_gets_its_own_rows() -> None:
    model = Model()
    with scheduled(model, "dynamic_batching {}") as (scheduler, statistics):
        first = send(scheduler, 0)
        assert model.entered.acquire(timeout=5)
        others = [send(scheduler, value, rows=value) for value in (1, 2, 3, 4)]
        model.go_on.set()
        assert first.result(5).tolist() == [[0, 0]]
        for value, answer in enumerate(others, 1):
            assert answer.result(5).tolist() == [[2 * value] * 2] * value
    assert model.batches == [[0], [1, 2, 2, 3, 3, 3], [4, 4, 4, 4]]
    row = statistics.as_json("m", 1)
    assert (row["inference_count"], row["execution_count"]) == (11, 3)
    assert [batch["batch_size"] for batch in row["batch_stats"]] == [1, 4, 6]


def test_a_request_that_fails_does_not_take_its_batch_along() -> None:
    model = Model()
    with scheduled(model, "dynamic_batching {}") as (scheduler, statistics):
        send(scheduler, 0)
        assert model.entered.acquire(timeout=5)
        good, bad, fine = (send(scheduler, value) for value in (1, -1, 2))
        model.go_on.set()
        assert (good.result(5)[0, 0], fine.result(5)[0, 0]) == (2, 4)
        with pytest.raises(Refusal, match="negative"):
            bad.result(5)
    assert statistics.failures == {Failure.BACKEND: 1}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError()])
def test_a_model_that_raises_anything_fails_its_request_and_goes_on(error: BaseException) -> None:
    model = Model()
    model.go_on.set()

    def execute(feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        if -1 in feeds["X"]:
            raise error
        return model.execute(feeds, wanted)

    with paced(execute, "", Pace()) as scheduler:
        for _ in range(2):
            with pytest.raises(Refusal, match=type(error).__name__):
                send(scheduler, -1).result(5)
            assert send(scheduler, 1).result(5)[0, 0] == 2


def test_instances_work_at_the_same_time() -> None:
    model = Model()
    with scheduled(model, instances=3) as (scheduler, _):
        answers = [send(scheduler, value) for value in range(4)]
        for _ in range(3):
            assert model.entered.acquire(timeout=5)
        assert not model.entered.acquire(timeout=0.05)
        model.go_on.set()
        assert [answer.result(5)[0, 0] for answer in answers] == [0, 2, 4, 6]


class Uneven(Model):
    """1 takes until it is told, everything else nothing."""

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        if feeds["X"][0, 0] == 1:
            self.entered.release()
            assert self.go_on.wait(10)
        return [feeds["X"]]


@pytest.mark.parametrize("ordered", [True, False])
def test_answers_keep_the_order_of_requests_when_the_config_says_so(ordered: bool) -> None:
    model, done, ended = Uneven(), [], threading.Semaphore(0)

    def to(reply: Any, last: bool) -> None:
        done.append(reply["Y"][0, 0])
        ended.release()

    config = f"dynamic_batching {{ preserve_ordering: {str(ordered).lower()} }}"
    with scheduled(model, config, instances=2) as (scheduler, _):
        scheduler.submit(a_job(value=1, to=to))
        assert model.entered.acquire(timeout=5)
        scheduler.submit(a_job(value=2, to=to))
        came_first = ended.acquire(timeout=0.1 if ordered else 5)
        assert came_first is not ordered
        model.go_on.set()
        for _ in range(2 if ordered else 1):
            assert ended.acquire(timeout=5)
    assert done == ([1, 2] if ordered else [2, 1])


def test_the_delay_is_waited_for_and_no_longer() -> None:
    model = Model()
    model.go_on.set()
    with scheduled(model, "dynamic_batching { max_queue_delay_microseconds: 300000 }") as (scheduler, _):
        began = time.monotonic()
        answers = [send(scheduler, value) for value in (1, 2)]
        assert [answer.result(5)[0, 0] for answer in answers] == [2, 4]
        assert 0.29 < time.monotonic() - began < 3
        full = [send(scheduler, value) for value in range(8)]
        began = time.monotonic()
        for answer in full:
            answer.result(5)
        assert time.monotonic() - began < 0.25
    assert model.batches == [[1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_a_smaller_number_is_served_first_and_none_is_the_default() -> None:
    model = Model()
    config = "dynamic_batching { preferred_batch_size: 1 priority_levels: 3 default_priority_level: 2 }"
    with scheduled(model, config) as (scheduler, _):
        send(scheduler, 0)
        assert model.entered.acquire(timeout=5)
        answers = [send(scheduler, value, priority=p) for value, p in ((1, 3), (2, 0), (3, 1), (4, 2), (5, 99))]
        model.go_on.set()
        for answer in answers:
            answer.result(5)
    assert [value for batch in model.batches for value in batch] == [0, 3, 2, 4, 5, 1]


QUEUE = "dynamic_batching { default_queue_policy { %s } }"


def test_a_full_queue_refuses_at_once() -> None:
    model = Model()
    with scheduled(model, QUEUE % "max_queue_size: 2") as (scheduler, statistics):
        answers = [send(scheduler, 0)]
        assert model.entered.acquire(timeout=5)
        answers += [send(scheduler, value) for value in (1, 2)]
        with pytest.raises(Refusal, match=r"\[request id: <id_unknown>\] Exceeds maximum queue size") as refused:
            send(scheduler, 3)
        assert refused.value.code is Code.UNAVAILABLE
        assert statistics.pending == 2
        model.go_on.set()
        assert [answer.result(5)[0, 0] for answer in answers] == [0, 2, 4]
    assert statistics.failures == {Failure.REJECTED: 1}


@pytest.mark.parametrize("action, asked", [("REJECT", 0), ("REJECT", 9), ("DELAY", 0)])
def test_who_waits_too_long_is_refused_or_served_last(action: str, asked: int) -> None:
    model = Model()
    policy = f"timeout_action: {action} default_timeout_microseconds: {10**9 if asked else 400000} "
    with scheduled(model, QUEUE % (policy + "allow_timeout_override: true")) as (scheduler, statistics):
        send(scheduler, 0)
        assert model.entered.acquire(timeout=5)
        late = send(scheduler, 1, timeout=asked)
        time.sleep(0.05 if asked else 0.45)
        fresh = send(scheduler, 2, width=3)
        model.go_on.set()
        assert fresh.result(5)[0, 0] == 4
        if action == "DELAY":
            assert late.result(5)[0, 0] == 2
            assert model.batches == [[0], [2], [1]]
        else:
            with pytest.raises(Refusal, match="Request timeout expired") as refused:
                late.result(5)
            assert refused.value.code is Code.UNAVAILABLE
            assert (model.batches, statistics.failures) == ([[0], [2]], {Failure.REJECTED: 1})


def test_a_cancelled_request_is_not_executed() -> None:
    model = Model()
    with scheduled(model) as (scheduler, statistics):
        send(scheduler, 0)
        assert model.entered.acquire(timeout=5)
        refused: Future[Any] = Future()
        job = a_job(value=1, to=lambda reply, last: refused.set_result(reply))
        scheduler.submit(job)
        job.cancel()
        model.go_on.set()
        assert refused.result(5).code is Code.CANCELLED
    assert (model.batches, statistics.failures, statistics.pending) == ([[0]], {Failure.CANCELED: 1}, 0)


def test_closing_executes_what_waits_and_refuses_the_rest() -> None:
    model, finalized = Model(), threading.Event()
    scheduler = Scheduler(
        "m",
        merged(model.execute),
        2,
        batching=Batching(8, frozenset([8]), 10**12),
        queue=Queue(),
        statistics=Statistics(),
        finalize=finalized.set,
    )
    answer = send(scheduler, 1)
    model.go_on.set()
    scheduler.close()
    assert answer.result(5)[0, 0] == 2
    assert finalized.wait(5)
    with pytest.raises(Refusal, match="is being unloaded"):
        send(scheduler, 2)


@pytest.mark.parametrize("value", [-1, 1.5, True, "1", 2**64])
def test_priority_and_timeout_are_whole_numbers(value: Any) -> None:
    for name in ("priority", "timeout"):
        with pytest.raises(Refusal, match=f"parameter '{name}' must be an unsigned integer"):
            a_job(**{name: value})


def test_a_policy_may_be_shortened_by_a_request_and_not_lengthened() -> None:
    policy = Policy(timeout_us=100, may_override=True)
    assert [policy.deadline(asked, 0) for asked in (0, 7, 200)] == [100_000, 7000, 100_000]
    assert Policy(timeout_us=100).deadline(7, 0) == 100_000
    assert Policy(may_override=True).deadline(7, 0) is None


@pytest.mark.soak
def test_many_clients_get_their_own_answers() -> None:
    """Shapes, sizes and priorities at random; none is lost, none is another's."""
    model = Model()
    model.go_on.set()
    config = "dynamic_batching { priority_levels: 2 default_priority_level: 1 max_queue_delay_microseconds: 300 }"
    with scheduled(model, config, instances=2) as (scheduler, statistics):
        chance = random.Random(7)
        for _ in range(ROUNDS):
            sent = []
            for value in range(40):
                rows, width = chance.randint(1, 8), chance.choice([2, 2, 3])
                sent.append((value, rows, width, send(scheduler, value, rows, width, priority=chance.randint(0, 2))))
            for value, rows, width, answer in sent:
                assert answer.result(10).tolist() == [[2.0 * value] * width] * rows
    assert statistics.pending == 0
    assert max(len(batch) for batch in model.batches) <= 8


def test_a_batching_model_over_onnx_gives_each_its_rows(tmp_path: Path) -> None:
    config = "max_batch_size: 16 dynamic_batching { max_queue_delay_microseconds: 20000 }"
    model = load_version(write_model(tmp_path, "m", linear(), config), "1")
    chance = np.random.default_rng(0)
    inputs = [chance.standard_normal((rows, 4)).astype(np.float32) for rows in (1, 2, 3, 4)]
    answers: list[Future[Any]] = [Future() for _ in inputs]
    for x, answer in zip(inputs, answers, strict=True):
        model.submit(request_of({"X": x}), answer.set_result)
    for x, answer in zip(inputs, answers, strict=True):
        np.testing.assert_allclose(answer.result(5).value().arrays()["Y"], x @ WEIGHT, rtol=1e-5)
    assert model.statistics.as_json("m", 1)["execution_count"] < 4
    model.close()


def test_a_model_that_loses_the_batch_is_told_so() -> None:
    run = merged(lambda feeds, wanted: [feeds["X"][:1]])
    for reply in run([a_job(), a_job()], 0).replies:
        assert "does not keep the batch" in str(reply)
    assert isinstance(run([a_job()], 0).replies[0], dict)


WARM = 'model_warmup { name: "w" batch_size: 2 inputs { key: "X" value { %s } } }'
FP32 = "data_type: TYPE_FP32 dims: 2 "


def test_warm_up_requests_are_executed_and_leave_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "m/warmup").mkdir(parents=True)
    (tmp_path / "m/warmup/x").write_bytes(bytes(8))
    given = [WARM % (FP32 + data) for data in ("zero_data: true", "random_data: true", 'input_data_file: "x"')]
    model = load_version(
        write_model(tmp_path, "m", identity(TensorProto.FLOAT, ("b", 2)), "max_batch_size: 4 " + " ".join(given)), "1"
    )
    assert model.statistics.as_json("m", 1)["inference_count"] == 0
    assert not model.notes


@pytest.mark.parametrize(
    "sample, message",
    [
        (FP32 + 'input_data_file: "absent"', "has no file"),
        (FP32 + 'input_data_file: "../config.pbtxt"', "has no file"),
        ("data_type: TYPE_FP32 dims: 3 zero_data: true", "unexpected shape for input 'X'"),
        ("data_type: TYPE_INT32 dims: 2 zero_data: true", "data-type is 'INT32'"),
        ("data_type: TYPE_FP32 dims: -1 zero_data: true", "dims without -1"),
        ("data_type: TYPE_FP32 dims: 2", "warmup setting expects input 'X' to have input_data_type set"),
    ],
)
def test_warm_up_that_cannot_be_done_is_an_error_of_the_model(tmp_path: Path, sample: str, message: str) -> None:
    config = "max_batch_size: 4 " + WARM % sample
    model = write_model(tmp_path, "m", identity(TensorProto.FLOAT, ("b", 2)), config)
    with pytest.raises(DamagedInput, match=f"failed to run warmup sample 'w' of model 'm': .*{message}"):
        load_version(model, "1")


class Reader:
    """Of requests; its thread is the test's, and `rest` is when it has read all there is."""

    def __init__(self) -> None:
        self._later: list[Callable[[], None]] = []

    def when_idle(self, work: Callable[[], None]) -> None:
        self._later.append(work)

    def rest(self) -> int:
        """How often work was promised."""
        later, self._later = self._later, []
        for work in later:
            work()
        return len(later)


@contextmanager
def paced(execute: Execute, config: str, pace: Pace) -> Iterator[Scheduler]:
    message = normalised(text_format.Parse(f"max_batch_size: 8 {config}", ModelConfig()))
    scheduler = Scheduler(
        "m",
        merged(execute),
        1,
        batching=batching_of(message),
        queue=queue_of(message),
        statistics=Statistics(),
        pace=pace,
    )
    try:
        yield scheduler
    finally:
        scheduler.close()


def test_quick_jobs_are_executed_together_where_they_are_read_when_all_are() -> None:
    seen: list[tuple[bool, int]] = []

    def execute(feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        seen.append((threading.get_ident() == here, len(feeds["X"])))
        return [feeds["X"]]

    here, reader = threading.get_ident(), Reader()
    with paced(execute, "dynamic_batching {}", Pace(quick_ns=10**15)) as scheduler:
        send(scheduler, 0, to=reader).result(5)  # nobody knows yet how long it takes
        assert reader.rest() == 0
        until(lambda: not scheduler._executing)
        answers = [send(scheduler, value, to=reader) for value in range(3)]
        assert not any(answer.done() for answer in answers)
        assert reader.rest() == 1
        assert [answer.result(0)[0, 0] for answer in answers] == [0, 1, 2]
        send(scheduler, 0, rows=2, to=reader).result(5)  # a shape that is new
        send(scheduler, 0).result(5)  # from a thread that does not say when it is idle
    assert seen == [(False, 1), (True, 3), (False, 2), (False, 1)]


@pytest.mark.parametrize("config", ["dynamic_batching {}", ""])
def test_a_slow_job_among_quick_ones_holds_up_no_reader(config: str) -> None:
    model, reader, pace = Model(), Reader(), Pace()
    pace.took([a_job()], 0)
    with paced(model.execute, config, pace) as scheduler:
        slow = send(scheduler, 1, width=3, to=reader)
        assert model.entered.acquire(timeout=5)
        quick = [send(scheduler, value, to=reader) for value in range(20)]
        reader.rest()  # and does not wait for the slow one
        assert not slow.done()
        model.go_on.set()
        assert [answer.result(5)[0, 0] for answer in quick] == [2 * value for value in range(20)]
        slow = send(scheduler, 1, width=3, to=None)
        quick = [send(scheduler, value, to=reader) for value in range(20)]
        reader.rest()
        assert [answer.result(5)[0, 0] for answer in [slow, *quick]] == [2, *(2 * value for value in range(20))]


@pytest.mark.parametrize("quick", [True, False], ids=["where it is read", "on a thread of the model"])
def test_who_fails_over_an_answer_takes_no_other_along(quick: bool) -> None:
    model, reader, pace = Model(), Reader(), Pace()
    model.go_on.set()
    if quick:
        pace.took([a_job()], 0)

    def fails(reply: Reply | None, last: bool) -> None:
        raise ValueError("a mistake of who waits")

    with paced(model.execute, "dynamic_batching {}", pace) as scheduler:
        for _ in range(2):  # in one batch, or after it: the model goes on
            scheduler.submit(a_job(to=fails), reader.when_idle)
            answer = send(scheduler, 1, to=reader)
            reader.rest()
            assert answer.result(5)[0, 0] == 2


def test_quick_jobs_that_wait_for_their_reader_are_executed_when_the_model_closes() -> None:
    model, reader, pace = Model(), Reader(), Pace()
    model.go_on.set()
    pace.took([a_job()], 0)
    with paced(model.execute, "dynamic_batching {}", pace) as scheduler:
        answer = send(scheduler, 1, to=reader)
    assert answer.result(5)[0, 0] == 2
    assert reader.rest() == 1
    with pytest.raises(Refusal, match="being unloaded"):
        send(scheduler, 0, to=reader)


def test_a_shape_is_quick_when_its_jobs_took_little_and_until_they_took_long_for_long() -> None:
    pace, job, other = Pace(quick_ns=100), a_job(1), a_job(2)
    assert not pace.is_quick(job)
    pace.took([job], 200)
    assert not pace.is_quick(job)
    pace.took([job] * 4, 320)  # 80 each
    assert pace.is_quick(job)
    assert not pace.is_quick(other)
    pace.took([job], 200)  # 95
    assert pace.is_quick(job)
    pace.took([job], 200)  # 108
    assert not pace.is_quick(job)


def test_a_delay_is_waited_for_by_quick_jobs_too() -> None:
    model, reader, pace = Model(), Reader(), Pace()
    model.go_on.set()
    pace.took([a_job()], 0)
    with paced(model.execute, "dynamic_batching { max_queue_delay_microseconds: 200000 }", pace) as scheduler:
        answers = [send(scheduler, value, to=reader) for value in (1, 2)]
        reader.rest()
        assert [answer.result(5)[0, 0] for answer in answers] == [2, 4]
    assert model.batches == [[1, 2]]
