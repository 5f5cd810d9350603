"""Tokens of the engine become text, by the tokenizer.json beside this file. Written by nemoport."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.skip = json.loads((HERE / "tokenization.json").read_text())["skip_special_tokens"]
        self.tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """TOKENS_BATCH [batch, beams, tokens], of which SEQUENCE_LENGTH [batch, beams] count."""
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        rows = [
            beam[:length].tolist()
            for beams, counts in zip(tokens, lengths, strict=True)
            for beam, length in zip(beams, counts, strict=True)
        ]
        texts = [text.encode() for text in self.tokenizer.decode_batch(rows, skip_special_tokens=self.skip)]
        made = np.array(texts, np.object_).reshape(tokens.shape[:2])
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", made)])
