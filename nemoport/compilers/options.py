"""Options that several builders have, said once."""

from __future__ import annotations

from pathlib import Path

from nemoport.compilers.build import Option

MAX_BATCH_SIZE = Option(name="max_batch_size", kind=int, help="Requests at a time, at most.")
CONTAINER = Option(name="container", metavar="IMAGE", help="The image that a build job runs in.")
TIMING_CACHE = Option(
    name="timing_cache", kind=Path, metavar="FILE", help="TensorRT's timings: read where it is there, and left there."
)
