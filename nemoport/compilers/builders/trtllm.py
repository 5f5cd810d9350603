"""`trtllm`: `rank{N}.engine` for each rank of a `trtllm` checkpoint, by `trtllm-build` of TensorRT-LLM up to 1.2.

The program and its flags are those of tensorrt_llm/commands/build.py. Releases from 1.3 on have no engines any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemoport.artifact import Artifact
from nemoport.compilers import machine
from nemoport.compilers.build import ARTIFACT, PRODUCT, Build, Fact, Facts, Option, Program
from nemoport.compilers.gpu import DRIVER, SM
from nemoport.compilers.options import CONTAINER, MAX_BATCH_SIZE, TIMING_CACHE, image
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

TAKES = "trtllm"
KIND = "trtllm_engine"
WAY_OUT = "convert with --to llmapi, which TensorRT-LLM 1.0 and later load, or build in a container of 1.2"
IMAGE = "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3"
CACHE = "timing.cache"
COUNTS = (
    MAX_BATCH_SIZE,
    Option(name="max_input_len", kind=int, help="Tokens of a prompt, at most."),
    Option(name="max_seq_len", kind=int, help="Tokens of a prompt and its answer, at most."),
    Option(name="max_num_tokens", kind=int, help="Tokens of all requests in one step, at most."),
    Option(name="opt_num_tokens", kind=int, help="Tokens of a step that kernels are chosen for."),
    Option(name="max_beam_width", kind=int, help="Beams of a request, at most."),
    Option(name="max_draft_len", kind=int, help="Draft tokens of a request, at most."),
    Option(name="workers", kind=int, help="Ranks that are built at a time, each on a GPU."),
)
MODE = Option(
    name="speculative_decoding_mode",
    # Medusa and Eagle want heads in the checkpoint, which no source that nemoport reads has.
    kind=("draft_tokens_external", "lookahead_decoding"),
    help="What checks draft tokens in the engine.",
)
FLAGS = (
    *COUNTS,
    MODE,
    Option(
        name="kv_cache_type", kind=("paged", "continuous", "disabled"), help="How the engine keeps keys and values."
    ),
    Option(name="logits_dtype", kind=("float32", "float16"), help="Of the logits."),
)
"""Each is a flag of trtllm-build, of the same name."""
PLUGIN = Option(name="plugin", many=True, metavar="NAME=VALUE", help="As gemm_plugin=auto; repeatable.")
OPTIONS = (*FLAGS, PLUGIN, TIMING_CACHE, CONTAINER)

_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_FP8 = ("fp8", "disable")
_SWITCH = ("enable", "disable")
PLUGINS: Mapping[str, tuple[str, ...]] = {
    "bert_attention_plugin": _DTYPES,
    "gpt_attention_plugin": _DTYPES,
    "gemm_plugin": (*_DTYPES, "fp8", "nvfp4"),
    "gemm_swiglu_plugin": _FP8,
    "fp8_rowwise_gemm_plugin": _DTYPES,
    "lora_plugin": _DTYPES,
    "dora_plugin": _SWITCH,
    "moe_plugin": _DTYPES,
    "mamba_conv1d_plugin": _DTYPES,
    "nccl_plugin": _DTYPES,
    "low_latency_gemm_plugin": _FP8,
    "low_latency_gemm_swiglu_plugin": _FP8,
    "gemm_allreduce_plugin": ("float16", "bfloat16", "disable"),
    "tokens_per_block": ("8", "16", "32", "64", "128"),
    **dict.fromkeys(
        (
            *("context_fmha", "bert_context_fmha_fp32_acc", "remove_input_padding", "use_paged_context_fmha"),
            *("use_fp8_context_fmha", "fuse_fp4_quant", "multiple_profiles", "paged_state", "streamingllm"),
            *("norm_quant_fusion", "reduce_fusion", "user_buffer", "use_fused_mlp", "pp_reduce_scatter"),
        ),
        _SWITCH,
    ),
}
"""Of tensorrt_llm 1.2, plugin/plugin.py: `cli_plugin_args` and the values of PluginConfig's fields."""
BUILDER = Program(name="trtllm-build", way_out=f"run this in a container with TensorRT-LLM up to 1.2, such as {IMAGE}")
RELEASE = Fact(
    name="tensorrt_llm",
    command="python3 -c 'from importlib.metadata import version; print(version(\"tensorrt_llm\"))'",
    accepted=("0.*", "1.0.*", "1.1.*", "1.2.*"),
    way_out=f"it builds engines up to 1.2: {WAY_OUT}",
)
_FROM_ADA, _FROM_BLACKWELL = ("89", "9[0-9]", "1[0-9][0-9]"), ("1[0-9][0-9]",)
SMS: Mapping[str, tuple[str, ...]] = {
    "FP8": _FROM_ADA,
    "FP8_PER_CHANNEL_PER_TOKEN": _FROM_ADA,
    "W4A8_AWQ": _FROM_ADA,
    "NVFP4": _FROM_BLACKWELL,
}
"""Where a quantization has kernels; the others run everywhere. TensorRT-LLM's docs, reference/precision.md."""


def plan(artifact: Path, made: Artifact, options: Mapping[str, Any]) -> Build:
    asked = {option.name: options[option.name] for option in FLAGS if option.name in options}
    _check(asked, made)
    plugins = dict(_plugin(text) for text in options.get(PLUGIN.name, ()))
    cache = options.get(TIMING_CACHE.name)
    timing = ("--input_timing_cache", CACHE, "--output_timing_cache", CACHE) if cache else ()
    said = [word for name, value in {**asked, **plugins}.items() for word in (f"--{name}", str(value))]
    return Build(
        kind=KIND,
        asked={**asked, **({"plugins": plugins} if plugins else {})},
        commands=((BUILDER.name, "--checkpoint_dir", ARTIFACT, "--output_dir", f".{PRODUCT}", *said, *timing),),
        programs=(BUILDER, DRIVER),
        facts=(RELEASE, _sm(artifact)),
        container=image(options, IMAGE),
        gpus=asked.get("workers", 1),
        loads=loads,
        check=partial(check, ranks=made.plan.world),
        lacking=_lacking(),
        carried=tuple(_carried(made)),
        kept={CACHE: cache} if cache else {},
    )


def _check(asked: Mapping[str, Any], made: Artifact) -> None:
    """What trtllm-build would refuse, or find out late."""
    for option in COUNTS:
        if asked.get(option.name, 1) < 1:
            raise UsageError(f"{option.name} is {asked[option.name]}; it counts, from 1 on")
    for lower, upper in (("max_input_len", "max_seq_len"), ("opt_num_tokens", "max_num_tokens")):
        if lower in asked and upper in asked and asked[lower] > asked[upper]:
            raise UsageError(f"{lower} is {asked[lower]} and {upper} {asked[upper]}; it must not be more")
    if asked.get("workers", 1) > made.plan.world:
        raise UsageError(f"workers is {asked['workers']} and there are {made.plan.world} ranks to build; use no more")
    if (MODE.name in asked) != ("max_draft_len" in asked):
        raise UsageError(f"max_draft_len goes with {MODE.name}, and it with max_draft_len; give both or neither")


def _sm(artifact: Path) -> Fact:
    """What the checkpoint's quantization asks of a GPU."""
    path = artifact / "config.json"
    try:
        algorithm = json.loads(path.read_bytes())["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{path} is no config of a TensorRT-LLM checkpoint ({error!r}); convert again") from error
    if algorithm not in SMS:
        return SM
    way_out = f"{algorithm} has kernels for SM {', '.join(SMS[algorithm])}: build on such a GPU, or convert without"
    return replace(SM, accepted=SMS[algorithm], way_out=way_out)


def _lacking() -> str | None:
    installed = machine.version("tensorrt_llm")
    if installed is not None and not machine.accepts(RELEASE, installed):
        return f"its TensorRT-LLM is {installed}, and {RELEASE.way_out}"
    return machine.lacking((BUILDER, DRIVER))


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
            f"{ranks} were to build it; build again"
        )


def _plugin(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in PLUGINS:
        raise UsageError(f"--plugin {text} is not NAME=VALUE of one of {', '.join(PLUGINS)}")
    if value not in PLUGINS[name]:
        raise UsageError(f"--plugin {name} takes {', '.join(PLUGINS[name])}, and not {value!r}")
    return name, value


def _carried(made: Artifact) -> Iterator[str]:
    """The tokenizer: of a checkpoint, what is neither tensors nor said by the engines' own config."""
    for file in made.files:
        if file.blake3 is not None and file.path not in ("config.json", "ledger.jsonl", "calibration.npz"):
            yield file.path
