"""What ONNX Runtime loads slowly, in the square of the experts in a graph, is told before it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemoport.exporters.targets.onnx.experts import slow_to_load
from nemoport.exporters.targets.onnx.stages import cut
from nemoport.spec import Attention, Block, Dense, LanguageModel, Mixture, ModelSpec, Norm, Rope, Router

from . import made
from .commands import command
from .quantizing import normal


def model(*experts: int) -> ModelSpec:
    """Of so many in each layer; none is a dense layer."""
    one = Dense(intermediate=8)
    routed = {count: Mixture(experts=count, expert=one, router=Router(top_k=2, normalized=True)) for count in experts}
    mixer = Attention(heads=2, kv_heads=1, head_dim=8, rope=Rope(dims=8))
    return ModelSpec(
        family="mixtral",
        vocab_size=33,
        hidden_size=16,
        max_positions=64,
        norm=Norm(eps=1e-6),
        head=LanguageModel(),
        blocks=tuple(Block(mixer=mixer, ffn=routed[count] if count else one) for count in experts),
    )


def minutes(spec: ModelSpec, pp: int = 1) -> int:
    """What is told; 0 where nothing is."""
    told = list(slow_to_load(spec, cut(spec, pp)))
    assert len(told) <= 1
    return int(re.search(r"about (\d+) minutes", told[0])[1]) if told else 0  # type: ignore[index]


def test_the_time_grows_with_the_square_of_the_experts_in_all_layers() -> None:
    assert minutes(model(*[128] * 48)) == pytest.approx(4 * minutes(model(*[128] * 24)), rel=0.1)
    assert minutes(model(*[128] * 48)) == minutes(model(*[512] * 12)) == minutes(model(0, 2048, 0, 4096))


def test_stages_load_one_by_one() -> None:
    whole = minutes(model(*[128] * 48))
    assert minutes(model(*[128] * 48), pp=5) == pytest.approx(whole / 5, rel=0.1)


@pytest.mark.parametrize("experts", [(), (0, 0, 0), (8,) * 32, (32,) * 24, (128,) * 11])
def test_what_loads_quickly_is_not_worth_a_word(experts: tuple[int, ...]) -> None:
    assert minutes(model(0, *experts)) == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = model(750, 750)
    return made.save_huggingface(tmp_path_factory.mktemp("large") / "model", spec, normal(spec))


def test_a_conversion_warns_before_it_writes(large: Path, tmp_path: Path) -> None:
    asked = ("convert", large, "-o", tmp_path / "out", "--dtype", "float32", "--dry-run", "--to")
    told = command(*asked, "onnx")
    assert told.exit_code == 0
    assert told.stderr.startswith("Warning: ONNX Runtime will need about 2 minutes")
    assert "all layers together have 1,500; cut it into stages (--pp N" in told.stderr
    (warning,) = json.loads(command(*asked, "onnx", "--json").stdout)["warnings"]
    assert told.stderr == f"Warning: {warning}\n"
    assert "Warning" not in command(*asked, "hf").stderr


def test_a_build_warns_of_each_model_by_name(large: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    models = "".join(f"  - {{name: {name}, to: {name}, source: {large}, dtype: float32}}\n" for name in ("onnx", "hf"))
    file.write_text(f"repository: repository\ncache: cache\nmodels:\n{models}")
    told = command("build", file, "--dry-run")
    assert told.exit_code == 0, told.stderr
    assert told.stderr.startswith("Warning: onnx: ONNX Runtime will need about 2 minutes")
    assert told.stderr.count("Warning") == 1
