"""One writer at a time, who says who it is; one that is gone does not stand in the way."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemoport.errors import MachineError
from nemoport.repository import lock
from nemoport.repository.lock import locked, ourselves, read_owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def test_the_file_says_who_holds_it_and_nobody_after(path: Path) -> None:
    with locked(path, "it"):
        owner = read_owner(path.read_bytes())
        assert owner
        assert (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
        assert owner.since <= time.time() < owner.until
    assert path.read_bytes() == b""


def test_a_lease_of_another_host_holds_until_it_expires(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system whose flock does not reach from host to host."""
    monkeypatch.setattr(lock, "PATIENCE", 0)
    elsewhere = replace(ourselves(), host="elsewhere", user="ada")
    path.write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(MachineError, match=r"ada@elsewhere, process \d+, since 20"), locked(path, "it"):
        pass
    path.write_text(json.dumps(asdict(replace(elsewhere, until=time.time() - 1))))
    with locked(path, "it"):
        pass


def test_the_lease_of_a_process_here_that_is_gone_is_taken_over_and_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(json.dumps(asdict(replace(ourselves(), pid=2**22 + 1))))
    with caplog.at_level(logging.WARNING), locked(path, "it"):
        pass
    assert "is stale and was taken over" in caplog.text


def test_torn_words_stop_nobody(path: Path) -> None:
    path.write_text('{"user": "a')
    with locked(path, "it"):
        pass


def test_a_lease_is_renewed_while_it_is_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "EXPIRY", 0.03)
    with locked(path, "it"):
        first = read_owner(path.read_bytes())
        end = time.monotonic() + 10
        while time.monotonic() < end:
            now = read_owner(path.read_bytes())
            if now and first and now.until > first.until:
                break
        assert now
        assert first
        assert now.until > first.until
        assert abs(now.since - first.since) < 1
