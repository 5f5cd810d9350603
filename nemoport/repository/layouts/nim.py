"""`nim`: a directory that NIM for LLMs serves, and beside it what it is told.

    DIR/                  exactly what NIM reads, mounted at /model-store
    DIR.nim/nim.env       the environment, for `docker run --env-file`
    DIR.nim/layout.json   which line of NIM, the served name, the profile by its tag, every file
    DIR.nim/manifest.json, ledger.jsonl    the artifact's own, whose digests still hold

    Hugging Face              TensorRT-LLM checkpoint        TensorRT-LLM engine
    config.json               config.json (Hugging Face's)   config.json (Hugging Face's)
    generation_config.json    generation_config.json         generation_config.json
    model*.safetensors        trtllm_ckpt/config.json        trtllm_engine/config.json
    tokenizer.json ...        trtllm_ckpt/rank*.safetensors  trtllm_engine/rank*.engine
                              tokenizer.json ...             tokenizer.json ...

The directories are those of https://docs.nvidia.com/nim/large-language-models/latest/ft-support.html (1.x, where a root
without Hugging Face's config.json is refused: .../1.11.0/troubleshoot.html), and for 2.x an ordinary Hugging Face one
(.../2.1.5/deployment/model-free-nim.html). Profiles are known by tags, because ids are hashes that change with releases
(.../2.1.5/deployment/model-profiles-and-selection.html).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import Artifact, File
from nemoport.compatibility import claims, judge, runtime
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.repository.unfinished import check_free, unfinished
from nemoport.spec import LanguageModel

LINES = ("1.x", "2.x")
STORE = "/model-store"
"""Where the directory is mounted."""
BESIDE, RECORD, ENVIRONMENT = ".nim", "layout.json", "nim.env"
SCHEMA = 1
FILE_MODE, DIRECTORY_MODE = 0o644, 0o755
"""NIM runs as whoever the container is run as, and files that only their owner reads break its checksums."""
NOT_SERVED = (artifact.MANIFEST, artifact.LEDGER, artifact.ORIGIN, artifact.REPORT, "calibration.npz")
HUGGING_FACE = ("config.json", "generation_config.json")
TEXT = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "tekken.json")
"""Patterns of the files of which a tokenizer has one."""
QUANTIZATION = "hf_quant_config.json"
PRECISIONS = {"FP8": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4"}
"""ModelOpt's words, and NIM 2.x's in tags; of the others it has no tag."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How artifacts of one kind lie in the directory."""

    kind: str
    lines: tuple[str, ...]
    below: str = ""
    """The directory of the artifact's own files."""
    own: tuple[str, ...] = ()
    """Patterns of those; all others stay at the root."""
    environment: Mapping[str, str]
    """Beyond what all are told."""


_LEGACY = {"NIM_USE_TRTLLM_LEGACY_BACKEND": "1", "NIM_DISABLE_TRTLLM_PYTORCH_RT": "1"}
"""From 1.15 on the usual backend of TensorRT-LLM takes no fine-tuned models."""
SHAPES = {
    "hf": Shape(kind="hf", lines=LINES, environment={}),
    "trtllm": Shape(
        kind="trtllm",
        lines=("1.x",),
        below="trtllm_ckpt",
        own=("config.json", "rank*.safetensors"),
        environment=_LEGACY,
    ),
    "trtllm_engine": Shape(
        kind="trtllm_engine",
        lines=("1.x",),
        below="trtllm_engine",
        own=("config.json", "rank*.engine"),
        environment=_LEGACY,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that will be written; nothing has been."""

    source: Path
    destination: Path
    made: Artifact
    line: str
    served_name: str
    profile: str | None
    """Its tag; None where NIM has none, and chooses by itself."""
    environment: Mapping[str, str]
    moved: Mapping[str, str]
    """Files of the artifact, by their place in the directory."""
    added: Mapping[str, bytes]
    """Files that the artifact lacks."""


def plan(
    source: Path,
    line: str,
    destination: Path,
    *,
    served_name: str,
    tp: int | None = None,
    described: Callable[[Artifact], Mapping[str, bytes]],
) -> Layout:
    """`described` gives Hugging Face's config.json and generation_config.json of a model whose artifact has neither."""
    made = artifact.read_manifest(source)
    check_free(destination)
    artifact.check_outside(destination, source, "artifact")
    shape = _shape(source, made, line)
    if tp is not None and shape.kind != "hf" and tp != made.plan.tp:
        raise UsageError(f"{source} is cut for tp={made.plan.tp}, tp={tp} was asked for; convert it again")
    files = [file.path for file in made.files if file.path not in NOT_SERVED]
    moved = {_place(file, shape): file for file in files}
    if not any(fnmatchcase(place, pattern) for place in moved for pattern in TEXT):
        raise UnsupportedInput(
            f"{source} has no tokenizer, and NIM is given text; put its files into the source and convert again"
        )
    added = {} if HUGGING_FACE[0] in moved else dict(described(made))
    ranks = tp or made.plan.tp
    backend = _backend(made, shape)
    profile = backend if line == "1.x" else _tag(source, made, backend, ranks)
    return Layout(
        source=source,
        destination=destination,
        made=made,
        line=line,
        served_name=served_name,
        profile=profile,
        environment=_environment(line, shape, served_name, backend, ranks),
        moved=dict(sorted(moved.items())),
        added=dict(sorted(added.items())),
    )


def write(layout: Layout) -> tuple[str, ...]:
    """The directory, complete with one rename, and before it what lies beside; gives the names of its files. They are
    linked where that keeps their mode, else copied."""
    record = beside(layout.destination)
    with unfinished(layout.destination) as model:
        if (record / RECORD).is_file():
            shutil.rmtree(record)  # of a run that was killed before the last rename
        with unfinished(record) as told:
            artifact.verify(layout.source, layout.made)
            for place, file in layout.moved.items():
                _bring(layout.source / file, model / place)
            for place, content in layout.added.items():
                _write(model / place, content)
            files = [artifact.describe(model / place, model) for place in layout.added]
            _write(told / RECORD, artifact.json_bytes(_record(layout, files)))
            _write(told / ENVIRONMENT, environment_file(layout).encode())
            for name in (artifact.MANIFEST, artifact.LEDGER):
                if (layout.source / name).is_file():
                    _bring(layout.source / name, told / name)
            for directory in (model, told, *(path for path in model.rglob("*") if path.is_dir())):
                directory.chmod(DIRECTORY_MODE)
    return (*sorted({*layout.moved, *layout.added}),)


def beside(directory: Path) -> Path:
    """What is known of a directory for NIM, and is no part of it."""
    whole = directory.resolve()
    return whole.with_name(f"{whole.name}{BESIDE}")


def environment_file(layout: Layout) -> str:
    """As `docker run --env-file` reads it."""
    lines = [f"# NIM {layout.line}: docker run --gpus all --env-file nim.env -v DIR:{STORE}:ro IMAGE"]
    if layout.line == "1.x":
        lines.append(f"# a container for one model: NIM_FT_MODEL={STORE} and NIM_CUSTOM_MODEL_NAME, not NIM_MODEL_NAME")
    elif layout.profile:
        lines.append(f"# profile {layout.profile}: NIM_MODEL_PROFILE takes its id, which list-model-profiles says")
    return "\n".join([*lines, *(f"{name}={value}" for name, value in layout.environment.items())]) + "\n"


def ranks_of(below: Mapping[str, Any]) -> int | None:
    """How many ranks the config.json of a checkpoint or of engines asks for."""
    config = below.get("pretrained_config", below)
    mapping = config.get("mapping") if isinstance(config, dict) else None
    world = mapping.get("world_size") if isinstance(mapping, dict) else None
    return world if isinstance(world, int) and world > 0 else None


def _shape(source: Path, made: Artifact, line: str) -> Shape:
    verdict = judge(made.kind, made.loads, runtime(f"nim:{line}"))
    if verdict.refused or made.kind not in SHAPES:
        raise UsageError(f"{source} {verdict}; {verdict.first or 'NIM 2.x takes what --to hf writes, 1.x trtllm too'}")
    if not isinstance(made.spec.head, LanguageModel):
        raise UnsupportedInput(
            f"{source} is of the family {made.spec.family}, and NIM for LLMs serves what writes text"
        )
    return SHAPES[made.kind]


def _place(file: str, shape: Shape) -> str:
    return f"{shape.below}/{file}" if any(fnmatchcase(file, pattern) for pattern in shape.own) else file


def _backend(made: Artifact, shape: Shape) -> str:
    """By NIM's names."""
    if shape.kind != "hf":
        return "tensorrt_llm"
    engines = [claim.engine for claim in claims(made.loads)]
    return next((each for each in ("vllm", "sglang", "tensorrt_llm") if each in engines), "vllm")


def _tag(source: Path, made: Artifact, backend: str, ranks: int) -> str | None:
    """<backend>-<precision>-tp<N>-pp1"""
    place = source / QUANTIZATION
    if place.is_file():
        said = json.loads(place.read_bytes()).get("quantization", {}).get("quant_algo")
        precision = PRECISIONS.get(said)
    elif made.plan.recipe or made.source.get("quantization"):
        precision = None
    else:
        precision = "bf16" if made.dtype == "bfloat16" else None
    return f"{backend}-{precision}-tp{ranks}-pp1" if precision else None


def _environment(line: str, shape: Shape, served_name: str, backend: str, ranks: int) -> dict[str, str]:
    model = {"NIM_MODEL_NAME": STORE, "NIM_MODEL_PROFILE": backend} if line == "1.x" else {"NIM_MODEL_PATH": STORE}
    return {
        **model,
        "NIM_SERVED_MODEL_NAME": served_name,
        "NIM_TENSOR_PARALLEL_SIZE": str(ranks),
        **shape.environment,
    }


def _record(layout: Layout, added: list[File]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "nim": layout.line,
        "artifact": artifact.identity(layout.source),
        "kind": layout.made.kind,
        "loads": layout.made.loads,
        "served_name": layout.served_name,
        "profile": layout.profile,
        "environment": dict(layout.environment),
        "moved": dict(layout.moved),
        "added": [asdict(file) for file in added],
    }


def _bring(source: Path, target: Path) -> None:
    """The same bytes under another name where they may be read by all, else a copy that may."""
    target.parent.mkdir(parents=True, exist_ok=True)
    resolved = source.resolve()
    if resolved.stat().st_mode & 0o777 == FILE_MODE:
        try:
            os.link(resolved, target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copyfile(resolved, target)
    target.chmod(FILE_MODE)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(FILE_MODE)
