"""The llama checkpoints in `tests/data`: one model, written by every program that nemoport reads, and its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

DATA = Path(__file__).parents[1] / "data"
MEGATRON = DATA / "megatron"
HUGGINGFACE = MEGATRON / "hf/llama"
"""What all of them must become."""
LLAMA_GQA = DATA / "trtllm/hf/llama_gqa"
EVIL = MEGATRON / "evil"
VOCABULARY = 300


@dataclass(frozen=True)
class Fixture:
    path: Path
    format: str
    """The reader whose it is."""
    rows: int
    """Of the stored embedding: training pads the vocabulary."""
    config_file: Path | None = None
    trained: Mapping[str, int] | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    """Over all that its files say."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        words: dict[str, Any] = {} if self.config_file is None else json.loads(self.config_file.read_text())
        return words | dict(self.said) or None

    @property
    def seeing_both_ways(self) -> Fixture:
        """The same tensors, as an embedding model."""
        return replace(self, said={"attn_mask_type": "padding"})

    @property
    def weights(self) -> Path:
        """The directory of the tensor files."""
        (index,) = [*self.path.rglob(".metadata"), *self.path.rglob("model.safetensors")]
        return index.parent


_MCORE, _LM, _BRIDGE, _NEMO2 = MEGATRON / "mcore", MEGATRON / "megatron_lm", MEGATRON / "bridge", MEGATRON / "nemo2"

LLAMA = {
    "torch_dist": Fixture(_MCORE / "llama_te_tp1pp1", "torch_dist", 384, _MCORE / "llama_te_tp1pp1.cfg.json"),
    "torch_dist at tp 2 pp 2": Fixture(
        _MCORE / "llama_te_tp2pp2", "torch_dist", 512, _MCORE / "llama_te_tp2pp2.cfg.json"
    ),
    "torch_dist, a key a layer": Fixture(
        _MCORE / "llama_te_nonhomog_tp1pp1", "torch_dist", 384, _MCORE / "llama_te_nonhomog_tp1pp1.cfg.json"
    ),
    "megatron_lm": Fixture(_LM / "torch_dist_tp2", "megatron_lm", 512),
    "megatron_lm, iteration": Fixture(_LM / "torch_dist_tp2/iter_0000010", "megatron_lm", 512),
    "megatron_bridge": Fixture(_BRIDGE / "llama", "megatron_bridge", 300),
    "megatron_bridge, iteration": Fixture(_BRIDGE / "llama/iter_0000000", "megatron_bridge", 300),
    "nemo2": Fixture(_NEMO2 / "llama_tp1pp1", "nemo2", 384),
    "nemo2, weights": Fixture(_NEMO2 / "llama_tp1pp1/weights", "nemo2", 384),
    "nemo1": Fixture(MEGATRON / "nemo1/llama_tp2pp2.nemo", "nemo1", 512),
    "nemo1, torch_dist": Fixture(MEGATRON / "nemo1/llama_torch_dist.nemo", "nemo1", 384),
    "megatron_legacy": Fixture(_LM / "legacy_tp2pp2", "megatron_legacy", 512),
    "megatron_legacy, iteration": Fixture(_LM / "legacy_tp2pp2/iter_0000010", "megatron_legacy", 512),
    "zarr": Fixture(_MCORE / "llama_zarr_prefix_model", "zarr", 384, _MCORE / "llama_zarr_prefix_model.cfg.json"),
    "torch_dcp": Fixture(_LM / "fsdp_dtensor", "torch_dcp", 384),
    "torch_dcp, iteration": Fixture(_LM / "fsdp_dtensor/iter_0000010", "torch_dcp", 384),
    "nemo_automodel": Fixture(MEGATRON / "automodel/llama", "nemo_automodel", 300),
    "nemo_automodel, model": Fixture(MEGATRON / "automodel/llama/epoch_0_step_9/model", "nemo_automodel", 300),
    "huggingface": Fixture(HUGGINGFACE, "huggingface", 300),
}
every_llama = pytest.mark.parametrize("fixture", LLAMA.values(), ids=LLAMA.keys())
every_megatron_llama = pytest.mark.parametrize(
    "fixture",
    [fixture for fixture in LLAMA.values() if fixture.format != "huggingface"],
    ids=[name for name, fixture in LLAMA.items() if fixture.format != "huggingface"],
)


def answers() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens [2, 16], and megatron-core's float32 logits [2, 16, 300] for them."""
    with np.load(_MCORE / "llama_te_tp1pp1.ref.npz") as stored:
        return stored["tokens"], stored["logits_fp32"]
