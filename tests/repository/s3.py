"""An S3 server in this process: moto's, over real HTTP. It can end the process of a client before its n-th write."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_buckets = count()


@dataclass
class Store:
    endpoint: str
    bucket: str
    """A fresh one: moto keeps its buckets as long as the process."""
    writes: list[str] = field(default_factory=list)
    """PUT, POST and DELETE requests that arrived."""
    end: tuple[int, Callable[[], None]] | None = None
    """What to do instead of the n-th write."""

    @property
    def environment(self) -> dict[str, str]:
        """Where a client takes its endpoint and credentials from."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"

    @cached_property
    def files(self) -> Any:
        return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)

    def download(self, prefix: str, target: Path) -> Path:
        """What a tritonserver sees that is started on the prefix."""
        target.mkdir(parents=True)
        for path in self.files.find(f"{self.bucket}/{prefix}"):
            place = target / path.removeprefix(f"{self.bucket}/{prefix}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(place))
        return target


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    store = Store("", f"models-{next(_buckets)}")

    def counted(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
            store.writes.append(environ["PATH_INFO"])
            if store.end and len(store.writes) == store.end[0]:
                store.end[1]()
                start("503 Service Unavailable", [])
                return [b""]
        return application(environ, start)  # type: ignore[no-any-return]

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    try:
        store.files.mkdir(store.bucket)
        store.writes.clear()
        yield store
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


def kill_at(store: Store, write: int, process: int) -> None:
    """Kill a process when its n-th write from now arrives; that write is not done."""
    store.writes.clear()
    store.end = (write, lambda: os.kill(process, signal.SIGKILL))
