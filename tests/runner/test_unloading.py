"""What is said of models that were unloaded, here and on a real tritonserver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonserver import tritonserver

from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .differences import unexplained
from .python_models import ADD_SUB, ECHO, X_CONFIG, write_python
from .test_control import until
from .test_ensembles import FIRST, SECOND, ensemble
from .test_http import two
from .test_same_python_models import X, infer, over_http

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


def versions(address: str) -> dict[str, str]:
    rows = over_http(address, ("/v2/repository/index", b"")).body
    return {row["version"]: row["state"] for row in rows}


def reloads(address: str, model: Path) -> list[Any]:
    """What is said while a second version is broken, while both are served, and when the policy leaves one."""
    load, config = ("/v2/repository/models/m/load", b""), (model / "config.pbtxt").read_text()
    said: list[Any] = []
    (model / "2").mkdir()
    policies = ("", "version_policy { all {} }", "version_policy { specific { versions: 1 } }")
    for code, policy in zip(("1 / 0", ECHO, ECHO), policies, strict=True):
        (model / "2/model.py").write_text(code)
        (model / "config.pbtxt").write_text(config + policy)
        said.append(over_http(address, load).status)
        until(lambda: "UNLOADING" not in versions(address).values())
        asked = [infer(f"m{version}", X) for version in ("", "/versions/1", "/versions/2")]
        said += [versions(address), *(over_http(address, call).status for call in asked)]
        said.append(over_http(address, ("/v2/health/ready", None)).status)
    return said


def test_a_version_that_fails_or_goes_is_told_as_on_triton(tmp_path: Path) -> None:
    said = []
    for place in ("theirs", "ours"):
        write_python(tmp_path / place, "m", ECHO, X_CONFIG)
    with tritonserver(tmp_path / "theirs", load=["m"]) as real:
        said.append(reloads(real.http.removeprefix("http://"), tmp_path / "theirs/m"))
    with serving(start([tmp_path / "ours"], explicit=True, load_model=["m"])) as address:
        said.append(reloads(address, tmp_path / "ours/m"))
    assert said[0] == said[1]
