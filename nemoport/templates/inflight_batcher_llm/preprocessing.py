"""Text becomes tokens for the engine, by the tokenizer.json beside this file. Written by nemoport.

Tensors are those of TensorRT-LLM's model of this name. Words to stop at and words that must not come are given to the
engine as two rows: all their tokens, and where each word ends; filled up with 0 and -1.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
NOT_A_WORD = -1


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = json.loads((HERE / "tokenization.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        def given(name: str) -> Any:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        try:
            made = self.tensors(given)
        except UnicodeDecodeError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"a text is not UTF-8: {error}"))
        except ValueError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in made.items()])

    def tensors(self, given: Callable[[str], Any]) -> dict[str, Any]:
        query = given("QUERY")
        rows = [self.ids(row[0], self.settings["add_special_tokens"]) for row in query]
        if empty := sum(not row for row in rows):
            raise ValueError(f"{empty} of QUERY have no token")
        batch = len(rows)
        stops, bad = (given(name) for name in ("STOP_WORDS_DICT", "BAD_WORDS_DICT"))
        always = [[number] for number in self.settings["stop_ids"]]
        return {
            "INPUT_ID": filled(rows, self.settings["pad_id"]),
            "REQUEST_INPUT_LEN": np.array([[len(row)] for row in rows], np.int32),
            "REQUEST_OUTPUT_LEN": given("REQUEST_OUTPUT_LEN"),
            "STOP_WORDS_IDS": words([[*always, *self.each(row)] for row in lists(stops, batch)]),
            "BAD_WORDS_IDS": words([self.each(row) for row in lists(bad, batch)]),
            "EMBEDDING_BIAS": self.bias(given("EMBEDDING_BIAS_WORDS"), given("EMBEDDING_BIAS_WEIGHTS"), batch),
            "OUT_END_ID": self.chosen(given("END_ID"), "end_id", batch),
            "OUT_PAD_ID": self.chosen(given("PAD_ID"), "pad_id", batch),
        }

    def ids(self, text: bytes, special: bool) -> list[int]:
        found: list[int] = self.tokenizer.encode(text.decode(), add_special_tokens=special).ids
        return found

    def each(self, row: Sequence[bytes]) -> list[list[int]]:
        """The tokens of each word; an empty word has none and is none."""
        return [found for word in row if (found := self.ids(word, special=False))]

    def bias(self, given: Any, weights: Any, batch: int) -> NDArray[np.float32]:
        """What is added to the logits of a word's tokens; no column where no request asks for it."""
        if given is None or weights is None:
            return np.empty((batch, 0), np.float32)
        made = np.zeros((batch, self.settings["vocab_size"]), np.float32)
        for row, (texts, numbers) in enumerate(zip(given, weights, strict=True)):
            if len(texts) != len(numbers):
                raise ValueError(f"{len(texts)} of EMBEDDING_BIAS_WORDS have {len(numbers)} weights")
            for text, number in zip(texts, numbers, strict=True):
                made[row, self.ids(text, special=False)] += number
        return made

    def chosen(self, given: Any, name: str, batch: int) -> Any:
        return np.full((batch, 1), self.settings[name], np.int32) if given is None else given.astype(np.int32)


def lists(given: Any, batch: int) -> Any:
    return [[]] * batch if given is None else given


def filled(rows: Sequence[Sequence[int]], number: int) -> NDArray[np.int32]:
    """All as long as the longest."""
    longest = max(len(row) for row in rows)
    return np.array([[*row, *[number] * (longest - len(row))] for row in rows], np.int32)


def words(rows: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.int32]:
    """[batch, 2, tokens]: the tokens of all words of an item in a row, and below where each word ends."""
    if not any(rows):
        return np.empty((len(rows), 2, 0), np.int32)
    tokens = filled([[token for word in row for token in word] for row in rows], 0)
    ends = [np.cumsum([len(word) for word in row], dtype=int).tolist() for row in rows]
    return np.stack([tokens, [[*end, *[NOT_A_WORD] * (tokens.shape[1] - len(end))] for end in ends]], 1).astype(
        np.int32
    )
