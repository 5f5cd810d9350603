"""Megatron-LM's file for each rank: whatever the layout of the training, the same model comes out."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoport.errors import DamagedInput, NemoportError, PolicyError, UnsupportedInput
from nemoport.exporters import source
from nemoport.exporters.formats import torch_zip
from nemoport.exporters.tensor import read

from .fixtures import EVIL, LLAMA
from .made import random_tensors
from .ranks import SPEC, State, arguments, check_equal, renamed, save_legacy, stages, tensor_rank, whole

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4")) * 25
CANONICAL = random_tensors(SPEC)


@pytest.fixture(scope="module")
def state() -> State:
    return whole(CANONICAL)


def test_the_run_and_its_iteration_are_one_checkpoint() -> None:
    run = LLAMA["megatron_legacy"].path
    assert source.checkpoint(run).tensors.keys() == source.checkpoint(run / "iter_0000010").tensors.keys()


@pytest.mark.parametrize("counts", [(3, 3), (2, 4), (6, 0)])
def test_uneven_stages(counts: tuple[int, ...], state: State, tmp_path: Path) -> None:
    cut = [stages(tensor_rank(state, t, 2), counts) for t in range(2)]
    models = {(t, p): {"model": cut[t][p]} for t in range(2) for p in range(2)}
    model = source.model(save_legacy(tmp_path, models, arguments()))
    check_equal(model.tensors, CANONICAL)
    assert model.checkpoint.trained == {"tp": 2, "pp": 2, "ep": 1}


def test_virtual_stages_take_turns(state: State, tmp_path: Path) -> None:
    """tp 2, pp 2, virtual 2, uneven: layers 0 1 | 2 | 3 | 4 5."""
    cut = [stages(tensor_rank(state, t, 2), (2, 1, 1, 2)) for t in range(2)]
    models = {(t, p): {f"model{v}": cut[t][2 * v + p] for v in range(2)} for t in range(2) for p in range(2)}
    check_equal(source.model(save_legacy(tmp_path, models, arguments())).tensors, CANONICAL)


def test_one_rank_in_the_older_file_name_of_a_release(state: State, tmp_path: Path) -> None:
    save_legacy(tmp_path, {(0,): {"model": state}}, arguments())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    (tmp_path / "iter_0000007").rename(tmp_path / "release")
    file = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    file.rename(file.with_name("model_rng.pt"))
    (tmp_path / "release/mp_rank_00_000").mkdir()  # where the older distributed optimizer lay
    (tmp_path / "release/mp_rank_00_000/optim.pt").write_bytes(b"")
    check_equal(source.model(tmp_path).tensors, CANONICAL)


@pytest.mark.parametrize("stated", [True, False], ids=["in the arguments", "by --config"])
def test_the_second_number_is_the_expert_rank_where_no_stages_are(stated: bool, tmp_path: Path) -> None:
    """Megatron-LM leaves the stage out of the name of a file when there is one."""
    models = {(0, e): {"model": _experts(2 * e, "sequential")} for e in range(2)}
    sizes: dict[str, Any] = {"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2}
    path = save_legacy(tmp_path, models, arguments(**(sizes if stated else {})))
    found = source.checkpoint(path, None if stated else sizes)
    assert found.trained == {"tp": 1, "pp": 1, "ep": 2}
    assert len(found.tensors) == 2 + 2 * 4


@pytest.mark.parametrize("kind", ["sequential", "grouped", "in one matrix"])
def test_experts_are_numbered_over_all_ranks(kind: str, tmp_path: Path) -> None:
    """tp 2, pp 2, ep 2: local expert 1 of the second rank is expert 3."""
    stage = [_experts(2 * e, kind) for e in range(2)]
    last = _together if kind == "in one matrix" else dict
    models = {
        (t, p, e): {"model": last(_expert_rank(stage[e], t))} for t in range(2) for p in range(2) for e in range(2)
    }
    found = source.checkpoint(save_legacy(tmp_path, models, arguments(pipeline_model_parallel_size=2)))
    assert found.trained == {"tp": 2, "pp": 2, "ep": 2}
    prefix = "mlp.experts.local_experts"
    expected = {
        f"decoder.layers.{layer}.{name}": tensor
        for layer in range(2)
        for name, tensor in {
            "mlp.router.weight": _numbers(99, 4, 8),
            "self_attention.linear_proj.weight": _numbers(98, 8, 6),
            **{f"{prefix}.{e}.linear_fc1.weight": _numbers(e, 12, 8) for e in range(4)},
            **{f"{prefix}.{e}.linear_fc2.weight": _numbers(10 + e, 8, 6) for e in range(4)},
        }.items()
    }
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(read(found.tensors[name])), tensor), name


@pytest.mark.parametrize("cut", [True, False], ids=["cut and gathered", "repeated"])
def test_down_projections_of_latents_in_both_of_the_ways_there_are(cut: bool, tmp_path: Path) -> None:
    """Ranks of 12 and 16 for queries and keys, 4 rotary dimensions beside the keys' latent, tp 2."""
    prefix = "decoder.layers.0.self_attention.linear_"
    downs = {f"{prefix}q_down_proj.weight": _numbers(1, 12, 8), f"{prefix}kv_down_proj.weight": _numbers(2, 20, 8)}
    ups = {f"{prefix}q_up_proj.weight": _numbers(3, 48, 12), f"{prefix}kv_up_proj.weight": _numbers(4, 64, 16)}
    halves = [{name: tensor.chunk(2)[t].clone() for name, tensor in {**downs, **ups}.items()} for t in range(2)]
    models = {(t,): {"model": halves[t] if cut else {**halves[t], **downs}} for t in range(2)}
    found = source.checkpoint(save_legacy(tmp_path, models, arguments()))
    for name, tensor in {**downs, **ups}.items():
        assert torch.equal(torch.from_numpy(read(found.tensors[name])), tensor), name


OLD = {
    "embedding.": "language_model.embedding.",
    "decoder.layers.": "language_model.encoder.layers.",
    "decoder.final_layernorm": "language_model.encoder.final_norm",
    "output_layer": "language_model.output_layer",
    "linear_qkv.layer_norm_weight": "_input_norm.weight",
    "self_attention._input_norm": "input_norm",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_norm.weight",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}
"""Megatron-LM's names before Megatron-core."""


def _nested(state: State) -> dict[str, Any]:
    """Megatron-LM nested the parts of its model, but not the layers."""
    model: dict[str, Any] = {"language_model": {"encoder": {}, "embedding": {"word_embeddings": {}}}}
    parts = model["language_model"]
    for name, tensor in renamed(state, OLD):
        bare = name.removeprefix("language_model.")
        if bare.startswith("encoder."):
            parts["encoder"][bare.removeprefix("encoder.")] = tensor
        elif bare.startswith("embedding."):
            parts["embedding"]["word_embeddings"]["weight"] = tensor
        else:
            parts["output_layer"] = {"weight": tensor}
    return model


def test_names_from_before_megatron_core(state: State, tmp_path: Path) -> None:
    models = {(t,): {"model": _nested(tensor_rank(state, t, 2))} for t in range(2)}
    check_equal(source.model(save_legacy(tmp_path, models, arguments())).tensors, CANONICAL)


@pytest.mark.parametrize("version", [0, 1.0, "new"])
def test_the_first_layouts_of_query_key_value_are_refused(version: object, state: State, tmp_path: Path) -> None:
    path = save_legacy(tmp_path, {(0,): {"model": _nested(state)}}, arguments(), checkpoint_version=version)
    with pytest.raises(UnsupportedInput, match="checkpoint_version"):
        source.model(path)


def test_what_is_no_weight_is_skipped_by_a_named_rule(state: State, tmp_path: Path) -> None:
    extra = {
        "decoder.layers.0.self_attention.core_attention._extra_state": None,
        "decoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"pickled by Transformer Engine 1"),
        "decoder.layers.0.mlp.linear_fc2._extra_state": torch.zeros(3, dtype=torch.uint8),
        "rotary_pos_emb.inv_freq": torch.zeros(3),
    }
    found = source.model(save_legacy(tmp_path, {(0,): {"model": state | extra}}, arguments()))
    check_equal(found.tensors, CANONICAL)
    assert found.checkpoint.skipped == {
        **{name: "extra state of Transformer Engine" for name in extra if "_extra" in name},
        "rotary_pos_emb.inv_freq": "rotary frequencies",
        "mp_rank_00/model_optim_rng.pt:optimizer": "optimizer state",
        "mp_rank_00/model_optim_rng.pt:rng_state": "random number generators",
    }


def test_tensors_may_share_a_storage(state: State, tmp_path: Path) -> None:
    """Megatron's distributed optimizer keeps all weights in one buffer, and they were saved as views of it."""
    buffer = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = buffer[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    check_equal(source.model(save_legacy(tmp_path, {(0,): {"model": views}}, arguments())).tensors, CANONICAL)


FC1, NORM = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"
Ranks = dict[tuple[int, ...], dict[str, Any]]


def _drop_rank(ranks: Ranks) -> None:
    del ranks[1, 0]


def _drop_tensor(ranks: Ranks) -> None:
    del ranks[1, 1]["model"][NORM]


def _other_shape(ranks: Ranks) -> None:
    ranks[1, 0]["model"][FC1] = ranks[1, 0]["model"][FC1][:-1].clone()


def _transposed(ranks: Ranks) -> None:
    ranks[1, 0]["model"][FC1] = ranks[1, 0]["model"][FC1].T.contiguous().T


def _gap(ranks: Ranks) -> None:
    for rank in ranks.values():
        for name in [name for name in rank["model"] if "layers.1." in name]:
            rank["model"][name.replace("layers.1.", "layers.5.")] = rank["model"].pop(name)


def _number(ranks: Ranks) -> None:
    for rank in ranks.values():
        rank["model"] = torch.zeros(3)


def _itself(ranks: Ranks) -> None:
    ranks[0, 0]["model"]["self"] = ranks[0, 0]["model"]


def _unknown_part(ranks: Ranks) -> None:
    for rank in ranks.values():
        rank["model"]["decoder.layers.0.mixer.in_proj.weight"] = torch.zeros(4, 4)


def _unknown_section(ranks: Ranks) -> None:
    ranks[0, 0]["ema"] = {"a": [torch.zeros(3)]}


def _another_model(ranks: Ranks) -> None:
    ranks[0, 0]["model0"] = ranks[0, 0].pop("model")
    ranks[0, 0]["model1"] = dict(ranks[0, 0]["model0"])


@pytest.mark.parametrize(
    "change, error, says",
    [
        (_drop_rank, DamagedInput, r"\(1, 0, 0\) is missing"),
        (_drop_tensor, DamagedInput, NORM),
        (_other_shape, DamagedInput, FC1),
        (_transposed, UnsupportedInput, "contiguous"),
        (_gap, DamagedInput, "without a gap"),
        (_number, DamagedInput, "StoredTensor"),
        (_itself, DamagedInput, "no name"),
        (_unknown_part, UnsupportedInput, "in_proj"),
        (_unknown_section, UnsupportedInput, "ema"),
        (_another_model, DamagedInput, "virtual"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(
    change: Callable[[Ranks], None], error: type[NemoportError], says: str, state: State, tmp_path: Path
) -> None:
    cut = [stages(tensor_rank(state, t, 2), (3, 3)) for t in range(2)]
    models: Ranks = {(t, p): {"model": cut[t][p]} for t in range(2) for p in range(2)}
    change(models)
    with pytest.raises(error, match=says):
        source.model(save_legacy(tmp_path, models, arguments()))


def test_a_truncated_file_is_refused(state: State, tmp_path: Path) -> None:
    path = save_legacy(tmp_path, {(0,): {"model": state}}, arguments())
    (file,) = path.rglob("*.pt")
    content = file.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DamagedInput):
            source.model(path)


def test_files_with_bytes_changed_are_read_or_refused(state: State, tmp_path: Path) -> None:
    """In the pickle, in the headers of the zip and in its directory."""
    small = {name: tensor for name, tensor in state.items() if "layers" not in name or "layers.0" in name}
    path = save_legacy(tmp_path, {(0,): {"model": small}}, arguments(num_layers=1))
    (file,) = path.rglob("*.pt")
    content, seed = file.read_bytes(), 6
    bits = random.Random(seed)
    parts = [(0, 4000), (content.rindex(b"PK\x03\x04"), len(content)), (0, len(content))]
    for round_ in range(ROUNDS):
        damaged = bytearray(content)
        for _ in range(bits.choice((1, 1, 2, 8))):
            at = bits.randrange(*bits.choice(parts))
            damaged[at] = bits.choice((damaged[at] ^ 1 << bits.randrange(8), bits.randrange(256)))
        file.write_bytes(damaged)
        with suppress(NemoportError):
            for tensor in source.model(path).tensors.values():
                assert read(tensor).shape == tensor.shape, round_


def test_files_from_before_torch_1_6_are_known_for_what_they_are(state: State, tmp_path: Path) -> None:
    path = save_legacy(tmp_path, {(0,): {"model": state}}, arguments())
    (file,) = path.rglob("*.pt")
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedInput, match=r"before 1\.6"):
        source.model(path)


@pytest.mark.parametrize("name", ["megatron_legacy", "nemo1", "nemo1, torch_dist"])
def test_no_number_is_looked_for_before_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch_zip, "_place", place)
    tensors = source.model(LLAMA[name].path).tensors
    with pytest.raises(AssertionError):
        read(tensors["norm.weight"])


def test_an_evil_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(EVIL / "legacy", tmp_path / "copy"))
    with pytest.raises(PolicyError, match=r"mp_rank_00/model_optim_rng\.pt would import"):
        source.checkpoint(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _experts(first: int, kind: str) -> State:
    """A layer with experts `first` and the next, under their local numbers."""
    state = {"mlp.router.weight": _numbers(99, 4, 8), "self_attention.linear_proj.weight": _numbers(98, 8, 6)}
    for local in range(2):
        for matrix, tensor in (
            ("linear_fc1", _numbers(first + local, 12, 8)),
            ("linear_fc2", _numbers(10 + first + local, 8, 6)),
        ):
            one, grouped = f"local_experts.{local}.{matrix}.weight", f"{matrix}.weight{local}"
            state[f"mlp.experts.{grouped if kind == 'grouped' else one}"] = tensor
    return {f"decoder.layers.0.{name}": tensor for name, tensor in state.items()}


def _together(state: State) -> State:
    """The rank's experts as GroupedMLP holds them: the memory of [experts, in, out], seen as a matrix."""
    kept = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for number, matrix in enumerate(("linear_fc1", "linear_fc2"), 1):
        whole = torch.stack([tensor.T for name, tensor in state.items() if matrix in name])
        _, inputs, outputs = whole.shape
        shape = (inputs, -1) if number == 1 else (-1, outputs)
        kept[f"decoder.layers.0.mlp.experts.weight{number}"] = whole.reshape(shape)
    return kept


def _expert_rank(state: State, rank: int) -> State:
    """Experts are cut over tensor ranks too, gates and ups apart."""

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "linear_fc1" in name:
            return torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
        return tensor.chunk(2, 1)[rank].clone() if "fc2" in name or "proj" in name else tensor

    return {name: cut(name, tensor) for name, tensor in state.items()}
