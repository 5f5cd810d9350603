"""Poll mode: the repositories are looked at every few seconds, and what changed is loaded, reloaded or unloaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nemoport.errors import NemoportError
from nemoport.runner.server import Server

log = logging.getLogger(__name__)


def poll(server: Server) -> None:
    """Once. A model that cannot be loaded is tried again when it changes, and what was served before stays."""
    found = server.changed()
    for name in found.gone:
        log.info("'%s' left the repository", name)
        server.unload(name)
    for name in found.changed:
        try:
            server.load(name)
        except NemoportError as error:
            log.error("%s", error)


@contextmanager
def polling(server: Server, seconds: float) -> Iterator[None]:
    """Again and again, in a thread, while the block runs."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(seconds):
            try:
                poll(server)
            except (NemoportError, OSError) as error:  # a repository that is away for a while
                log.error("polling failed: %s", error)

    thread = threading.Thread(target=work, name="polling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
