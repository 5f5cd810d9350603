"""Small random encoders of transformers' own classes, saved as their authors save them, and transformers' answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from nemoport.validation.prompts import Prompt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]
VOCAB = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "max_position_embeddings": 70,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 10, "pad_token_id": None}
TYPES = {"type_vocab_size": 3}
ROBERTA = SIZES | {"pad_token_id": 1, "type_vocab_size": 1}


@dataclass(frozen=True)
class Case:
    kind: str
    """Of `transformers.{kind}`."""
    words: Mapping[str, Any]
    family: str
    pooling: str | None = None
    """What is done with the last hidden states; None where the class itself gives logits."""
    normalized: bool = False
    modules: bool = False
    """sentence-transformers' files lie beside the weights."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """Written over the config that transformers wrote."""
    score: bool = False
    """A linear map follows the pooling, divided by the temperature."""


def bidirectional(architecture: str, **words: Any) -> dict[str, Any]:
    return {"model_type": "llama_bidirec", "architectures": [architecture], **words}


EMBEDS, SCORES = "LlamaBidirectionalModel", "LlamaBidirectionalForSequenceClassification"
CASES = {
    "bert": Case("BertModel", SIZES | TYPES, "bert", "avg", normalized=True, modules=True),
    "bert, cls, not normalized": Case("BertModel", SIZES | {"hidden_act": "gelu_new"}, "bert", "cls", modules=True),
    "bert, last": Case("BertModel", SIZES, "bert", "last", normalized=True, modules=True),
    "bert alone": Case("BertModel", SIZES, "bert", "avg"),
    "roberta": Case("RobertaModel", ROBERTA, "bert", "avg", normalized=True, modules=True),
    "bert reranker": Case("BertForSequenceClassification", SIZES | TYPES | {"num_labels": 1}, "bert_classifier"),
    "bert classifier": Case("BertForSequenceClassification", SIZES | {"num_labels": 5}, "bert_classifier"),
    "roberta reranker": Case("XLMRobertaForSequenceClassification", ROBERTA | {"num_labels": 1}, "roberta_classifier"),
    "llama": Case("LlamaModel", LLAMA, "llama_bidirectional", "avg", normalized=True, said=bidirectional(EMBEDS)),
    "llama, last": Case(
        "LlamaModel", LLAMA, "llama_bidirectional", "last", normalized=True, said=bidirectional(EMBEDS, pooling="last")
    ),
    "llama of transformers 5": Case(
        "LlamaModel", LLAMA | {"is_causal": False}, "llama_bidirectional", "avg", modules=True
    ),
    "llama reranker": Case(
        "LlamaForSequenceClassification",
        LLAMA | {"num_labels": 1},
        "llama_bidirectional_classifier",
        "avg",
        said=bidirectional(SCORES, pooling="avg", temperature=0.7),
        score=True,
    ),
}


@dataclass(frozen=True)
class Saved:
    case: Case
    path: Path
    answers: Callable[[Prompt], Array]
    """transformers', of a batch."""


def save(case: Case, path: Path) -> Saved:
    torch.manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = getattr(transformers, case.kind)
        words = {**case.words, "attn_implementation": "eager"}
        model = made(made.config_class(**words)).eval().float()
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.2, std=0.2)
        model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | dict(case.said)
    (path / "config.json").write_text(json.dumps(config))
    if case.modules:
        describe(case, path)
    return Saved(case, path, lambda texts: answers(case, model, texts))


def describe(case: Case, path: Path) -> None:
    kinds = ["Transformer", "Pooling", *["Normalize"] * case.normalized]
    places = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": places[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    mode = {"avg": "mean", "cls": "cls", "last": "lasttoken"}[case.pooling or "avg"]
    pooling = {"embedding_dimension": 48, "pooling_mode": mode, "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def loaded(case: Case, path: Path) -> Any:
    """transformers' own class again, from what was written."""
    made = getattr(transformers, case.kind)
    config = json.loads((path / "config.json").read_text())
    if case.said:  # a class that NVIDIA ships beside its weights
        config |= {"model_type": "llama"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = made.config_class(**config, attn_implementation="eager")
        return made.from_pretrained(path, config=config).eval()


def answers(case: Case, model: Any, texts: Prompt) -> Array:
    ids, mask = torch.from_numpy(texts.tokens), torch.from_numpy(texts.mask)
    given: dict[str, Any] = {"position_ids": torch.from_numpy(texts.positions)}
    if texts.token_types is not None:
        given["token_type_ids"] = torch.from_numpy(texts.token_types)
    if case.words.get("pad_token_id") == 1:
        given["position_ids"] = (given["position_ids"] + 2) * mask + (1 - mask)  # as RoBERTa counts
    llama = "Llama" in case.kind
    seen = torch.where(mask[:, None, None, :].bool(), 0.0, torch.finfo(torch.float32).min)
    attention = seen.expand(-1, 1, mask.shape[1], -1) if llama else mask
    with torch.inference_mode():
        if case.pooling is None:
            logits: Array = model(ids, attention_mask=attention, **given).logits.numpy()
            return logits
        body = model.model if case.score else model
        hidden = body(ids, attention_mask=attention, **given).last_hidden_state
        pooled = _pooled(hidden, mask, case.pooling)
        if case.score:
            pooled = model.score(pooled) / case.said["temperature"]
        found = torch.nn.functional.normalize(pooled, dim=1) if case.normalized else pooled
        array: Array = found.numpy()
        return array


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    rows, width = torch.arange(len(mask)), mask.shape[1]
    match pooling:
        case "avg":
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        case "cls":
            return hidden[rows, mask.argmax(1)]
        case _:
            return hidden[rows, width - 1 - mask.flip(1).argmax(1)]
