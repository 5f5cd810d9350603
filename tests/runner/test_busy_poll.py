"""A thread stays awake for a client that asks at once, and for no other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http

from nemoport.runner.busy_poll import BusyPoll

from .models import linear, write_model
from .served import served

LONG = 60 * 10**9


def test_it_is_awake_between_an_answer_and_the_next_request_when_that_came_soon_before() -> None:
    poll = BusyPoll(LONG)
    assert not poll.is_awake()
    for awake in (False, True, True):
        poll.asked()
        assert not poll.is_awake()
        poll.asked()
        poll.answered()
        assert poll.is_awake() == awake


def test_it_sleeps_when_the_moment_is_over_and_for_clients_that_take_longer() -> None:
    poll = BusyPoll(moment_ns := 10**6)
    for _ in range(3):
        poll.asked()
        poll.answered()
        time.sleep(3 * moment_ns / 1e9)
        assert not poll.is_awake()


@pytest.mark.parametrize("door, client", [("http", tritonclient.http), ("grpc", tritonclient.grpc)])
def test_a_server_that_nobody_asks_any_more_sleeps(tmp_path: Path, door: str, client: object) -> None:
    write_model(tmp_path / "models", "linear", linear())
    with served(tmp_path / "models") as (addresses, process):
        with client.InferenceServerClient(getattr(addresses, door)) as asking:  # type: ignore[attr-defined]
            for _ in range(300):
                assert asking.is_server_live()
        before = process.cpu_times()
        time.sleep(1)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.5
