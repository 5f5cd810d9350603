"""What is meant to load an artifact, from the word for it: `tritonserver:26.07-trtllm@h100`, `26.07`, `nim`.

    NAME [ :RELEASE ] [ @GPU ]

A runtime is one or more places, each of them engines with their versions. A release of Triton without a container is
all its containers; a name without a release is any. An engine without a version is there, and which one it is was seen
nowhere.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemoport.compatibility import rows
from nemoport.compatibility.rows import ELSEWHERE, LEAST_SM, NIM, ONLY, OPSETS, SM_OF, TRITON, Triton
from nemoport.compatibility.versions import Version, known, version
from nemoport.errors import UsageError

ALONE = {
    "vllm": "vllm",
    "sglang": "sglang",
    "trtllm": "tensorrt_llm",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
}
"""The words for one engine by itself."""
WORDS = ("tritonserver", "nim", *ALONE)
FORMS = "tritonserver:26.07, tritonserver:26.07-trtllm, trtllm:1.2, vllm:0.24, onnxruntime:1.27, nim:2.1"
FORMS += ", or with a GPU, tritonserver:26.02-trtllm@h100"
FLAVOURS = ("py3", "trtllm", "vllm")
"""Triton's containers."""
RELEASE = re.compile(r"\d\d\.(?:0[1-9]|1[0-2])")
_TRITON = re.compile(rf"(?P<release>{RELEASE.pattern})(?:-(?P<flavour>py3|trtllm|vllm)(?:-python-py3)?)?")


@dataclass(frozen=True, kw_only=True)
class Held:
    """A place that holds engines: one container, or one engine by itself."""

    word: str
    place: rows.Place
    engines: Mapping[str, Version | None]
    """By the names of `loads.NAMES`."""
    least_sm: int | None = None

    def __str__(self) -> str:
        return self.word

    @property
    def image(self) -> str | None:
        """The container as it is pulled; None where it is none of Triton's."""
        if self.place != "triton":
            return None
        return f"nvcr.io/nvidia/{self.word}" + ("" if self.word.endswith("py3") else "-python-py3")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    word: str
    places: tuple[Held, ...]
    sm: int | None = None
    """Of the GPU, where one is named."""
    release: str = ""
    """Of Triton, where one is named."""
    note: str = ""
    """What is to be known of all verdicts: that no row speaks of this release."""

    def __str__(self) -> str:
        return self.word


def runtime(word: str) -> Runtime:
    """A runtime by its word. A release that no row speaks of has engines without versions, and a note."""
    name, at, gpu = word.removeprefix("nvcr.io/nvidia/").partition("@")
    kind, _, release = name.partition(":")
    if not release and RELEASE.fullmatch(kind):
        kind, release = "tritonserver", kind
    if kind not in WORDS:
        near = difflib.get_close_matches(kind, WORDS, n=1)
        meant = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"{word!r} is no runtime that nemoport knows{meant}; write {FORMS}")
    places, triton, note = _places(word, kind, release)
    return Runtime(word=word, places=places, sm=sm(gpu) if at else None, release=triton, note=note)


def triton(release: str) -> Runtime:
    """All containers of a release."""
    return runtime(f"tritonserver:{release}")


def lacks_backend(place: Held, backend: str) -> bool:
    """Of Triton's own backends; what else a container may have been given is not known."""
    flavour = place.word.rpartition("-")[2]
    return backend not in ONLY[flavour] if flavour in ONLY else backend in ELSEWHERE


def opset(runtime: Runtime) -> int | None:
    """The newest of ai.onnx that the ONNX Runtime there takes; None where no row says."""
    held = [found for place in runtime.places if (found := place.engines.get("onnxruntime"))]
    said = [row.opset for row in OPSETS for each in held if each.within(known(row.onnxruntime))]
    return max(said, default=None)


def sm(word: str) -> int:
    """A GPU by its name or its SM: h100, sm90, 9.0."""
    found = re.fullmatch(r"(?:sm_?)?(\d{2,3}|\d{1,2}\.\d)a?", word.lower())
    if found:
        return int(found[1].replace(".", ""))
    name = re.sub(r"[-_ ]", "", word.lower())
    if name not in SM_OF:
        raise UsageError(f"{word!r} is no GPU that nemoport knows; write {', '.join(SM_OF)}, or its SM, such as sm90")
    return SM_OF[name]


def _places(word: str, kind: str, release: str) -> tuple[tuple[Held, ...], str, str]:
    """With the release of Triton, and a note."""
    if kind == "tritonserver":
        if not release:
            return tuple(place for row in TRITON for place in _containers(row.release, row)), "", ""
        return _of_triton(word, release)
    said = version(release.removesuffix(".x")) if release else None
    if release and said is None:
        raise UsageError(f"{word!r} names no release; write {FORMS}")
    if kind == "nim":
        return _of_nim(word, said)
    return (Held(word=f"{kind}:{release}" if release else kind, place="alone", engines={ALONE[kind]: said}),), "", ""


def _of_triton(word: str, release: str) -> tuple[tuple[Held, ...], str, str]:
    if (found := _TRITON.fullmatch(release)) is None:
        raise UsageError(
            f"{word!r} names no release of Triton, which are called by year and month, such as {TRITON[0].release}; "
            f"a container has one of {', '.join(FLAVOURS)} after it; write {FORMS}"
        )
    named = found["release"]
    row = next((row for row in TRITON if row.release == named), None)
    near = _nearest(named, [row.release for row in TRITON])
    wanted = (found["flavour"],) if found["flavour"] else FLAVOURS
    every = zip(FLAVOURS, _containers(named, row), strict=True)
    places = tuple(place for flavour, place in every if flavour in wanted)
    return places, named, "" if row else _strange(f"Triton {named}", near)


def _of_nim(word: str, said: Version | None) -> tuple[tuple[Held, ...], str, str]:
    """The release itself; of a line such as 2.1 its releases."""
    found = [row for row in NIM if said is None or known(row.release).within(said)]
    if found or said is None:
        places = tuple(
            Held(word=f"nim:{row.release}", place="nim", engines=_versions({"nim": row.release, **row.engines}))
            for row in found
        )
        return places, "", ""
    near = _nearest(str(said), [row.release for row in NIM])
    alike = next(row.engines for row in NIM if row.release == near)
    held = Held(word=word.partition("@")[0], place="nim", engines={"nim": said, **dict.fromkeys(alike)})
    return (held,), "", _strange(f"NIM {said}", near)


def _nearest(release: str, releases: list[str]) -> str:
    """The newest before it, of releases of which the newest comes first."""
    return next((each for each in releases if known(each) <= known(release)), releases[-1])


def _strange(what: str, near: str) -> str:
    return f"no row speaks of {what}, and of what is in it nothing is known; the nearest that is known is {near}"


def _containers(release: str, row: Triton | None) -> Iterator[Held]:
    least = max((each.sm for each in LEAST_SM if each.release == release), default=None)
    held: Mapping[str, Mapping[str, str | None]] = {
        "py3": {"onnxruntime": row.onnxruntime if row else None, "tensorrt": None, "pytorch": release},
        "trtllm": {"tensorrt_llm": row.tensorrt_llm if row else None},
        "vllm": {"vllm": row.vllm if row else None},
    }
    for flavour in FLAVOURS:
        engines = _versions({**held[flavour], "python": release, "triton": release})
        yield Held(word=f"tritonserver:{release}-{flavour}", place="triton", engines=engines, least_sm=least)


def _versions(said: Mapping[str, str | None]) -> dict[str, Version | None]:
    return {engine: known(text) if text else None for engine, text in said.items()}
