"""What the `tensorrtllm` backend is told: parameters of its model's config, all of them strings.

The names, what they mean and what they are when they are left out: tensorrtllm_backend, docs/model_config.md and
inflight_batcher_llm/src/model_instance_state.cc. A parameter that is not said here is not written, and the backend
takes its own value; three it wants to find even where they say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nemoport.errors import UsageError
from nemoport.repository.inflight.engine import DRAFT, EAGLE, LOOKAHEAD, MEDUSA, NONE, REDRAFTER, Engine

WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
DECODING = {MEDUSA: "medusa", LOOKAHEAD: "lookahead", REDRAFTER: "redrafter", EAGLE: "eagle"}
"""The backend's word for an engine's mode; with the others, how it samples is up to the request."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    what: str
    """Of a value, for the sentence that refuses another."""
    fits: Callable[[str], bool]


def _is(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.ASCII) is not None


COUNT = Kind(what="a number from 1 on", fits=_is(r"[1-9]\d*"))
WHOLE = Kind(what="a number from 0 on", fits=_is(r"\d+"))
COUNTS = Kind(what="numbers with commas between them", fits=_is(r"[1-9]\d*(,[1-9]\d*)*"))
FRACTION = Kind(what="a number from 0 to 1", fits=_is(r"0?\.\d+|0|1|1\.0*"))
SWITCH = Kind(what="true or false", fits=_is("true|false"))
POLICY = Kind(what="max_utilization or guaranteed_no_evict", fits=_is("max_utilization|guaranteed_no_evict"))
DEVICES = Kind(what="GPUs as 0,1, and instances as 0,1;2,3", fits=_is(r"\d+(,\d+)*(;\d+(,\d+)*)*"))
TREE = Kind(what="a tree of choices as {0}, {0, 0}, {1}", fits=_is(r"\{\d+(, ?\d+)*\}(, ?\{\d+(, ?\d+)*\})*"))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an engine must have been built with for a parameter to mean something."""

    what: str
    has: Callable[[Engine], bool]
    way_out: str


BLOCKS = Needs(
    what="use_paged_context_fmha",
    has=lambda engine: engine.reuses_blocks,
    way_out="--plugin use_paged_context_fmha=enable",
)
ADAPTERS = Needs(what="lora_plugin", has=lambda engine: engine.adapters, way_out="--plugin lora_plugin=auto")
STREAMED = Needs(what="weight_streaming", has=lambda engine: engine.streams_weights, way_out="weight streaming")


def _built_for(mode: str) -> Needs:
    return Needs(what=mode, has=lambda engine: engine.mode == mode, way_out=f"--speculative-decoding-mode {mode}")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str
    kind: Kind
    help: str
    needs: Needs | None = None


PARAMETERS = (
    Parameter(name="batch_scheduler_policy", kind=POLICY, help="Whether a request that was begun may be paused."),
    Parameter(name="enable_chunked_context", kind=SWITCH, needs=BLOCKS, help="Long prompts are read in chunks."),
    Parameter(name="kv_cache_free_gpu_mem_fraction", kind=FRACTION, help="Of what is free once weights are loaded."),
    Parameter(name="max_tokens_in_paged_kv_cache", kind=COUNT, help="A cap on the cache, in tokens."),
    Parameter(
        name="enable_kv_cache_reuse", kind=SWITCH, needs=BLOCKS, help="Prompts share the blocks they begin with."
    ),
    Parameter(name="kv_cache_host_memory_bytes", kind=WHOLE, help="Blocks that are not in use go to the host."),
    Parameter(
        name="max_attention_window_size", kind=COUNTS, help="Tokens that a layer looks back, in turns of layers."
    ),
    Parameter(name="sink_token_length", kind=WHOLE, help="First tokens that stay in a window."),
    Parameter(name="medusa_choices", kind=TREE, needs=_built_for(MEDUSA), help="The paths that heads propose."),
    Parameter(name="eagle_choices", kind=TREE, needs=_built_for(EAGLE), help="The paths that the drafter proposes."),
    *(
        Parameter(name=f"lookahead_{name}", kind=kind, needs=_built_for(LOOKAHEAD), help=words)
        for name, kind, words in (
            ("window_size", COUNT, "Branches of lookahead."),
            ("ngram_size", COUNT, "The length of what is proposed, with the token before it."),
            ("verification_set_size", WHOLE, "Branches of verification."),
        )
    ),
    Parameter(name="speculative_decoding_fast_logits", kind=SWITCH, needs=_built_for(DRAFT), help="Logits by MPI."),
    Parameter(name="exclude_input_in_output", kind=SWITCH, help="Where a request does not say."),
    Parameter(name="normalize_log_probs", kind=SWITCH, help="By the length of the answer."),
    Parameter(name="gpu_device_ids", kind=DEVICES, help="The GPUs of the ranks."),
    Parameter(name="num_nodes", kind=COUNT, help="Machines that the ranks are spread over."),
    Parameter(name="gpu_weights_percent", kind=FRACTION, needs=STREAMED, help="Weights that stay on the GPU."),
    Parameter(name="lora_cache_optimal_adapter_size", kind=COUNT, needs=ADAPTERS, help="The rank a page is made for."),
    Parameter(name="lora_cache_max_adapter_size", kind=COUNT, needs=ADAPTERS, help="The highest rank."),
    Parameter(name="lora_cache_gpu_memory_fraction", kind=FRACTION, needs=ADAPTERS, help="Of what the cache leaves."),
    Parameter(name="lora_cache_host_memory_bytes", kind=WHOLE, needs=ADAPTERS, help="Adapters on the host."),
    Parameter(name="multi_block_mode", kind=SWITCH, help="One query's attention spreads over the GPU."),
    Parameter(name="enable_context_fmha_fp32_acc", kind=SWITCH, help="Context attention adds up in float32."),
    Parameter(name="cuda_graph_mode", kind=SWITCH, help="Steps are replayed as CUDA graphs."),
    Parameter(name="cuda_graph_cache_size", kind=WHOLE, help="Graphs that are kept."),
    Parameter(name="cancellation_check_period_ms", kind=COUNT, help="Between two looks for cancelled requests."),
    Parameter(name="stats_check_period_ms", kind=COUNT, help="Between two reports of statistics."),
    Parameter(name="iter_stats_max_iterations", kind=WHOLE, help="Steps whose statistics are kept."),
    Parameter(name="request_stats_max_iterations", kind=WHOLE, help="The same, for each request."),
)
"""What may be chosen."""
KNOWN = {parameter.name: parameter for parameter in PARAMETERS}
CHOSEN = {
    "batch_scheduler_policy": "guaranteed_no_evict",
    "kv_cache_free_gpu_mem_fraction": "0.9",
    "cancellation_check_period_ms": "100",
    "stats_check_period_ms": "100",
}
"""Where nothing else is said: the backend's own values, for who wants to change them to find."""
WANTED = ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
"""The backend does not load without them (getGuidedDecodingConfigFromParams)."""
TREES = {MEDUSA: "medusa_choices", EAGLE: "eagle_choices"}
USUAL_PATHS = 63


def parameters(engine: Engine, place: str, given: Mapping[str, str]) -> dict[str, str]:
    """All that the config says, in the order of the table. `place` is the engine's directory as the server finds it."""
    for name, value in given.items():
        _check(engine, name, value)
    said = {**CHOSEN, **_follow(engine), **given}
    _check_speculation(engine, said)
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": place,
        "max_beam_width": str(engine.max_beam_width),
        **({"decoding_mode": DECODING[engine.mode]} if engine.mode in DECODING else {}),
        **{name: said[name] for name in KNOWN if name in said},
        "executor_worker_path": WORKER,
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        **dict.fromkeys(WANTED, ""),
    }


def _follow(engine: Engine) -> dict[str, str]:
    """What follows from the engine, where nothing else is asked for."""
    windows = {"max_attention_window_size": ",".join(map(str, engine.windows))} if engine.windows else {}
    return {"enable_kv_cache_reuse": str(engine.reuses_blocks and not engine.windows).lower(), **windows}


def _check(engine: Engine, name: str, value: str) -> None:
    if name not in KNOWN:
        raise UsageError(f"--set {name}: the backend is not told that here; there are {', '.join(KNOWN)}")
    parameter = KNOWN[name]
    if not parameter.kind.fits(value):
        raise UsageError(f"--set {name}={value}: needed is {parameter.kind.what}")
    if parameter.needs and value != "false" and not parameter.needs.has(engine):
        raise UsageError(
            f"--set {name}={value} needs an engine that was built with {parameter.needs.what}, which {engine.path} "
            f"was not; build it with {parameter.needs.way_out}"
        )
    if name == "gpu_device_ids" and (odd := [part for part in value.split(";") if part.count(",") + 1 != engine.ranks]):
        raise UsageError(f"--set gpu_device_ids={value}: {odd[0]} are not the {engine.ranks} GPUs of {engine.path}")


def _check_speculation(engine: Engine, said: Mapping[str, str]) -> None:
    """What the backend would find out when it loads, or only when it answers badly."""
    sizes = [f"lookahead_{name}" for name in ("window_size", "ngram_size", "verification_set_size")]
    if engine.mode == LOOKAHEAD:
        if missing := [name for name in sizes if name not in said]:
            raise UsageError(f"{engine.path} looks ahead, and {missing[0]} is not said; give --set {missing[0]}=N")
        if (needed := draft_tokens(*(int(said[name]) for name in sizes))) != engine.max_draft_len:
            raise UsageError(
                f"{engine.path} was built with max_draft_len {engine.max_draft_len}, and this lookahead needs exactly "
                f"{needed}; change the sizes, or build it with --max-draft-len {needed}"
            )
    if engine.mode in TREES:
        name = TREES[engine.mode]
        _check_tree(engine, name, said[name]) if name in said else _check_usual_tree(engine, name)
    if engine.mode != NONE and engine.max_draft_len < 1:
        raise UsageError(f"{engine.path} speculates ({engine.mode}) on 0 tokens; build it with --max-draft-len")
    if engine.mode == DRAFT and not engine.reuses_blocks:
        raise UsageError(
            f"{engine.path} takes draft tokens, and without {BLOCKS.what} cannot read them beside its cache; "
            f"build it with {BLOCKS.way_out}"
        )


def draft_tokens(window: int, ngram: int, verification: int) -> int:
    """What lookahead makes in a step: TensorRT-LLM, examples/lookahead/README.md, `max_draft_len`."""
    return (0 if ngram == 1 else ngram - 2) + (window - 1 + verification) * (ngram - 1)


def _check_tree(engine: Engine, name: str, value: str) -> None:
    paths = [tuple(int(number) for number in path.split(",")) for path in re.findall(r"\{([\d, ]+)\}", value)]
    for path in paths:
        if path[:-1] and path[:-1] not in paths:
            raise UsageError(f"--set {name}: {set_of(path)} has no parent {set_of(path[:-1])} in the tree; add it")
    if len(set(paths)) != len(paths):
        raise UsageError(f"--set {name}: a path is there twice; leave one out")
    if len(paths) > engine.max_draft_len:
        raise UsageError(
            f"--set {name} has {len(paths)} paths, and {engine.path} takes {engine.max_draft_len} draft tokens; "
            "leave some out, or build it with more --max-draft-len"
        )


def _check_usual_tree(engine: Engine, name: str) -> None:
    if engine.max_draft_len < USUAL_PATHS:
        raise UsageError(
            f"{engine.path} takes {engine.max_draft_len} draft tokens, and the backend's own tree, mc_sim_7b_63, has "
            f"{USUAL_PATHS} paths; say yours with --set {name}='{{0}}, {{0, 0}}, {{1}}'"
        )


def set_of(path: tuple[int, ...]) -> str:
    """A path as the backend writes it."""
    return "{" + ", ".join(map(str, path)) + "}"
