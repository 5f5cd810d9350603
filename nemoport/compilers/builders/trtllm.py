"""`trtllm`: `rank{N}.engine` for each rank of a `trtllm` checkpoint, by `trtllm-build` of TensorRT-LLM up to 1.2.

The program and its flags are those of tensorrt_llm/commands/build.py. Releases from 1.3 on have no engines any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemoport.artifact import Artifact
from nemoport.compilers import machine
from nemoport.compilers.build import ARTIFACT, PRODUCT, Build, Fact, Facts, Option, Program
from nemoport.compilers.options import CONTAINER, MAX_BATCH_SIZE, TIMING_CACHE
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

TAKES = "trtllm"
KIND = "trtllm_engine"
WAY_OUT = "convert with --to llmapi, which TensorRT-LLM 1.0 and later load, or build in a container of 1.2"
IMAGE = "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3"
CACHE = "timing.cache"
LIMITS = (
    MAX_BATCH_SIZE,
    Option(name="max_input_len", kind=int, help="Tokens of a prompt, at most."),
    Option(name="max_seq_len", kind=int, help="Tokens of a prompt and its answer, at most."),
    Option(name="max_num_tokens", kind=int, help="Tokens of all requests in one step, at most."),
    Option(name="max_beam_width", kind=int, help="Beams of a request, at most."),
    Option(name="workers", kind=int, help="Ranks that are built at a time, each on a GPU."),
)
"""Each is a flag of the same name."""
PLUGIN = Option(name="plugin", many=True, metavar="NAME=VALUE", help="As gemm_plugin=auto; repeatable.")
OPTIONS = (*LIMITS, PLUGIN, TIMING_CACHE, CONTAINER)
BUILDER = Program(name="trtllm-build", way_out=f"run this in a container with TensorRT-LLM up to 1.2, such as {IMAGE}")
DRIVER = Program(name="nvidia-smi", way_out="run this on a machine with an NVIDIA GPU and its driver")
RELEASE = Fact(
    name="tensorrt_llm",
    command="python3 -c 'from importlib.metadata import version; print(version(\"tensorrt_llm\"))'",
    accepted=("0.*", "1.0.*", "1.1.*", "1.2.*"),
    way_out=f"it builds engines up to 1.2: {WAY_OUT}",
)
SM = Fact(
    name="sm",
    command="nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .",
    accepted=("[0-9]*",),
    way_out="run this on a machine with an NVIDIA GPU",
)


def plan(artifact: Path, made: Artifact, options: Mapping[str, Any]) -> Build:
    asked = {option.name: options[option.name] for option in LIMITS if option.name in options}
    for name, number in asked.items():
        if number < 1:
            raise UsageError(f"{name} is {number}; it counts, from 1 on")
    plugins = dict(_plugins(options.get(PLUGIN.name, ())))
    installed = machine.version("tensorrt_llm")
    too_new = installed is not None and not machine.accepts(RELEASE, installed)
    cache = options.get(TIMING_CACHE.name)
    timing = ("--input_timing_cache", CACHE, "--output_timing_cache", CACHE) if cache else ()
    said = [word for name, value in {**asked, **plugins}.items() for word in (f"--{name}", str(value))]
    programs = (BUILDER, DRIVER)
    return Build(
        kind=KIND,
        asked={**asked, **({"plugins": plugins} if plugins else {})},
        commands=((BUILDER.name, "--checkpoint_dir", ARTIFACT, "--output_dir", f".{PRODUCT}", *said, *timing),),
        programs=programs,
        facts=(RELEASE, SM),
        container=options.get(CONTAINER.name, IMAGE),
        gpus=asked.get("workers", 1),
        loads=loads,
        check=lambda product, facts: check(product, facts, made.plan.world),
        lacking=f"its TensorRT-LLM {installed} builds no engines any more" if too_new else machine.lacking(programs),
        carried=tuple(_carried(made)),
        kept={CACHE: cache} if cache else {},
    )


def loads(facts: Facts) -> tuple[str, ...]:
    return (f"TensorRT-LLM {facts[RELEASE.name]} on GPUs of SM {facts[SM.name]}",)


def check(product: Path, facts: Facts, ranks: int) -> None:
    """An engine for each rank, and a config.json of the release that said it built them."""
    if not machine.accepts(RELEASE, facts.get(RELEASE.name)):
        raise UnsupportedInput(f"{product} was built with TensorRT-LLM {facts.get(RELEASE.name)}; {RELEASE.way_out}")
    names = ["config.json", *(f"rank{rank}.engine" for rank in range(ranks))]
    if missing := [name for name in names if not (product / name).is_file()]:
        raise DamagedInput(f"{product} lacks {missing[0]} ({len(missing)} of {len(names)} files); build again")
    try:
        config = json.loads((product / "config.json").read_bytes())
        said, world = config["version"], config["pretrained_config"]["mapping"]["world_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{product}/config.json is not what trtllm-build writes ({error!r}); build again") from error
    if said != facts.get(RELEASE.name) or world != ranks:
        raise DamagedInput(
            f"{product}/config.json is of TensorRT-LLM {said} and {world} ranks, {facts.get('tensorrt_llm')} and "
            f"{ranks} were to build it; remove it and build again"
        )


def _plugins(given: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise UsageError(f"--plugin {text} does not say NAME=VALUE, as gemm_plugin=auto")
        yield name, value


def _carried(made: Artifact) -> Iterator[str]:
    """The tokenizer: of a checkpoint, what is neither tensors nor said by the engines' own config."""
    for file in made.files:
        if file.blake3 is not None and file.path not in ("config.json", "ledger.jsonl", "calibration.npz"):
            yield file.path
