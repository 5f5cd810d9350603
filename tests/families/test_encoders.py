"""Every encoder against transformers: a random model of its own class, through everything that nemoport writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from nemoport import reference
from nemoport.artifact import read_manifest
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters import convert, source, stream
from nemoport.runner.backends import reference as backend
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig
from nemoport.spec import Classifier, Embedding, Plan
from nemoport.validation import Request, validate
from nemoport.validation.prompts import Prompt
from nemoport.validation.texts import alone, texts

from .encoders import CASES, SIZES, Array, Case, Saved, answers, loaded, save

torch.set_num_threads(1)
PROGRAMS = ("onnx", "torchscript")
"""Targets that say all of a model: its weights and what is computed with them."""
every_program = pytest.mark.parametrize("to", PROGRAMS)


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(request.param, tmp_path_factory.mktemp("saved") / "model")


def converted(path: Path, to: str, out: Path, config: dict[str, Any] | None = None, **plan: Any) -> Path:
    stream.run(convert.plan(path, to, out, config=config, plan=Plan(**plan)))
    return out


def asked(saved: Saved) -> tuple[Prompt, ...]:
    """Batches padded on either side, and each of their rows alone. transformers' classifiers take the first column,
    padding or not: those are asked with padding on the right."""
    batches = texts(source.model(saved.path).spec, 4)
    if saved.case.pooling is None:
        batches = tuple(batch for batch in batches if batch.mask[:, 0].all())
    return (*batches, *(row for batch in batches for row in alone(batch)))


def close(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


def run(path: Path, prompt: Prompt) -> Array:
    """An artifact's own answer, in its runtime."""
    given = {"input_ids": prompt.tokens, "attention_mask": prompt.mask, "token_type_ids": prompt.token_types}
    given |= {"dimensions": None if prompt.dimensions is None else prompt.dimensions[:, None]}
    execute = run_script if (path / "model.pt").exists() else run_graph
    return execute(path, {name: array for name, array in given.items() if array is not None})


def run_graph(path: Path, given: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {each.name: given[each.name] for each in session.get_inputs()})
    found: Array = answer
    return found


def run_script(path: Path, given: dict[str, Array]) -> Array:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of TorchScript as a whole
        module = torch.jit.load(path / "model.pt").eval()  # type: ignore[no-untyped-call]
        asked = [argument.name for argument in module.forward.schema.arguments[1:]]
        found: Array = module(**{name: torch.from_numpy(given[name]) for name in asked}).numpy()
    return found


def test_the_reference_answers_as_transformers_does(saved: Saved) -> None:
    model = source.model(saved.path)
    assert model.spec.family == saved.case.family
    for prompt in asked(saved):
        found = reference.encode(
            model.spec, model.tensors, prompt.tokens, mask=prompt.mask, token_types=prompt.token_types
        )
        close(found, saved.answers(prompt))


@every_program
def test_what_is_written_answers_as_transformers_does(saved: Saved, to: str, tmp_path: Path) -> None:
    made = converted(saved.path, to, tmp_path / "out")
    for prompt in asked(saved):
        close(run(made, prompt), saved.answers(prompt))


def test_transformers_loads_what_is_written_and_answers_the_same(saved: Saved, tmp_path: Path) -> None:
    made = converted(saved.path, "hf", tmp_path / "out")
    stored, written = load_file(saved.path / "model.safetensors"), load_file(made / "model.safetensors")
    assert {name for name in stored if "pooler" not in name or saved.case.pooling is None} == written.keys()
    assert all(np.array_equal(array, stored[name]) for name, array in written.items())
    model = loaded(saved.case, made)
    for prompt in asked(saved):
        np.testing.assert_allclose(answers(saved.case, model, prompt), saved.answers(prompt), rtol=2e-6, atol=2e-6)


def test_pooling_is_described_for_sentence_transformers(saved: Saved, tmp_path: Path) -> None:
    made, head = converted(saved.path, "hf", tmp_path / "out"), source.model(saved.path).spec.head
    if not isinstance(head, Embedding):
        assert not (made / "modules.json").exists()
        return
    kinds = [each["type"].rpartition(".")[2] for each in json.loads((made / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"][: 2 + saved.case.normalized]
    flags = json.loads((made / "1_Pooling" / "config.json").read_text())
    mode = {"avg": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}[saved.case.pooling or ""]
    assert [name for name, yes in flags.items() if yes is True] == [f"pooling_mode_{mode}"]


@pytest.mark.parametrize(
    "to, dtype",
    [("hf", None), *((to, dtype) for to in PROGRAMS for dtype in ("float32", "float16")), ("torchscript", "bfloat16")],
)
def test_everything_written_is_proven(saved: Saved, to: str, dtype: str | None, tmp_path: Path) -> None:
    report = validate(Request(subject=converted(saved.path, to, tmp_path / "out", dtype=dtype)))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert any(check.name.startswith("each text alone") for check in report.checks)


def test_ranks_have_no_place_for_an_encoder(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match=r"no trtllm names.*--to hf"):
        converted(saved.path, "trtllm", tmp_path / "out")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(CASES["bert"], tmp_path_factory.mktemp("bert") / "model")


@every_program
def test_the_inputs_are_those_of_embedding_servers(saved: Saved, to: str, tmp_path: Path) -> None:
    signature = read_manifest(converted(saved.path, to, tmp_path / "out")).signature
    assert signature
    types = ["token_type_ids"] * (saved.case.words.get("type_vocab_size", 2) > 1 and "Llama" not in saved.case.kind)
    assert [each.name for each in signature.inputs] == ["input_ids", "attention_mask", *types]
    assert [each.name for each in signature.outputs] == ["embeddings" if "Model" in saved.case.kind else "logits"]
    assert all(each.shape[0] == "batch" for each in (*signature.inputs, *signature.outputs))


@every_program
def test_a_matryoshka_model_is_cut_before_it_is_normalized(bert: Saved, to: str, tmp_path: Path) -> None:
    config = {"is_matryoshka": True}
    made = converted(bert.path, to, tmp_path / "out", config)
    (_, prompt, *_) = texts(source.model(bert.path, config).spec, 4)
    assert prompt.dimensions is not None
    found, whole = run(made, prompt), bert.answers(prompt)
    for row, full, count in zip(found, whole, prompt.dimensions, strict=True):
        close(row[:count], full[:count] / np.linalg.norm(full[:count]))
        assert not row[count:].any()
    assert validate(Request(subject=made)).passed


@every_program
def test_an_answer_does_not_depend_on_what_is_asked_of_its_neighbours(bert: Saved, to: str, tmp_path: Path) -> None:
    config = {"is_matryoshka": True}
    made = converted(bert.path, to, tmp_path / "out", config)
    (_, prompt, *_) = texts(source.model(bert.path, config).spec, 4)
    each = np.concatenate([run(made, row) for row in alone(prompt)])
    close(run(made, prompt), each)


@every_program
def test_a_text_of_nothing_but_padding_gives_numbers(bert: Saved, to: str, tmp_path: Path) -> None:
    """A server may pad a batch with empty rows; the others must not notice."""
    made = converted(bert.path, to, tmp_path / "out")
    (_, prompt, *_) = texts(source.model(bert.path).spec, 3)
    before = run(made, prompt)
    prompt.mask[1] = 0
    after = run(made, prompt)
    assert np.isfinite(after).all()
    close(after[[0, 2]], before[[0, 2]])


def changed(bert: Saved, directory: Path, **files: Any) -> Path:
    made = save(CASES["bert"], directory).path
    for name, content in files.items():
        (made / {"modules": "modules.json", "pooling": "1_Pooling/config.json"}[name]).write_text(json.dumps(content))
    return made


MODULE = "sentence_transformers.models."


@pytest.mark.parametrize(
    "files, error, reason",
    [
        ({"pooling": {"pooling_mode": "max"}}, UnsupportedInput, "pools by max"),
        ({"pooling": {"pooling_mode": ["mean", "cls"]}}, UnsupportedInput, "pools by mean and cls"),
        ({"modules": [{"type": f"{MODULE}Normalize", "path": ""}]}, UnsupportedInput, "lists no Pooling"),
        ({"pooling": {"pooling_mode": 3}}, UnsupportedInput, "pools by 3"),
        (
            {"modules": [{"type": f"{MODULE}Pooling", "path": "1_Pooling"}, {"type": f"{MODULE}Dense", "path": "2"}]},
            UnsupportedInput,
            "a module Dense",
        ),
        ({"modules": [{"type": f"{MODULE}Pooling", "path": "../other"}]}, DamagedInput, "outside its directory"),
        ({"modules": [{"type": f"{MODULE}Pooling", "path": "3_Pooling"}]}, DamagedInput, "which is missing"),
        ({"modules": [7]}, DamagedInput, "a module without a type"),
        ({"modules": {}}, UnsupportedInput, "a list is needed"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    files: dict[str, Any], error: type[Exception], reason: str, bert: Saved, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        source.model(changed(bert, tmp_path / "model", **files))


def test_no_text_is_asked_of_an_encoder(bert: Saved, tmp_path: Path) -> None:
    made = converted(bert.path, "hf", tmp_path / "out")
    with pytest.raises(UnsupportedInput, match="family bert, which writes no text"):
        backend.serve(made, ModelConfig(name="served"), Placement(None, 1), complete=True)


def test_a_causal_llama_is_not_taken_for_one_that_sees_both_ways(tmp_path: Path) -> None:
    case = Case("LlamaForCausalLM", {**CASES["llama"].words, "is_causal": False}, "llama")
    with pytest.raises(UnsupportedInput, match="is_causal is False"):
        source.model(save(case, tmp_path / "model").path)


def test_names_of_labels_are_kept(tmp_path: Path) -> None:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    case = Case("BertForSequenceClassification", SIZES | names, "bert_classifier")
    made = converted(save(case, tmp_path / "model").path, "hf", tmp_path / "out")
    assert json.loads((made / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


def test_a_cross_encoder_is_described_by_its_class_alone(tmp_path: Path) -> None:
    made = save(CASES["bert reranker"], tmp_path / "model").path
    (made / "modules.json").write_text(json.dumps([{"type": f"{MODULE}Transformer", "path": ""}]))
    assert isinstance(source.model(made).spec.head, Classifier)
