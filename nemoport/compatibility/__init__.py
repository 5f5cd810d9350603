"""Which release loads which artifact: what was seen, as rows, and verdicts that follow from them.

    versions    versions in order
    loads       a line of a manifest's `loads`, read
    fields      since when Triton's config has each field
    rows        containers, engines, GPUs, and how an artifact gets to an engine, each row with its source
    runtimes    `tritonserver:26.07-trtllm@h100` as places with engines
    verdict     an artifact and a runtime: it loads, it needs something first, it is refused, or it is not known

What loads an artifact is said once, in the `loads` of its target, quantizer, family or builder, so that a plug-in needs
no row here. Pure, and of the standard library alone, so that every tower may ask.
"""

from nemoport.compatibility import rows
from nemoport.compatibility.fields import FIELDS, PLATFORMS, VALUES
from nemoport.compatibility.loads import NAMES, Claim, claims
from nemoport.compatibility.rows import KINDS, NIM, PLACES, TRITON, WAYS
from nemoport.compatibility.runtimes import ALONE, FLAVOURS, Held, Runtime, lacks_backend, opset, runtime, triton
from nemoport.compatibility.verdict import (
    Outcome,
    Verdict,
    contradiction,
    instead,
    judge,
    least_triton,
    misfit,
    newest_triton,
)
from nemoport.compatibility.versions import Version, version

__all__ = [
    "ALONE",
    "FIELDS",
    "FLAVOURS",
    "KINDS",
    "NAMES",
    "NIM",
    "PLACES",
    "PLATFORMS",
    "TRITON",
    "VALUES",
    "WAYS",
    "Claim",
    "Held",
    "Outcome",
    "Runtime",
    "Verdict",
    "Version",
    "claims",
    "contradiction",
    "instead",
    "judge",
    "lacks_backend",
    "least_triton",
    "misfit",
    "newest_triton",
    "opset",
    "rows",
    "runtime",
    "triton",
    "version",
]
