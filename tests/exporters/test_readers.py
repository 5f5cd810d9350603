"""Whoever wrote a checkpoint, and however it was cut: the same model comes out."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemoport import plugins
from nemoport.exporters import source
from nemoport.exporters.formats import torch_dist
from nemoport.exporters.formats.tree import Directory, Part
from nemoport.exporters.tensor import LazyTensor, Span, read

from .commands import converted
from .conftest import Once
from .fixtures import HUGGINGFACE, LLAMA, MEGATRON, VOCABULARY, Fixture, answers, every_llama
from .made import SPECS, config, random_tensors, save_huggingface, save_sparse, save_torch_dist, sized

READERS = plugins.load_all(source.READERS)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_a_fixture(name: str) -> None:
    assert name in {fixture.format for fixture in LLAMA.values()}


@every_llama
def test_exactly_one_reader_takes_a_checkpoint(fixture: Fixture) -> None:
    recognising = {name for name, reader in READERS.items() if reader.recognises(fixture.path)}
    wrapped = {name for recognised in recognising for name in READERS[recognised].WRAPS}
    assert recognising - wrapped == {fixture.format}
    assert source.reader(fixture.path)[0] == fixture.format


@pytest.mark.parametrize("name", READERS)
def test_no_reader_recognises_what_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        assert not READERS[name].recognises(path)


@every_llama
def test_every_checkpoint_becomes_the_same_tensors(fixture: Fixture, once: Once) -> None:
    made = load_file(once(fixture, "hf") / "model.safetensors")
    expected = load_file(HUGGINGFACE / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype, name
        assert torch.equal(made[name].view(torch.int16), tensor.view(torch.int16)), name


@every_llama
def test_transformers_loads_the_result_and_answers_as_megatron(fixture: Fixture, once: Once) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(once(fixture, "hf"), dtype=torch.float32)
    assert type(model) is transformers.LlamaForCausalLM
    tokens, logits = answers()
    with torch.inference_mode():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


@every_llama
def test_padded_vocabulary_keeps_the_rows_that_were_stored(fixture: Fixture, once: Once) -> None:
    directory = once(fixture, "hf", vocab="padded")
    made, true = (load_file(path / "model.safetensors") for path in (directory, HUGGINGFACE))
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == fixture.rows
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert made[name].shape == (fixture.rows, 64)
        assert torch.equal(made[name][:VOCABULARY], true[name])


@every_llama
def test_any_slice_is_that_of_the_whole(fixture: Fixture) -> None:
    stored = source.checkpoint(fixture.path, fixture.config).tensors
    bits = np.random.default_rng(1)
    for name, tensor in stored.items():
        whole = _bits(tensor)
        for _ in range(3):
            ends = [sorted(bits.integers(0, size + 1, 2).tolist()) for size in tensor.shape]
            box: tuple[Span, ...] = tuple((low, high) for low, high in ends)
            np.testing.assert_array_equal(_bits(tensor.cut(box)), whole[tuple(slice(*span) for span in box)], name)


@every_llama
def test_shapes_are_known_without_the_numbers(fixture: Fixture, tmp_path: Path) -> None:
    """In the copy, every tensor file is a hole, but for the header of safetensors and the arguments of a run."""
    whole = fixture.path.parent if fixture.path.name == "weights" else fixture.path
    copy = Path((shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / "copy"))
    copy /= fixture.path.relative_to(whole)
    for path in (path for path in copy.rglob("*") if path.is_file()):
        if (kept := _kept(path)) is None:
            continue
        content = path.read_bytes()
        with path.open("wb") as file:
            file.truncate(len(content))
            for start, stop in kept:
                file.seek(start)
                file.write(content[start:stop])
    hollow, full = (source.model(path, fixture.config) for path in (copy, fixture.path))
    assert hollow.spec == full.spec
    assert {name: tensor.shape for name, tensor in hollow.tensors.items()} == {
        name: tensor.shape for name, tensor in full.tensors.items()
    }


def test_a_checkpoint_far_larger_than_any_disk_is_understood_at_once(tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "model", sized(layers=90, hidden=16384, ffn=53248, vocab=128256, heads=128))
    model = source.model(path)
    assert sum(math.prod(tensor.shape) * 2 for tensor in model.tensors.values()) > 5e11


@pytest.mark.parametrize("shard", ["one file", "three shards"])
@pytest.mark.parametrize("name", SPECS["llama"])
def test_a_made_huggingface_checkpoint_reads_back_equal(name: str, shard: str, tmp_path: Path) -> None:
    spec = SPECS["llama"][name]
    canonical = random_tensors(spec)
    directory = save_huggingface(tmp_path / "model", spec, canonical)
    if shard != "one file":
        _reshard(directory, 3)
    _check_equal(source.model(directory).tensors, canonical)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.module."])
@pytest.mark.parametrize("name", ["plain", "tied", "every bias", "one group", "qk norm, tied"])
def test_a_made_torch_dist_checkpoint_reads_back_equal(name: str, prefix: str, tmp_path: Path) -> None:
    spec = SPECS["llama"][name]
    canonical = random_tensors(spec)
    directory = save_torch_dist(tmp_path / "model", spec, canonical, prefix)
    _check_equal(source.model(directory, config(spec, "megatron")).tensors, canonical)


def test_what_training_leaves_beside_the_weights_is_skipped_by_a_named_rule(tmp_path: Path) -> None:
    spec = SPECS["llama"]["plain"]
    more = {
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(10),
        "decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(3, dtype=torch.uint8),
        "rng_state": torch.zeros(2, dtype=torch.uint8),
        "rotary_pos_emb.inv_freq": torch.zeros(3),
    }
    canonical = random_tensors(spec)
    directory = save_torch_dist(tmp_path / "model", spec, canonical, more=more)
    model = source.model(directory, config(spec, "megatron"))
    _check_equal(model.tensors, canonical)
    assert model.checkpoint.skipped.keys() == more.keys()


def test_io_json_alone_says_what_model_yaml_says(tmp_path: Path) -> None:
    """Older NeMo 2.0 wrote no model.yaml."""
    fixture = LLAMA["nemo2"]
    copy = Path(shutil.copytree(fixture.path, tmp_path / "copy"))
    (copy / "context/model.yaml").unlink()
    assert source.model(copy).spec == source.model(fixture.path).spec


@every_llama
def test_the_layout_of_training_is_told_where_it_is_recorded(fixture: Fixture) -> None:
    trained = source.checkpoint(fixture.path, fixture.config).trained
    if fixture.format == "megatron_lm":
        assert trained["tp"] == 2
    assert set(trained) <= {"tp", "pp", "ep"}


def test_a_config_goes_before_what_the_files_say(tmp_path: Path) -> None:
    model = source.model(HUGGINGFACE, {"rope_theta": 123.0})
    rope = model.spec.mixers[0].rope
    assert rope is not None
    assert rope.base == 123.0


def test_config_may_be_yaml(tmp_path: Path) -> None:
    import yaml

    from .commands import command

    fixture = LLAMA["torch_dist"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict(fixture.config or {})))
    out = tmp_path / "out"
    assert (
        command("convert", fixture.path, "--to", "hf", "--config", tmp_path / "config.yaml", "-o", out).exit_code == 0
    )
    assert (out / "model.safetensors").read_bytes() == (
        converted(fixture, "hf", tmp_path / "json") / "model.safetensors"
    ).read_bytes()


def test_prefixes_of_the_directory_names_do_not_matter() -> None:
    """`latest_checkpointed_iteration.txt` names the iteration, which is read and not guessed."""
    run, iteration = LLAMA["megatron_lm"], LLAMA["megatron_lm, iteration"]
    assert source.checkpoint(run.path).tensors.keys() == source.checkpoint(iteration.path).tensors.keys()
    assert (MEGATRON / "megatron_lm/torch_dist_tp2/latest_checkpointed_iteration.txt").read_text().strip() == "10"


def _kept(path: Path) -> list[Span] | None:
    """What is needed of a file of tensors without their numbers; None of another file."""
    if path.suffix == ".safetensors":
        return [(0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))]
    if path.suffix == ".distcp":
        objects = torch_dist.read(Directory(path.parent)).objects.values()
        places = [each for each in objects if isinstance(each, Part) and each.name == path.name]
        return [(each.start, each.start + each.size) for each in places]
    return [] if (path.parent / ".zarray").is_file() and path.name != ".zarray" else None


def _bits(tensor: LazyTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    whole = read(tensor)
    return np.ascontiguousarray(whole).view(f"u{whole.itemsize}").reshape(whole.shape)


def _check_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(_bits(found[name]), _bits(expected[name]), name)


def _reshard(directory: Path, count: int) -> None:
    from safetensors.torch import save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
