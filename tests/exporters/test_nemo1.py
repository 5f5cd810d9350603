"""NeMo 1.0: however the archive was packed and whatever the weights in it are called, the same model comes out."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoport.errors import DamagedInput, NemoportError, PolicyError, UnsupportedInput
from nemoport.exporters import source
from nemoport.exporters.formats import tokenizer
from nemoport.exporters.formats.megatron import words_of_yaml
from nemoport.spec import Attention, Llama3Scaling

from .commands import contents, converted
from .conftest import Once
from .fixtures import EVIL, HUGGINGFACE, LLAMA, MEGATRON, Fixture
from .made import random_tensors
from .ranks import SPEC, State, check_equal, nemo1_config, renamed, save_nemo1, stages, tensor_rank, whole

NEMO = [LLAMA["nemo1"], LLAMA["nemo1, torch_dist"]]
every_nemo = pytest.mark.parametrize("fixture", NEMO, ids=["ranks", "torch_dist"])
CANONICAL = random_tensors(SPEC)


@pytest.fixture(scope="module")
def state() -> State:
    return whole(CANONICAL)


def _gzipped(fixture: Fixture, directory: Path) -> Path:
    path = directory / "model.nemo"
    path.write_bytes(gzip.compress(fixture.path.read_bytes(), 1))
    return path


def _in_two_streams(fixture: Fixture, directory: Path) -> Path:
    """As gzip allows: one stream after another, and padding."""
    content = fixture.path.read_bytes()
    path = directory / "model.tar.gz"
    path.write_bytes(gzip.compress(content[:100_001], 1) + gzip.compress(content[100_001:], 1) + bytes(1000))
    return path


def _unpacked(fixture: Fixture, directory: Path) -> Path:
    with tarfile.open(fixture.path) as tar:
        tar.extractall(directory / "unpacked", filter="data")
    return directory / "unpacked"


def _repacked(format_: int, prefix: str) -> Callable[[Fixture, Path], Path]:
    def repack(fixture: Fixture, directory: Path) -> Path:
        source, path = _unpacked(fixture, directory), directory / "model"
        with tarfile.open(path, "w", format=format_) as tar:
            for file in sorted(source.rglob("*"), reverse=True):
                tar.add(file, f"{prefix}{file.relative_to(source)}", recursive=False)
        shutil.rmtree(source)
        return path

    return repack


PACKED = {
    "gzip": _gzipped,
    "gzip in two streams": _in_two_streams,
    "unpacked": _unpacked,
    "without ./": _repacked(tarfile.PAX_FORMAT, ""),
    "GNU tar": _repacked(tarfile.GNU_FORMAT, "./"),
    "ustar": _repacked(tarfile.USTAR_FORMAT, "./"),
}


@every_nemo
@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED.keys())
def test_the_packing_does_not_matter(
    pack: Callable[[Fixture, Path], Path], fixture: Fixture, once: Once, tmp_path: Path
) -> None:
    path = pack(fixture, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert source.reader(path)[0] == "nemo1"
    made = converted(path, "hf", tmp_path / "made")
    shutil.rmtree(tmp_path / "made") if (expected := contents(once(fixture, "hf"))) == contents(made) else None
    assert sorted(tmp_path.rglob("*")) == before, "the artifacts differ, or something was unpacked"
    assert expected.keys() >= {"model.safetensors", "tokenizer.json"}


def test_the_directory_of_the_weights_finds_its_config(tmp_path: Path) -> None:
    path = _unpacked(LLAMA["nemo1, torch_dist"], tmp_path) / "model_weights"
    assert source.reader(path)[0] == "nemo1"
    assert source.model(path).spec == source.model(LLAMA["nemo1"].path).spec


def test_zarr_in_an_archive(tmp_path: Path) -> None:
    root = _unpacked(LLAMA["nemo1"], tmp_path)
    for directory in root.glob("tp_rank*"):
        shutil.rmtree(directory)
    shutil.copytree(MEGATRON / "mcore/llama_zarr_prefix_model", root / "model_weights")
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w") as tar:
        tar.add(root, "./")
    for each in (root, path):
        check_equal(source.model(each).tensors, source.model(HUGGINGFACE).tensors)


NEMO_OLD = {
    "embedding.": "language_model.embedding.",
    "decoder.": "language_model.encoder.",
    "output_layer": "language_model.output_layer",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}
NEMO_TE = {
    "embedding.": "language_model.embedding.",
    "decoder.": "language_model.encoder.",
    "output_layer": "language_model.output_layer",
    "self_attention.linear_qkv": "self_attention.layernorm_qkv",
    "self_attention.linear_proj": "self_attention.proj",
    "mlp.linear_fc1.layer_norm_weight": "layernorm_mlp.layer_norm_weight",
    "mlp.linear_fc1.weight": "layernorm_mlp.fc1_weight",
    "mlp.linear_fc2.weight": "layernorm_mlp.fc2_weight",
}


def _apart(state: State) -> State:
    """Without `fast-`, gate and up are two matrices."""
    found: State = {}
    for name, tensor in state.items():
        if "dense_h_to_4h.weight" in name:
            found[name], up = (half.clone() for half in tensor.chunk(2))
            found[name.replace("dense_h_to_4h", "dense_h_to_4h_2")] = up
        else:
            found[name] = tensor
    return found


def _same(state: State) -> State:
    return state


@pytest.mark.parametrize(
    "names, change, activation",
    [
        ({}, _same, "fast-swiglu"),
        (NEMO_OLD, _same, "fast-swiglu"),
        (NEMO_OLD, _apart, "swiglu"),
        (NEMO_TE, _same, "fast-swiglu"),
    ],
    ids=["Megatron-core", "older", "older, gate and up apart", "older, Transformer Engine"],
)
@pytest.mark.parametrize("ranks", ["one file", "tp 2", "tp 2 pp 2"])
def test_every_naming_in_every_layout(
    ranks: str, names: dict[str, str], change: Callable[[State], State], activation: str, state: State, tmp_path: Path
) -> None:
    def stored(part: State) -> State:
        return {f"model.{name}": tensor for name, tensor in change(dict(renamed(part, names))).items()}

    cut = [tensor_rank(state, t, 2) for t in range(2)]
    files = {
        "one file": {"model_weights.ckpt": stored(state)},
        "tp 2": {f"mp_rank_{t:02d}/model_weights.ckpt": stored(cut[t]) for t in range(2)},
        "tp 2 pp 2": {
            f"tp_rank_{t:02d}_pp_rank_{p:03d}/model_weights.ckpt": stored(stages(cut[t], (4, 2))[p])
            for t in range(2)
            for p in range(2)
        },
    }[ranks]
    config = nemo1_config(activation=activation, mcore_gpt=not names)
    model = source.model(save_nemo1(tmp_path / "model", files, config))
    check_equal(model.tensors, CANONICAL)
    assert model.checkpoint.writer == "NeMo 1.23.0"
    assert model.spec.max_positions == SPEC.max_positions


def test_the_copy_of_a_tied_embedding_is_skipped(state: State, tmp_path: Path) -> None:
    """The last pipeline stage of an older model has one of its own; NeMo ties unless told otherwise."""
    parts = stages({name: tensor for name, tensor in state.items() if name != "output_layer.weight"}, (3, 3))
    files = {
        f"tp_rank_00_pp_rank_{p:03d}/model_weights.ckpt": {f"model.{n}": t for n, t in renamed(parts[p], NEMO_OLD)}
        for p in range(2)
    }
    files["tp_rank_00_pp_rank_001/model_weights.ckpt"]["model.word_embeddings.weight"] = state[
        "embedding.word_embeddings.weight"
    ]
    model = source.model(save_nemo1(tmp_path, files, nemo1_config(share_embeddings_and_output_weights=None)))
    check_equal(model.tensors, {name: each for name, each in CANONICAL.items() if name != "head.weight"})
    assert model.checkpoint.skipped == {"output_layer.weight": "tied head"}


@pytest.mark.parametrize(
    "said, meant",
    [
        ({}, {"normalization": "LayerNorm", "activation_func": "gelu", "gated_linear_unit": False}),
        ({}, {"add_bias_linear": True, "share_embeddings_and_output_weights": True}),
        ({}, {"position_embedding_type": "learned_absolute", "rotary_percent": 1.0}),
        ({"normalization": "rmsnorm"}, {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": False}),
        ({"normalization": "layernorm1p"}, {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True}),
        ({"activation": "fast-geglu"}, {"activation_func": "gelu", "gated_linear_unit": True}),
        ({"activation": "gelu", "openai_gelu": True}, {"activation_func": "openai_gelu", "gated_linear_unit": False}),
        ({"activation": "squared-relu"}, {"activation_func": "squared_relu", "gated_linear_unit": False}),
        ({"rotary_percentage": 0.5, "bias": False}, {"rotary_percent": 0.5, "add_bias_linear": False}),
        ({"encoder_seq_length": 8, "max_position_embeddings": 9}, {"max_sequence_length": 8}),
        ({"max_position_embeddings": 9}, {"max_sequence_length": 9}),
    ],
)
def test_the_words_of_nemo_in_those_of_megatron_core(said: dict[str, Any], meant: dict[str, Any]) -> None:
    assert words_of_yaml(said).items() >= meant.items()


@pytest.mark.parametrize("factor", [None, 32.0])
def test_the_scaled_positions_of_llama_3(factor: float | None, state: State, tmp_path: Path) -> None:
    config = nemo1_config(scale_positional_embedding=True, scale_factor=factor)
    mixer = source.model(save_nemo1(tmp_path, {"model_weights.ckpt": state}, config)).spec.blocks[0].mixer
    assert isinstance(mixer, Attention)
    assert mixer.rope is not None
    assert mixer.rope.scaling == Llama3Scaling(factor=factor or 8.0, original_max_positions=8192)


@pytest.mark.parametrize(
    "said",
    [
        {"headscale": True},
        {"apply_embedding_scaling": True},
        {"transformer_block_type": "post_ln"},
        {"normalize_attention_scores": False},
        {"activation": "reglu"},
        {"normalization": "layernorm1p"},
        {"position_embedding_type": "alibi"},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_the_family_cannot_say_is_refused_by_name(said: dict[str, Any], state: State, tmp_path: Path) -> None:
    path = save_nemo1(tmp_path, {"model_weights.ckpt": state}, nemo1_config(**said))
    with pytest.raises(UnsupportedInput, match="matches no family"):
        source.model(path)


@pytest.mark.parametrize("packed", [True, False], ids=["tar", "directory"])
def test_tokenizers_of_single_files(packed: bool, tmp_path: Path) -> None:
    words = {"library": "megatron", "type": "GPT2BPETokenizer", "model": None}
    words |= {"vocab_file": "nemo:0a_gpt2-vocab.json", "merge_file": "nemo:0b_gpt2-merges.txt"}
    root = save_nemo1(tmp_path / "model", {"model_weights.ckpt": {}}, nemo1_config(tokenizer=words))
    (root / "0a_gpt2-vocab.json").write_text('{"a": 0, "b": 6}')
    (root / "0b_gpt2-merges.txt").write_text("a b\n")
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w") as tar:
        tar.add(root, "./")
    found = source.checkpoint(path if packed else root).tokenizer
    assert found is not None
    assert tokenizer.size(found) == 7
    assert tokenizer.files(found) == {"vocab.json": b'{"a": 0, "b": 6}', "merges.txt": b"a b\n"}


@pytest.mark.parametrize("value", ["{}", "nemo:{}", "nemo:../tokenizer", "nemo:..", "nemo:", "gpt2", 3, ["a"]])
def test_a_tokenizer_elsewhere_on_the_machine_is_not_read(value: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer/tokenizer.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"model": {"vocab": {"a": 0}}}')
    if isinstance(value, str):
        value = value.format(tmp_path / "tokenizer")
    words = {"library": "huggingface", "type": value, "model": value, "vocab_file": value}
    root = save_nemo1(tmp_path / "model", {"model_weights.ckpt": {}}, nemo1_config(tokenizer=words))
    assert source.checkpoint(root).tokenizer is None


def test_a_sentencepiece_model_knows_its_size(tmp_path: Path, state: State) -> None:
    """ModelProto: field 1 is a piece, and the config need not say how many there are."""
    piece = b"\x0a\x08" + b"\x0a\x01a\x15\x00\x00\x80\x3f"
    words = {"library": "sentencepiece", "type": None, "model": "nemo:0c_llama.model"}
    config = nemo1_config(tokenizer=words, override_vocab_size=None)
    root = save_nemo1(tmp_path / "model", {"model_weights.ckpt": state}, config)
    (root / "0c_llama.model").write_bytes(piece * SPEC.vocab_size + b"\x12\x02\x08\x01")
    check_equal(source.model(root).tensors, CANONICAL)


def test_speech_models_are_known_for_what_they_are(tmp_path: Path) -> None:
    config = {"target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE"}
    path = save_nemo1(tmp_path, {"model_weights.ckpt": {"encoder.a": torch.zeros(3)}}, config)
    with pytest.raises(UnsupportedInput, match="EncDecCTCModelBPE"):
        source.model(path)


def _tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch EVIL_RAN_nemo1",)


def _saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


CONFIG = ("./model_config.yaml", b"num_layers: 1\n")


HOSTILE: dict[str, tuple[bytes, type[NemoportError]]] = {
    "traversal": ((EVIL / "traversal.nemo").read_bytes(), PolicyError),
    "absolute path": (_tar(CONFIG, ("/etc/evil", b"")), PolicyError),
    "path that climbs": (_tar(CONFIG, ("a/../../evil", b"")), PolicyError),
    "symbolic link for weights": (_tar(CONFIG, _link("./model_weights.ckpt", "/etc/passwd")), DamagedInput),
    "hard link for weights": (
        _tar(CONFIG, _link("./model_weights.ckpt", "model_config.yaml", tarfile.LNKTYPE)),
        DamagedInput,
    ),
    "link for the config": (_tar(_link("./model_config.yaml", "/etc/passwd")), DamagedInput),
    "no weights": (_tar(CONFIG), DamagedInput),
    "no config": (_tar(("./other", b"x")), DamagedInput),
    "python in the YAML": (
        _tar(("./model_config.yaml", b"!!python/object/apply:os.system ['touch EVIL_RAN']")),
        NemoportError,
    ),
    "weights that are no zip": (_tar(CONFIG, ("./model_weights.ckpt", b"not a zip")), DamagedInput),
    "pickle that runs a command": (
        _tar(CONFIG, ("./model_weights.ckpt", _saved({"model.a": _Exploit()}))),
        PolicyError,
    ),
    "a rank missing": (_tar(CONFIG, ("./mp_rank_01/model_weights.ckpt", _saved({}))), DamagedInput),
    "empty index": (_tar(CONFIG, ("./model_weights/.metadata", b"")), DamagedInput),
    "gzip cut": (gzip.compress(_tar(CONFIG, ("./model_weights.ckpt", b"x")))[:-20], DamagedInput),
    "gzip of nothing": (gzip.compress(b""), DamagedInput),
    "gzip of zeros": (gzip.compress(bytes(10**6)), DamagedInput),
}


@pytest.mark.parametrize("content, error", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_and_damaged_archives_are_refused(
    content: bytes, error: type[NemoportError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.nemo").write_bytes(content)
    with pytest.raises(error) as raised:
        source.model(tmp_path / "model.nemo")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]
