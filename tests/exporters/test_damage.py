"""Hostile and damaged input: one clear sentence, the right exit code, nothing written, nothing executed."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from .commands import command, sentence
from .fixtures import EVIL, HUGGINGFACE, LLAMA, MEGATRON
from .made import SPECS, config, random_tensors, save_torch_dist

Change = Callable[[Path], object]
MCORE = ("--config", LLAMA["torch_dist"].config_file)


@dataclass(frozen=True)
class Case:
    """A copy of `source`, changed in place or into another path, and how its conversion must end."""

    code: int | tuple[int, ...]
    source: Path
    change: Change = lambda path: None
    arguments: tuple[object, ...] = ()
    says: str = ""


def _first_shard(path: Path) -> Path:
    return sorted(path.rglob("*.distcp"))[0]


def _truncate(name: str, share: float) -> Change:
    def change(path: Path) -> None:
        (found,) = path.rglob(name)
        with found.open("r+b") as file:
            file.truncate(int(found.stat().st_size * share))

    return change


def _overwrite(name: str, content: bytes) -> Change:
    def change(path: Path) -> None:
        (found,) = path.rglob(name)
        found.write_bytes(content)

    return change


def _remove(name: str) -> Change:
    def change(path: Path) -> None:
        for found in path.rglob(name):
            found.unlink()

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return rewrite


def _words(**words: Any) -> Change:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | words))

    return change


def _header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """The JSON header of the safetensors file, edited; the numbers stay where they are."""

    def change(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        edit(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return change


def _index(edit: Callable[[Any], object]) -> Change:
    """`.metadata` as torch itself reads it, edited and pickled again."""

    def change(path: Path) -> None:
        (file,) = path.rglob(".metadata")
        metadata = pickle.loads(file.read_bytes())
        edit(metadata)
        file.write_bytes(pickle.dumps(metadata))

    return change


def _point_to(place: str) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = place

    return edit


def _edit_chunk(**fields: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
        for name, value in fields.items():
            setattr(entry.chunks[0], name, value)

    return edit


def _edit_places(**fields: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(info, name, value)

    return edit


class _Exploit:
    """Unpickled by anything but the restricted unpickler, it leaves a file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch EVIL_RAN_{self.name}",)


def _hostile_common(path: Path) -> None:
    (file,) = path.rglob("common.pt")
    torch.save({"args": _Exploit("common"), "argparse": 1}, file)


def _hostile_shard(path: Path) -> None:
    """The pickle inside a chunk's archive; only the numbers beside it are needed, so it must not be opened."""
    directory = path / "made"
    spec = SPECS["llama"]["plain"]
    save_torch_dist(
        directory, spec, random_tensors(spec), more={"decoder.layers.0.evil._extra_state": _Exploit("shard")}
    )
    (path / "made.json").write_text(json.dumps(config(spec, "megatron")))


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _sharded(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "model-00001-of-00001.safetensors")
    where = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _and(*changes: Change) -> Change:
    def change(path: Path) -> None:
        for each in changes:
            each(path)

    return change


def _weight_map(edit: Callable[[dict[str, str]], object]) -> Change:
    def change(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        edit(index["weight_map"])
        file.write_text(json.dumps(index))

    return _and(_sharded, change)


NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
BARE, LM, BRIDGE, NEMO2 = (LLAMA[name].path for name in ("torch_dist", "megatron_lm", "megatron_bridge", "nemo2"))
YAML_BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)

CASES = {
    # hostile
    "evil index": Case(5, EVIL / "torch_dist_metadata", arguments=MCORE, says="posix.system"),
    "evil legacy": Case(5, EVIL / "legacy", says="posix.system"),
    "evil tar": Case(5, EVIL / "traversal.nemo", says="leaves the archive"),
    "evil arguments": Case(5, LM, _hostile_common, says="system"),
    "index points outside": Case(3, BARE, _index(_point_to("../../secret")), MCORE, "outside"),
    "index points to an absolute path": Case(3, BARE, _index(_point_to("/etc/passwd")), MCORE, "outside"),
    "weight map points outside": Case(3, HUGGINGFACE, _weight_map(lambda m: m.update({NORM: "../x.safetensors"}))),
    "python in run_config.yaml": Case(
        3, BRIDGE, _overwrite("run_config.yaml", b"model: !!python/object/apply:os.system ['touch EVIL_RAN_yaml']\n")
    ),
    "python in model.yaml": Case(
        3, NEMO2, _overwrite("model.yaml", b"config: !!python/object/apply:os.system ['touch EVIL_RAN_yaml']\n")
    ),
    # damaged torch_dist
    "evil truncated": Case(3, EVIL / "torch_dist_truncated", arguments=MCORE, says="truncated"),
    "truncated shard": Case(3, NEMO2, _truncate("__0_1.distcp", 0.5), says="truncated"),
    "empty shard": Case(3, NEMO2, _truncate("__0_1.distcp", 0), says="truncated"),
    "missing shard": Case(3, NEMO2, _remove("__0_0.distcp"), says="__0_0.distcp is missing"),
    "shard of zeros": Case(3, BARE, lambda path: _zero(_first_shard(path)), MCORE, "torch.save"),
    "index cut": Case(3, BARE, _truncate(".metadata", 0.5), MCORE),
    "index empty": Case(3, BARE, _truncate(".metadata", 0), MCORE),
    "index of noise": Case(3, BARE, _overwrite(".metadata", b"\x80\x04noise."), MCORE),
    "index of something else": Case(3, BARE, _overwrite(".metadata", pickle.dumps({"a": 1})), MCORE),
    "chunk outside its tensor": Case(3, BARE, _index(_edit_chunk(offsets=torch.Size([1000]))), MCORE),
    "chunk of a negative size": Case(3, BARE, _index(_edit_chunk(sizes=torch.Size([-64]))), MCORE),
    "chunk too small": Case(3, BARE, _index(_edit_chunk(sizes=torch.Size([32]))), MCORE, "final_layernorm"),
    "offset behind the end": Case(3, BARE, _index(_edit_places(offset=2**40)), MCORE, "truncated"),
    "negative offset": Case(3, BARE, _index(_edit_places(offset=-5)), MCORE),
    "negative length": Case(3, BARE, _index(_edit_places(length=-5)), MCORE),
    "offset of another chunk": Case(3, BARE, _index(_edit_places(offset=0)), MCORE),
    "compressed chunks": Case(3, BARE, _index(_edit_places(transform_descriptors=["zstd"])), MCORE, "zstd"),
    "tensor missing from the index": Case(
        3, BARE, _index(lambda m: m.state_dict_metadata.pop("decoder.final_layernorm.weight")), MCORE, "norm.weight"
    ),
    "tensor nobody knows": Case(
        3,
        BARE,
        _index(
            lambda m: (
                m.state_dict_metadata.update(unknown=m.state_dict_metadata["decoder.final_layernorm.weight"]),
                [
                    m.storage_data.update({type(key)("unknown", key.offset, key.index): info})
                    for key, info in list(m.storage_data.items())
                    if key.fqn == "decoder.final_layernorm.weight"
                ],
            )
        ),
        MCORE,
        "unknown",
    ),
    "common.pt cut": Case(2, LM, _truncate("common.pt", 0.5), says="--config"),
    "run_config.yaml is no YAML": Case(3, BRIDGE, _overwrite("run_config.yaml", b"a: [")),
    "run_config.yaml is a list": Case(3, BRIDGE, _overwrite("run_config.yaml", b"- 1\n")),
    "run_config.yaml without a model": Case(3, BRIDGE, _overwrite("run_config.yaml", b"train: {}\n")),
    "run_config.yaml is empty": Case(3, BRIDGE, _overwrite("run_config.yaml", b"")),
    "run_config.yaml is a bomb": Case(3, BRIDGE, _overwrite("run_config.yaml", YAML_BOMB)),
    "model.yaml is no YAML": Case(3, NEMO2, _overwrite("model.yaml", b"a: [")),
    "model.yaml is binary": Case(3, NEMO2, _overwrite("model.yaml", bytes(range(256)))),
    "io.json is no JSON": Case(3, NEMO2, _and(_remove("model.yaml"), _overwrite("io.json", b"{"))),
    "io.json is empty": Case(3, NEMO2, _and(_remove("model.yaml"), _overwrite("io.json", b"{}"))),
    "tokenizer.json is no JSON": Case(3, NEMO2, _overwrite("tokenizer.json", b"{")),
    # damaged Hugging Face
    "safetensors cut": Case(3, HUGGINGFACE, _truncate("model.safetensors", 0.7), says="truncated"),
    "safetensors cut in the header": Case(3, HUGGINGFACE, _truncate("model.safetensors", 0.001)),
    "safetensors empty": Case(3, HUGGINGFACE, _truncate("model.safetensors", 0)),
    "safetensors of noise": Case(3, HUGGINGFACE, _overwrite("model.safetensors", b"\xff" * 999)),
    "header is a list": Case(3, HUGGINGFACE, _overwrite("model.safetensors", b"\x02\0\0\0\0\0\0\0[]")),
    "header with offsets behind the end": Case(
        3, HUGGINGFACE, _header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 128])), says="truncated"
    ),
    "header with negative offsets": Case(3, HUGGINGFACE, _header(lambda h: h[NORM].update(data_offsets=[-128, 0]))),
    "header with a wrong shape": Case(3, HUGGINGFACE, _header(lambda h: h[NORM].update(shape=[63])), says=NORM),
    "header with an unknown dtype": Case(3, HUGGINGFACE, _header(lambda h: h[NORM].update(dtype="F4")), says="F4"),
    "header with a shape of words": Case(3, HUGGINGFACE, _header(lambda h: h[NORM].update(shape=["a"]))),
    "header with an empty entry": Case(3, HUGGINGFACE, _header(lambda h: h.update({NORM: {}}))),
    "header with a null entry": Case(3, HUGGINGFACE, _header(lambda h: h.update({NORM: None}))),
    "overlapping tensors": Case(
        3, HUGGINGFACE, _header(lambda h: h[NORM].update(data_offsets=[0, 128])), says="overlap"
    ),
    "missing tensor": Case(3, HUGGINGFACE, _tensors(lambda t: t.pop(NORM)), says=f"({NORM})"),
    "unknown tensor": Case(3, HUGGINGFACE, _tensors(lambda t: t.update(extra=torch.zeros(3))), says="extra"),
    "tensor of a layer too many": Case(
        3,
        HUGGINGFACE,
        _tensors(lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[UP].clone()})),
        says="layers.4",
    ),
    "tensor of another shape": Case(3, HUGGINGFACE, _tensors(lambda t: t.update({UP: t[UP][:-1].clone()})), says=UP),
    "integer weights": Case(3, HUGGINGFACE, _tensors(lambda t: t.update({UP: t[UP].to(torch.int64)})), says="int64"),
    "weight map without a tensor": Case(3, HUGGINGFACE, _weight_map(lambda m: m.pop(NORM)), says=NORM),
    "weight map with a tensor too many": Case(
        3, HUGGINGFACE, _weight_map(lambda m: m.update(extra="model-00001-of-00001.safetensors")), says="extra"
    ),
    "shard of the weight map missing": Case(
        3,
        HUGGINGFACE,
        _weight_map(lambda m: m.update({NORM: "model-00002.safetensors"})),
        says="model-00002.safetensors",
    ),
    "config.json is no JSON": Case(3, HUGGINGFACE, _overwrite("config.json", b"{")),
    "config.json is a list": Case(3, HUGGINGFACE, _overwrite("config.json", b"[]")),
    "config.json is empty": Case(3, HUGGINGFACE, _overwrite("config.json", b"")),
    "config.json nests too deep": Case(3, HUGGINGFACE, _overwrite("config.json", b'{"a":' * 100_000)),
    "config.json of an unknown family": Case(3, HUGGINGFACE, _words(model_type="bert"), says="bert"),
    "config.json with another activation": Case(3, HUGGINGFACE, _words(hidden_act="gelu"), says="gelu"),
    "config.json with an unknown rope": Case(3, HUGGINGFACE, _words(rope_scaling={"rope_type": "su"}), says="'su'"),
    "config.json with half a rope": Case(3, HUGGINGFACE, _words(rope_scaling={"rope_type": "llama3"})),
    "config.json with no number": Case(3, HUGGINGFACE, _words(hidden_size="many"), says="hidden_size"),
    "config.json with no layers": Case(3, HUGGINGFACE, _words(num_hidden_layers=0), says="num_hidden_layers"),
    "config.json with heads that do not divide": Case(3, HUGGINGFACE, _words(num_key_value_heads=3)),
    "quantized": Case(3, HUGGINGFACE, _words(quantization_config={"quant_method": "awq"}), says="awq"),
    # wrong --config
    "config of another width": Case(3, BARE, arguments=("--config", {"hidden_size": 128}), says="another model"),
    "config with fewer layers": Case(3, BARE, arguments=("--config", {"num_layers": 3}), says="another model"),
    "config with more layers": Case(3, BARE, arguments=("--config", {"num_layers": 5}), says="another model"),
    "config of a mixture of experts": Case(
        3, BARE, arguments=("--config", {"num_moe_experts": 8}), says="mlp.router.weight"
    ),
    "config with other groups": Case(3, BARE, arguments=("--config", {"num_query_groups": 8}), says="another model"),
    "config of a tied model": Case(0, BARE, arguments=("--config", {"share_embeddings_and_output_weights": True})),
    "config with a larger vocabulary": Case(
        3, BARE, arguments=("--config", {"vocab_size": 400}), says="word_embeddings"
    ),
    "config with layer norm": Case(3, BARE, arguments=("--config", {"normalization": "LayerNorm"}), says="no family"),
    "config that is no JSON": Case(3, BARE, lambda path: (path / "b.json").write_text("{"), ("--config", "b.json")),
    "config that is no YAML": Case(3, BARE, lambda path: (path / "b.yaml").write_text("a: ["), ("--config", "b.yaml")),
    # usage
    "no architecture": Case(2, BARE, says="--config"),
    "config that is not there": Case(2, BARE, arguments=("--config", "nowhere.json"), says="nowhere.json"),
    "vocabulary unknown": Case(2, BARE, arguments=("--config", {"vocab_size": None}), says="--vocab padded"),
    "tp that does not divide the heads": Case(2, NEMO2, arguments=("--to", "trtllm", "--tp", 3), says="1, 2, 4 or 8"),
    "tp of zero": Case(2, NEMO2, arguments=("--to", "trtllm", "--tp", 0)),
    "negative tp": Case(2, NEMO2, arguments=("--to", "trtllm", "--tp", -2)),
    "pp that does not divide the layers": Case(2, NEMO2, arguments=("--to", "trtllm", "--pp", 3), says="1, 2 or 4"),
    "ranks for hf": Case(2, NEMO2, arguments=("--tp", 2), says="trtllm"),
    "unknown target": Case(2, NEMO2, arguments=("--to", "gguf"), says="hf"),
    "an empty directory": Case(3, NEMO2, _empty),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_one_sentence_and_nothing_else(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / case.source.name
    shutil.copytree(case.source, source) if case.source.is_dir() else shutil.copy(case.source, source)
    case.change(source)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    arguments = [_argument(argument, source, tmp_path) for argument in case.arguments]
    target = [] if "--to" in arguments else ["--to", "hf"]
    result = command("convert", source, *target, *arguments, "-o", place / "out")
    if case.code == 0:
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code in (case.code if isinstance(case.code, tuple) else (case.code,)), result.stderr
    assert case.says in sentence(result.stderr)
    assert len(result.stderr) < 600
    assert not list(place.iterdir())
    assert not list(tmp_path.rglob("EVIL_RAN_*"))
    assert not list(Path("/").glob("EVIL_RAN_*"))


@pytest.mark.parametrize(
    "name", ["evil index", "evil arguments", "truncated shard", "config.json is no JSON", "evil tar"]
)
def test_inspecting_bad_input_is_one_sentence_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    source = tmp_path / case.source.name
    shutil.copytree(case.source, source) if case.source.is_dir() else shutil.copy(case.source, source)
    case.change(source)
    monkeypatch.chdir(tmp_path)
    result = command("inspect", source)
    assert result.exit_code in (case.code if isinstance(case.code, tuple) else (case.code,))
    assert case.says in sentence(result.stderr)
    assert not list(tmp_path.rglob("EVIL_RAN_*"))


def test_a_hostile_object_among_the_shards_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_dist keeps RNG and extra states as pickled bytes, which no conversion needs."""
    monkeypatch.chdir(tmp_path)
    _hostile_shard(tmp_path)
    out = tmp_path / "out"
    result = command("convert", tmp_path / "made", "--to", "hf", "--config", tmp_path / "made.json", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert not list(tmp_path.rglob("EVIL_RAN_*"))


def test_the_exploits_of_these_tests_do_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would be shown by their not having run."""
    monkeypatch.chdir(tmp_path)
    pickle.loads((EVIL / "torch_dist_metadata/.metadata").read_bytes())
    pickle.loads(pickle.dumps(_Exploit("common")))
    yaml.unsafe_load("model: !!python/object/apply:os.system ['touch EVIL_RAN_yaml']\n")
    assert {path.name for path in tmp_path.iterdir()} == {"EVIL_RAN_metadata", "EVIL_RAN_common", "EVIL_RAN_yaml"}
    with tarfile.open(EVIL / "traversal.nemo") as archive:
        assert any(".." in member.name for member in archive)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/deeper", "file"])
def test_a_path_that_is_no_checkpoint_is_said_so(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for arguments in (("convert", tmp_path / path, "--to", "hf", "-o", tmp_path / "out"), ("inspect", tmp_path / path)):
        result = command(*arguments)
        assert result.exit_code == (3 if path == "file" else 2)
        assert path in sentence(result.stderr)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_fixtures_were_not_harmed() -> None:
    assert not list(MEGATRON.parent.rglob("EVIL_RAN_*"))


def _argument(argument: object, source: Path, directory: Path) -> object:
    """Words become a config file: those of the fixture with these in their place. A file's name is in the source."""
    if isinstance(argument, dict):
        words = {**(LLAMA["torch_dist"].config or {}), **argument}
        (directory / "words.json").write_text(json.dumps(words))
        return directory / "words.json"
    return source / argument if isinstance(argument, str) and argument.endswith((".json", ".yaml")) else argument


def _zero(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(bytes(size))
