"""`inflight_batcher_llm`: the repository that serves an engine of TensorRT-LLM up to 1.2, complete.

    preprocessing/      text to tokens          a program of ours, with the tokenizer beside it
    tensorrt_llm/       tokens to tokens        the `tensorrtllm` backend, with the engine in its version
    postprocessing/     tokens to text          a program of ours
    ensemble/           the three in a row
    tensorrt_llm_bls/   the three led by a program: whole characters in a stream, and draft models
    tensorrt_llm_draft/ where there is one
    serve.sh            tritonserver with all of it

Names and tensors are those of NVIDIA's repository of this name, so its clients work. The backend takes the engine's
place as a path, and a relative one from where the server was started (std::filesystem in model_instance_state.cc); a
repository that can be moved therefore is served from its own directory, which `serve.sh` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from nemoport.artifact import check_outside, json_bytes, link
from nemoport.errors import UsageError
from nemoport.repository.inflight import configs, engine, settings, tokens
from nemoport.repository.inflight.engine import Engine
from nemoport.repository.inflight.settings import KNOWN
from nemoport.repository.unfinished import check_free, unfinished

OF_DRAFT = "draft."
"""Before the name of a parameter that is for the draft model."""
SHARED_FRACTION = "0.45"
"""Of the memory that is free when it loads, for the cache of each of two engines on one GPU."""
_TEMPLATES = "templates/inflight_batcher_llm"
_HEAD = """\
#!/usr/bin/env bash
# Written by nemoport. Serves this repository from its own directory: the config names the engine's place from here.
# Arguments are for tritonserver.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

need() {
  command -v "$1" > /dev/null || {
    echo "Error: $1 is not on PATH; run this in a container with TensorRT-LLM %(release)s for Triton, \
tritonserver:YY.MM-trtllm-python-py3" >&2
    exit 4
  }
}
%(needs)s
"""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the engines do not say themselves."""

    tokenizer: Path | None = None
    """Where it lies, if not with the engine."""
    draft: Path | None = None
    """An engine that proposes tokens."""
    max_batch_size: int | None = None
    decoupled: bool = True
    """A request may have many answers: a stream."""
    accumulate_tokens: bool = False
    """A piece of a stream is the whole text until then."""
    given: Mapping[str, str]
    """Parameters of the backend; those of the draft model with `draft.` before them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A repository that was fully checked; nothing has been written."""

    destination: Path
    engine: Engine
    batch: int
    written: Mapping[str, bytes]
    linked: Mapping[str, Path]


def plan(directory: Path, destination: Path, choices: Choices) -> Layout:
    check_free(destination)
    for source in (directory, *([choices.draft] if choices.draft else [])):
        check_outside(destination, source, "engine")
    target = engine.read(directory)
    draft = engine.read(choices.draft) if choices.draft else None
    _check_draft(target, draft)
    most = min(each.max_batch_size for each in (target, draft) if each)
    batch = choices.max_batch_size or most
    if batch > most:
        raise UsageError(f"max_batch_size {batch} was asked for and {directory} was built for {most}; ask for less")
    tokenizer = choices.tokenizer or directory
    said = tokens.settings(tokenizer, target.vocab_size)
    engines = {configs.ENGINE: target, **({configs.DRAFT: draft} if draft else {})}
    text = {f"{name}/config.pbtxt": each for name, each in _configs(engines, batch, choices).items()}
    programs = {
        f"{name}/1/model.py": files("nemoport").joinpath(_TEMPLATES, f"{name}.py").read_bytes()
        for name in (configs.PREPROCESSING, configs.POSTPROCESSING, configs.BLS)
    }
    around = (configs.PREPROCESSING, configs.POSTPROCESSING)
    return Layout(
        destination=destination,
        engine=target,
        batch=batch,
        written={
            **{name: each.encode() for name, each in text.items()},
            **programs,
            **{f"{name}/1/{tokens.SETTINGS}": json_bytes(said) for name in around},
            f"{configs.BLS}/1/wiring.json": json_bytes(configs.wiring()),
            f"{configs.ENSEMBLE}/1/.keep": b"",
            "serve.sh": script(engines).encode(),
        },
        linked={
            **{f"{name}/1/{tokens.FILE}": tokenizer / tokens.FILE for name in around},
            **{f"{name}/1/{file}": each.path / file for name, each in engines.items() for file in each.files},
        },
    )


def write(layout: Layout) -> None:
    """The whole repository, with one rename."""
    with unfinished(layout.destination) as place:
        for name, content in layout.written.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        for name, source in layout.linked.items():
            link(source, place / name)
        (place / "serve.sh").chmod(0o755)


def _configs(engines: Mapping[str, Engine], batch: int, choices: Choices) -> dict[str, str]:
    logits, words = engines[configs.ENGINE].logits, {name: each.help for name, each in KNOWN.items()}
    shared = {"kv_cache_free_gpu_mem_fraction": SHARED_FRACTION} if configs.DRAFT in engines else {}
    given = {
        configs.ENGINE: {name: value for name, value in choices.given.items() if not name.startswith(OF_DRAFT)},
        configs.DRAFT: {
            name.removeprefix(OF_DRAFT): value for name, value in choices.given.items() if name.startswith(OF_DRAFT)
        },
    }
    if given[configs.DRAFT] and configs.DRAFT not in engines:
        raise UsageError(f"--set {OF_DRAFT}{next(iter(given[configs.DRAFT]))}: there is no draft model; give --draft")
    parameters = {name: settings.parameters(each, f"{name}/1", shared | given[name]) for name, each in engines.items()}
    leads = {
        "tensorrt_llm_model_name": configs.ENGINE,
        "tensorrt_llm_draft_model_name": configs.DRAFT if configs.DRAFT in engines else "",
        "accumulate_tokens": str(choices.accumulate_tokens).lower(),
        "exclude_input_in_output": parameters[configs.ENGINE].get("exclude_input_in_output", "false"),
    }
    made = {
        configs.PREPROCESSING: configs.preprocessing(batch),
        configs.POSTPROCESSING: configs.postprocessing(batch),
        configs.ENSEMBLE: configs.ensemble(logits, batch),
        configs.BLS: configs.bls(logits, batch, choices.decoupled, leads),
        **{
            name: configs.engine(name, each.logits, batch, choices.decoupled, parameters[name])
            for name, each in engines.items()
        },
    }
    return {name: configs.render(config, words) for name, config in made.items()}


def _check_draft(target: Engine, draft: Engine | None) -> None:
    if draft is None:
        return
    if target.mode != engine.DRAFT:
        raise UsageError(
            f"{target.path} takes no draft tokens (it was built with speculative_decoding_mode {target.mode}); build "
            f"it with --speculative-decoding-mode {engine.DRAFT} --max-draft-len N"
        )
    for what in ("vocab_size", "release"):
        if (ours := getattr(target, what)) != (theirs := getattr(draft, what)):
            raise UsageError(f"{draft.path} has {what} {theirs} and {target.path} {ours}; they must be the same")


def script(engines: Mapping[str, Engine]) -> str:
    """As NVIDIA's scripts/launch_triton_server.py starts it: one process a rank, of which the first serves; or with two
    engines that have several ranks, one process that starts workers itself."""
    serve = 'tritonserver --model-repository="$PWD" --disable-auto-complete-config'
    alone = all(each.ranks == 1 for each in engines.values())
    head = _HEAD % {
        "needs": "need tritonserver" if alone else "need tritonserver\nneed mpirun",
        "release": engines[configs.ENGINE].release,
    }
    if alone:
        return f'{head}exec {serve} "$@"\n'
    if len(engines) > 1:
        alike = "--pinned-memory-pool-byte-size=0 --enable-peer-access=false"
        told = "export TRTLLM_ORCHESTRATOR=1 TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES=1\n"
        return f'{head}{told}exec mpirun --allow-run-as-root -n 1 {serve} {alike} "$@"\n'
    ranks = [
        f"-n 1 {serve} --backend-config=python,shm-region-prefix-name=rank{rank}_"
        + (f" --model-control-mode=explicit --load-model={configs.ENGINE}" if rank else ' "$@"')
        for rank in range(engines[configs.ENGINE].ranks)
    ]
    return f"{head}exec mpirun --allow-run-as-root \\\n  " + " : \\\n  ".join(ranks) + "\n"
