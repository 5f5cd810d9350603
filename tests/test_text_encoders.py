"""Encoders of every kind, built with a tokenizer of their own, take text: the answers are those of transformers."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters.commands import command
from families.encoders import CASES, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from nemoport.runner.client import Client
from nemoport.runner.serve import serving_all
from nemoport.runner.server import Server
from nemoport.validation.prompts import Prompt
from nemoport.validation.sentences import SENTENCES, sentences

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

EXAMPLE = Path(__file__).parents[1] / "examples/pipelines/minilm.yaml"


def with_tokenizer(path: Path) -> Any:
    """A small BPE, trained here, beside the model; as transformers has it. Its padding is 1, as RoBERTa's."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, limit_alphabet=60, show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize("name", ["roberta", "bert classifier", "bert reranker", "llama, last"])
def test_encoders_of_every_kind_take_text(name: str, tmp_path: Path) -> None:
    saved = save(CASES[name], tmp_path / "model")
    judge = with_tokenizer(saved.path)
    file = tmp_path / "pipeline.yaml"
    text = EXAMPLE.read_text().replace("../../build/all-MiniLM-L6-v2", str(saved.path))
    file.write_text(text.replace("../../build/minilm/", ""))
    assert command("build", file).exit_code == 0
    longest = 68 if name == "roberta" else 70
    asked = [each.strip() for each in sentences(longest)]
    server = Server([tmp_path / "repository"])
    try:
        server.load("minilm")
        with serving_all(server) as at, Client(at.http) as client:
            singles, pairs = [[each] for each in asked], [[*each] for each in pairwise(asked)]
            classifies = saved.case.kind.endswith("Classification")
            for batch in (singles[:6], singles[6:], *((pairs[:5], pairs[5:]) if classifies else ())):
                strings = np.array([[text.encode() for text in item] for item in batch], np.object_)
                (found,) = client.infer("minilm", {"TEXT": strings}).values()
                columns = [list(column) for column in zip(*batch, strict=True)]
                made = judge(*columns, padding=True, truncation=True, max_length=longest, return_tensors="np")
                ids, mask = made["input_ids"], made["attention_mask"]
                types = made["token_type_ids"] if name.startswith("bert") else None
                prompt = Prompt("texts", ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0), types)
                wanted = saved.answers(prompt)
                assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    finally:
        server.close()
