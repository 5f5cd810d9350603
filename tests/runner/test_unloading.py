"""What is said of models that were unloaded, here and on a real tritonserver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonserver import tritonserver

from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .differences import unexplained
from .python_models import ADD_SUB, write_python
from .test_control import until
from .test_ensembles import FIRST, SECOND, ensemble
from .test_http import two
from .test_same_python_models import infer, over_http

UNLOADED = [
    infer("good", *two()),
    *(infer(f"add_sub{version}", *two()) for version in ("", "/versions/1", "/versions/2")),
    ("/v2/models/good", None),
    ("/v2/models/good/ready", None),
    ("/v2/models/add_sub/config", None),
    ("/v2/models/add_sub/stats", None),
    ("/v2/repository/index", b""),
    ("/v2/repository/index", b'{"ready": true}'),
]


def lives(address: str) -> list[Any]:
    """What is said of an ensemble and its member when either has been unloaded, and how each comes back."""

    def left() -> bool:
        rows = over_http(address, ("/v2/repository/index", b"")).body
        return not any(row.get("state") in ("READY", "UNLOADING") for row in rows)

    said = []
    for model, body in (("good", b'{"parameters": {"unload_dependents": true}}'), ("add_sub", b"")):
        said.append(over_http(address, ("/v2/repository/models/good/load", b"")))
        said.append(over_http(address, (f"/v2/repository/models/{model}/unload", body)))
        until(left)
        said += [over_http(address, call) for call in UNLOADED]
    said.append(over_http(address, ("/v2/repository/models/good/load", b"")))
    return said


def test_what_was_unloaded_is_told_as_on_triton(tmp_path: Path) -> None:
    write_python(tmp_path, "add_sub", ADD_SUB)
    (tmp_path / "good/1").mkdir(parents=True)
    (tmp_path / "good/config.pbtxt").write_text(ensemble(FIRST, SECOND))
    with tritonserver(tmp_path, load=[]) as real:
        theirs = lives(real.http.removeprefix("http://"))
    with serving(start([tmp_path], explicit=True)) as address:
        left, _ = unexplained(range(len(theirs)), theirs, lives(address))
    assert not left, "\n".join(map(str, left))
