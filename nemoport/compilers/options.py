"""Options that several builders have, said once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.compilers.build import Option
from nemoport.errors import UsageError

MAX_BATCH_SIZE = Option(name="max_batch_size", kind=int, help="Requests at a time, at most.")
CONTAINER = Option(name="container", metavar="IMAGE", help="The image that a build job runs in.")
TIMING_CACHE = Option(
    name="timing_cache", kind=Path, metavar="FILE", help="TensorRT's timings: read where it is there, and left there."
)

_IMAGE = re.compile(r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?", re.ASCII)


def image(options: Mapping[str, Any], usual: str) -> str:
    """The image that was asked for, or else the usual one. It goes into a Dockerfile as it is."""
    name = str(options.get(CONTAINER.name, usual))
    if not _IMAGE.fullmatch(name):
        raise UsageError(f"--container {name!r} is no name of an image; write it as {usual}")
    return name
