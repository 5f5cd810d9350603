"""An engine directory as `trtllm-build` leaves it, ours or another's: `config.json` and `rank{N}.engine`.

`config.json` is EngineConfig of tensorrt_llm (builder.py): `version`, `pretrained_config` as in the checkpoint, and
`build_config`, in which a mode of speculative decoding is one bit (models/modeling_utils.py, SpeculativeDecodingMode).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import MANIFEST
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.spec import attention_windows

CONFIG = "config.json"
NONE, DRAFT, MEDUSA, LOOKAHEAD, REDRAFTER, EAGLE = (
    *("none", "draft_tokens_external", "medusa"),
    *("lookahead_decoding", "explicit_draft_tokens", "eagle"),
)
MODES = {1: NONE, 2: DRAFT, 4: MEDUSA, 8: LOOKAHEAD, 16: REDRAFTER, 32: EAGLE}
LOGITS = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}


@dataclass(frozen=True, kw_only=True)
class Engine:
    path: Path
    release: str
    ranks: int
    vocab_size: int
    max_batch_size: int
    max_seq_len: int
    max_beam_width: int
    mode: str
    """Of speculative decoding, in trtllm-build's words."""
    max_draft_len: int
    logits: str
    """Triton's word for their type."""
    reuses_blocks: bool
    """Its context attention reads a paged cache, so that blocks are reused and contexts are cut in chunks."""
    streams_weights: bool
    adapters: bool
    windows: tuple[int, ...]
    """Of the layers, in turns; none where every layer sees all, or nobody knows."""

    @property
    def files(self) -> tuple[str, ...]:
        """What the backend loads."""
        return CONFIG, *(f"rank{rank}.engine" for rank in range(self.ranks))


def read(directory: Path) -> Engine:
    """What an engine says of itself; refused where the backend could not batch in flight."""
    path = directory / CONFIG
    try:
        said = json.loads(path.read_bytes())
        found = _engine(directory, said["version"], said["pretrained_config"], said["build_config"])
    except FileNotFoundError:
        raise UnsupportedInput(f"{directory} is no engine: it has no {CONFIG}; give what `compile` built") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedInput(f"{path} is not what trtllm-build writes ({error!r}); build the engine again") from error
    if missing := [name for name in found.files if not (directory / name).is_file()]:
        raise DamagedInput(f"{directory} lacks {missing[0]} ({len(missing)} of {len(found.files)} files); build again")
    if (directory / MANIFEST).is_file():
        artifact.verify(directory, artifact.read_manifest(directory))
    return found


def _engine(directory: Path, release: str, model: Mapping[str, Any], build: Mapping[str, Any]) -> Engine:
    plugins = build["plugin_config"]
    paged = _word(build.get("kv_cache_type", "PAGED")) == "PAGED" and plugins.get("paged_kv_cache") is not False
    for name, there, way_out in (
        ("a paged cache of keys and values", paged, "--kv-cache-type paged"),
        ("remove_input_padding", plugins["remove_input_padding"] is True, "--plugin remove_input_padding=enable"),
        ("gpt_attention_plugin", plugins.get("gpt_attention_plugin", "auto"), "--plugin gpt_attention_plugin=auto"),
    ):
        if not there:
            raise UnsupportedInput(f"{directory} was built without {name}, and in-flight batching needs it; {way_out}")
    return Engine(
        path=directory,
        release=str(release),
        ranks=int(model["mapping"]["world_size"]),
        vocab_size=int(model["vocab_size"]),
        max_batch_size=int(build["max_batch_size"]),
        max_seq_len=int(build["max_seq_len"]),
        max_beam_width=int(build["max_beam_width"]),
        mode=_mode(build.get("speculative_decoding_mode", 1)),
        max_draft_len=int(build.get("max_draft_len") or 0),
        logits=LOGITS[_word(model["logits_dtype"]).lower()],
        reuses_blocks=plugins.get("use_paged_context_fmha") is True,
        streams_weights=bool(build.get("weight_streaming")),
        adapters=bool(plugins.get("lora_plugin")),
        windows=_windows(directory),
    )


def _mode(said: int | str) -> str:
    return MODES[said] if isinstance(said, int) else _word(said).lower()


def _word(said: str) -> str:
    """`KVCacheType.PAGED` and `PAGED` are one."""
    return said.rpartition(".")[2].upper()


def _windows(directory: Path) -> tuple[int, ...]:
    if not (directory / MANIFEST).is_file():
        return ()
    return attention_windows(artifact.read_manifest(directory).spec)
