"""Calls of gRPC on one thread: what `grpc.server` would do, without its threads."""

from __future__ import annotations

import random
from threading import Timer

import grpc
import pytest

from nemoport.runner.grpc.calls import Call, CallServer, Method

OPEN = 30


def at_once(call: Call) -> None:
    call.receive(lambda content: call.answer(content or b""))


def when_idle(call: Call) -> None:
    def heard(content: bytes | None) -> None:
        assert call.when_idle is not None
        call.when_idle(lambda: call.answer(content or b""))

    call.receive(heard)


def later(call: Call) -> None:
    call.receive(lambda content: Timer(0.1 * random.random(), call.answer, [content]).start())


def never(call: Call) -> None:
    call.receive(lambda content: None)


def broken(call: Call) -> None:
    raise ValueError("a mistake of ours")


def serving(**methods: Method) -> tuple[CallServer, str]:
    server = CallServer("127.0.0.1:0", {f"/s/{name}".encode(): method for name, method in methods.items()}, ())
    return server, f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("method", [at_once, when_idle, later])
def test_many_calls_at_a_time_are_each_answered_with_their_own(method: Method) -> None:
    server, address = serving(echo=method)
    with grpc.insecure_channel(address) as channel:
        said = [b"%d" % number * (number * 40) for number in range(OPEN)]
        calls = [channel.unary_unary("/s/echo").future(each) for each in said]
        assert [call.result(timeout=20) for call in calls] == said
    server.close(1)


def test_a_method_that_fails_takes_no_other_call_with_it() -> None:
    server, address = serving(broken=broken, echo=at_once)
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError, match="INTERNAL"):
            channel.unary_unary("/s/broken")(b"x", timeout=20)
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            channel.unary_unary("/s/nothing")(b"x", timeout=20)
        assert channel.unary_unary("/s/echo")(b"x", timeout=20) == b"x"
    server.close(1)


@pytest.mark.parametrize("seconds", [0, 0.05])
def test_a_server_closes_whatever_its_calls_are_doing(seconds: float) -> None:
    chance = random.Random(3)
    for _ in range(20):
        server, address = serving(at_once=at_once, when_idle=when_idle, later=later, never=never)
        with grpc.insecure_channel(address) as channel:
            names = [chance.choice(["at_once", "when_idle", "later", "never", "nothing"]) for _ in range(OPEN)]
            calls = [channel.unary_unary(f"/s/{name}").future(bytes(chance.choice([1, 10**5]))) for name in names]
            for call in calls[::7]:
                call.cancel()
            if chance.random() < 0.5:
                assert channel.unary_unary("/s/at_once")(b"x", timeout=20) == b"x"
            server.close(seconds)
            assert all(call.exception(timeout=20) or call.result() for call in calls if not call.cancelled())
