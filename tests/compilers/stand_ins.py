"""A machine that builds engines, as far as the programs go: `trtllm-build` and `nvidia-smi` in a directory of their
own, and TensorRT-LLM as installed as its metadata says. The stand-ins take what the real ones document and nothing
else; what they leave has the form of what the real ones leave, and is none of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

TRTLLM_BUILD = '''\
#!{python}
"""The flags are those of `trtllm-build --help` of 1.2 that take a value; a rank's engine is named after its weights."""
import argparse, hashlib, json, os, pathlib, sys, time
from importlib.metadata import version

flags = argparse.ArgumentParser(allow_abbrev=False)
for name in ("checkpoint_dir", "output_dir", "input_timing_cache", "output_timing_cache"):
    flags.add_argument("--" + name)
for name in (
    *("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "opt_num_tokens", "max_beam_width"),
    *("max_draft_len", "workers", "tokens_per_block"),
):
    flags.add_argument("--" + name, type=int)
flags.add_argument("--kv_cache_type", type=str.upper, choices=("CONTINUOUS", "PAGED", "DISABLED"), default="PAGED")
flags.add_argument("--logits_dtype", choices=("float16", "float32"))
flags.add_argument(
    "--speculative_decoding_mode",
    choices=("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"),
)
for name in ("gemm_plugin", "use_paged_context_fmha", "multiple_profiles"):
    flags.add_argument("--" + name)
said = flags.parse_args()
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
checkpoint, out = pathlib.Path(said.checkpoint_dir), pathlib.Path(said.output_dir)
config = json.loads((checkpoint / "config.json").read_text())
out.mkdir(exist_ok=True)
for rank in range(config["mapping"]["world_size"]):
    weights = (checkpoint / f"rank{{rank}}.safetensors").read_bytes()
    (out / f"rank{{rank}}.engine").write_text("a stand-in for the engine of " + hashlib.sha256(weights).hexdigest())
if (gate := pathlib.Path(os.environ.get("STAND_IN_WAITS_FOR", "/"))) != pathlib.Path("/"):
    gate.with_name(gate.name + ".waiting").touch()
    while not gate.exists():
        time.sleep(0.01)
if said.output_timing_cache:
    known = pathlib.Path(said.input_timing_cache)
    before = known.read_bytes() if known.is_file() else b""
    pathlib.Path(said.output_timing_cache).write_bytes(before + b"a timing;")
plugins = {{"paged_kv_cache": said.kv_cache_type == "PAGED", "remove_input_padding": True, "tokens_per_block": 32}}
plugins |= {{"gpt_attention_plugin": "auto", "use_paged_context_fmha": said.use_paged_context_fmha != "disable"}}
built = {{"max_batch_size": 2048, "max_seq_len": config["max_position_embeddings"], "max_beam_width": 1}}
built |= {{name: value for name, value in vars(said).items() if value is not None and name != "checkpoint_dir"}}
modes = (None, "draft_tokens_external", "medusa", "lookahead_decoding", "explicit_draft_tokens", "eagle")
built["speculative_decoding_mode"] = 1 << modes.index(said.speculative_decoding_mode)
built["plugin_config"] = plugins
whole = {{"version": version("tensorrt_llm"), "pretrained_config": config, "build_config": built}}
(out / "config.json").write_text(json.dumps(whole))
{more}
'''
NVIDIA_SMI = """\
#!/bin/sh
[ "$*" = "--query-gpu=compute_cap --format=csv,noheader --id=0" ] || exit 2
echo "{capability}"
"""


@dataclass(frozen=True)
class Machine:
    log: Path
    """What trtllm-build was called with, a line of JSON each time."""
    environment: Mapping[str, str]

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        """This process is on it."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.syspath_prepend(self.environment["PYTHONPATH"].split(os.pathsep)[0])


def machine(place: Path, *, release: str = "1.2.1", capability: str = "9.0", more: str = "") -> Machine:
    """`more` is what this trtllm-build does at its end."""
    programs, packages = place / "programs", place / "packages"
    metadata = packages / f"tensorrt_llm-{release}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {release}\n")
    programs.mkdir()
    for name, text in (
        ("trtllm-build", TRTLLM_BUILD.format(python=sys.executable, more=more)),
        ("nvidia-smi", NVIDIA_SMI.format(capability=capability)),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    known = os.environ.get("PYTHONPATH", "")
    return Machine(
        place / "log",
        {
            "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
            "PYTHONPATH": os.pathsep.join((str(packages), *([known] if known else []))),
            "STAND_IN_LOG": str(place / "log"),
        },
    )
