"""Where this server is meant to answer otherwise than tritonserver 2.51, each with its reason.

A difference that no row explains fails the comparison, and so does a row that explains none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """An answer over HTTP or gRPC: the status, the type of the body, the body."""

    status: int | str
    kind: str | None
    body: Any

    @property
    def error(self) -> str:
        return str(self.body.get("error", "")) if isinstance(self.body, dict) else str(self.body)


@dataclass(frozen=True)
class Difference:
    reason: str
    explains: Callable[[Said, Said], bool]
    """Theirs and ours."""


def _same_but(*fields: str) -> Callable[[Said, Said], bool]:
    return lambda their, our: all(
        getattr(their, name) == getattr(our, name) for name in ("status", "kind", "body") if name not in fields
    )


def _is_kind(their: Said, our: Said) -> bool:
    return _same_but("kind")(their, our) and (their.kind, our.kind) == ("text/plain", "application/json")


def _is_blame(their: Said, our: Said) -> bool:
    theirs = their.status == 500 or (their.status == 503 and "log_format" in their.error)
    return theirs and (our.status, our.kind) == (400, their.kind) and bool(our.error)


def _is_datatype(their: Said, our: Said) -> bool:
    return their.status == our.status and "'<invalid>'" in their.error and "invalid datatype" in our.error


def _is_raw_count(their: Said, our: Said) -> bool:
    return their.status == our.status and "raw input contents" in our.error


def _is_raw_name(their: Said, our: Said) -> bool:
    renamed = their.error.replace("'raw_input'", "'X'")
    return their.status == our.status and "'raw_input'" in their.error and renamed == our.error


def _is_no_object(their: Said, our: Said) -> bool:
    return their.status == our.status and "non-object as object" in our.error


def _is_response_stats(their: Said, our: Said) -> bool:
    if not (isinstance(their.body, dict) and "model_stats" in their.body and _same_but("body")(their, our)):
        return False
    (theirs,), (ours,) = their.body["model_stats"], our.body["model_stats"]
    return bool(ours["response_stats"]) and theirs == ours | {"response_stats": {}}


def _is_failure_count(their: Said, our: Said) -> bool:
    if not (isinstance(their.body, dict) and "model_stats" in their.body and _same_but("body")(their, our)):
        return False
    (theirs,), (ours,) = their.body["model_stats"], our.body["model_stats"]
    counts = [row["inference_stats"] for row in (theirs, ours)]
    totals = [row["success"]["count"] + row["fail"]["count"] for row in counts]
    return bool(ours["name"] == "failing" and totals[0] == totals[1] and counts[1]["success"]["count"] == 0)


def _is_fail_again(their: Said, our: Said) -> bool:
    if not (isinstance(their.body, dict) and "model_stats" in their.body and _same_but("body")(their, our)):
        return False
    (theirs,), (ours,) = their.body["model_stats"], our.body["model_stats"]
    again, failed = (row["inference_stats"]["fail"] for row in (theirs, ours))
    same = {"response_stats": {}, "inference_stats": ours["inference_stats"] | {"fail": again}}
    return bool(0 < failed["count"] < again["count"] <= 2 * failed["count"] and theirs == ours | same)


def _is_several(their: Said, our: Said) -> bool:
    return (their.status, our.status) == (200, 404) and "exactly 1 response" in their.error and "stumbled" in our.error


DIFFERENCES = (
    Difference("errors of an execution are called JSON, which they are; Triton calls its own text/plain", _is_kind),
    Difference("what is wrong with a request is never the server's fault: Triton's JSON layer answers 500", _is_blame),
    Difference("a datatype that does not exist is named at once; Triton says '<invalid>'", _is_datatype),
    Difference("more raw contents than inputs are refused as such; Triton reads the first ones", _is_raw_count),
    Difference("a raw request's only input is called by its name; Triton says 'raw_input'", _is_raw_name),
    Difference("an input that is no object is called that; Triton misses its members", _is_no_object),
    Difference("a request that a model answers with an error has failed; Triton counts a success", _is_failure_count),
    Difference("responses of decoupled models are counted; the python backend of 24.10 does not", _is_response_stats),
)


ENSEMBLES = (
    Difference("responses of decoupled ensembles are counted; the core of 24.10 does not", _is_response_stats),
    Difference("a request that fails is counted once; Triton counts it again if nothing is under way", _is_fail_again),
    Difference("generate tells of an error behind several answers; Triton tells that they are several", _is_several),
)
"""Of which a member is decoupled."""
LEAVING = (
    Difference(
        "a member under way hears that the client of its ensemble has left; Triton cancels the steps to come, no other",
        lambda their, our: (their.body, our.body) == ("led stayed", "led left"),
    ),
)
"""What a model knows of its client."""


def unexplained(
    calls: Iterable[Any], theirs: Iterable[Said], ours: Iterable[Said], differences: Iterable[Difference] = DIFFERENCES
) -> tuple[list[Any], list[str]]:
    """The calls with both answers that no row explains, and the reasons of rows that were not needed."""
    left, needed = [], set()
    for call, their, our in zip(calls, theirs, ours, strict=True):
        if their == our:
            continue
        rows = [row.reason for row in differences if row.explains(their, our)]
        needed.update(rows)
        if not rows:
            left.append((call, their, our))
    return left, [row.reason for row in differences if row.reason not in needed]
