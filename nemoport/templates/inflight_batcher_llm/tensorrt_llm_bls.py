"""A request led through preprocessing, engine and postprocessing, or with `num_draft_tokens` through a draft model and
the engine in turns. Written by nemoport.

wiring.json beside this file says how the three are wired, as in the ensemble. What it does beyond the ensemble: a piece
of a stream is what the text of all tokens grew by, so that no character is cut and no space is lost; and an answer ends
after a word to stop at, however the tokenizer would cut it.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
WIRING = json.loads((HERE / "wiring.json").read_text())
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CUT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer says for bytes that are no whole character yet."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self.engine = said["tensorrt_llm_model_name"]
        self.draft = said["tensorrt_llm_draft_model_name"]
        self.whole = said["accumulate_tokens"] == "true"
        self.exclude = said["exclude_input_in_output"] == "true"
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.held: deque[Any] = deque(maxlen=2)
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any] | None:
        if not self.decoupled:
            return [self.only(request) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            try:
                for response in self.answers(request):
                    sender.send(response)
                sender.send(flags=FINAL)
            except Exception as error:  # whatever it is, the client must not wait for ever
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))), flags=FINAL)
        return None

    def only(self, request: Any) -> Any:
        try:
            (response,) = self.answers(request)
            return response
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def answers(self, request: Any) -> Iterator[Any]:
        given = {
            name: tensor.as_numpy()
            for name in self.inputs
            if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None
        }
        if len(given["text_input"]) != 1:
            raise ValueError(f"{len(given['text_input'])} texts were given, and this model answers one a request")
        if one(given, "max_tokens", 1) < 1:
            raise ValueError(f"max_tokens is {one(given, 'max_tokens', 1)}; it counts, from 1 on")
        streams, drafted = bool(one(given, "stream", False)), int(one(given, "num_draft_tokens", 0))
        if streams and not self.decoupled:
            raise ValueError("stream is asked for, and this model answers once; lay it out with --decoupled")
        if streams and (drafted or one(given, "beam_width", 1) > 1):
            raise ValueError("stream goes with one beam and without num_draft_tokens")
        if drafted and not self.draft:
            raise ValueError("num_draft_tokens is given, and there is no draft model here; lay it out with --draft")
        exclude = bool(one(given, "exclude_input_in_output", self.exclude))
        before = "" if exclude else given["text_input"][0][0].decode()
        stops = [word.decode() for word in given.get("stop_words", [[]])[0] if word]
        identity = request.request_id() or str(uuid4())
        # The engine says what is new, whatever the client wants to see before it.
        flowing = {**given, "exclude_input_in_output": np.array([[True]])}
        flowing |= self.ask("preprocessing", "preprocessing", flowing, identity)
        if streams:
            yield from self.stream(flowing, before, stops, identity, request.is_cancelled)
        else:
            made = self.speculated(flowing, drafted, identity) if drafted else self.ask_engine(flowing, identity)
            texts = [before + ended(text, stops)[0] for text in self.texts(made["_TOKENS_BATCH"], made, identity)]
            yield self.response(texts, made)

    def stream(
        self, flowing: dict[str, Any], before: str, stops: list[str], identity: str, left: Callable[[], bool]
    ) -> Iterator[Any]:
        """Triton cancels no request of a model to another one when the client of the first has left."""
        tokens, sent, made, over = np.empty((1, 1, 0), np.int32), "", dict[str, Any](), False
        for made in self.ask_each("tensorrt_llm", self.engine, flowing, identity):
            if over:
                continue  # the engine was told to stop, and says its last
            if over := left():
                self.stop(identity)
                continue
            count = made["_SEQUENCE_LENGTH"][0][0]
            tokens = np.concatenate([tokens, made["_TOKENS_BATCH"][:, :, :count]], -1)
            counted = {**made, "_SEQUENCE_LENGTH": np.array([[tokens.shape[-1]]], np.int32)}
            text, over = ended(self.texts(tokens, counted, identity)[0], stops)
            if over:
                self.stop(identity)
            if text.endswith(CUT) and not over:
                continue
            if len(text) > len(sent):
                yield self.response([before + (text if self.whole else text[len(sent) :])], made)
                before, sent = before if self.whole else "", text
        if tokens.size and not over:
            length = {**made, "_SEQUENCE_LENGTH": np.array([[tokens.shape[-1]]], np.int32)}
            text = self.texts(tokens, length, identity)[0]
            if len(text) > len(sent):
                yield self.response([before + (text if self.whole else text[len(sent) :])], made)

    def speculated(self, flowing: dict[str, Any], drafted: int, identity: str) -> dict[str, Any]:
        """The draft model proposes, the engine keeps what it would have said itself and adds a token."""
        prompt = tokens = flowing["_INPUT_ID"]
        wanted, made = int(flowing["_REQUEST_OUTPUT_LEN"][0][0]), dict[str, Any]()
        logits = bool(one(flowing, "use_draft_logits", False))
        while (left := wanted - (tokens.shape[1] - prompt.shape[1])) > 0:
            asked = {
                **flowing,
                "_INPUT_ID": tokens,
                "_REQUEST_INPUT_LEN": np.array([[tokens.shape[1]]], np.int32),
            }
            proposal: dict[str, Any] = {}
            if (count := min(drafted, left - 1)) > 0:
                draft = self.ask("tensorrt_llm", self.draft, asked | length(count) | returned(logits), identity)
                proposed = draft["_TOKENS_BATCH"][:, 0, : draft["_SEQUENCE_LENGTH"][0][0]]
                if proposed.size:
                    proposal["draft_input_ids"] = proposed
                    if logits:
                        proposal["draft_logits"] = draft["generation_logits"][:, 0, -proposed.shape[1] :]
            most = proposal["draft_input_ids"].shape[1] + 1 if proposal else 1
            made = self.ask("tensorrt_llm", self.engine, asked | length(most), identity, proposal)
            new = made["_TOKENS_BATCH"][:, 0, : made["_SEQUENCE_LENGTH"][0][0]]
            tokens = np.concatenate([tokens, new], 1)
            if not new.size or flowing["_OUT_END_ID"][0][0] in new or stopped(tokens[0], flowing["_STOP_WORDS_IDS"][0]):
                break
        answer = tokens[:, None, prompt.shape[1] :]
        return {**made, "_TOKENS_BATCH": answer, "_SEQUENCE_LENGTH": np.array([[answer.shape[-1]]], np.int32)}

    def texts(self, tokens: Any, made: dict[str, Any], identity: str) -> list[str]:
        """Of each beam."""
        found = self.ask("postprocessing", "postprocessing", {**made, "_TOKENS_BATCH": tokens}, identity)
        return [text.decode() for text in found["text_output"].ravel()]

    def ask_engine(self, flowing: dict[str, Any], identity: str) -> dict[str, Any]:
        return self.ask("tensorrt_llm", self.engine, flowing, identity)

    def ask(
        self, step: str, model: str, flowing: dict[str, Any], identity: str, more: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a model gives to one request, under the names of the whole. Of a stream, what came last."""
        found = list(self.ask_each(step, model, flowing, identity, more))
        if not found:
            raise RuntimeError(f"{model} gave no answer")
        return found[-1]

    def ask_each(
        self, step: str, model: str, flowing: dict[str, Any], identity: str, more: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        takes, gives = WIRING[step]["takes"], WIRING[step]["gives"]
        inputs = {name: flowing[theirs] for name, theirs in takes.items() if theirs in flowing} | (more or {})
        asked = pb_utils.InferenceRequest(
            model_name=model,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=list(gives),
            request_id=identity,
        )
        for response in self.stream_of(asked) if self.decoupled and step == "tensorrt_llm" else (asked.exec(),):
            if response.has_error():
                raise RuntimeError(response.error().message())
            if made := {gives[tensor.name()]: tensor.as_numpy() for tensor in response.output_tensors()}:
                yield made

    def stream_of(self, asked: Any) -> Any:
        """The responses of a request to a model that streams. The backend's own thread lets go of a stream shortly
        after it brought the end, and crashes the process if it is the last to do so, for then it frees Python's objects
        without holding Python's lock (seen on 24.10). It has let go of one once it brings the end of another."""
        responses = asked.exec(decoupled=True)
        self.held.append(responses)
        return responses

    def stop(self, identity: str) -> None:
        """The engine ends the request of this name."""
        nothing = {
            "input_ids": np.zeros((1, 1), np.int32),
            "input_lengths": np.zeros((1, 1), np.int32),
            "request_output_len": np.zeros((1, 1), np.int32),
            "stop": np.array([[True]]),
        }
        asked = pb_utils.InferenceRequest(
            model_name=self.engine,
            inputs=[pb_utils.Tensor(name, array) for name, array in nothing.items()],
            requested_output_names=[],
            request_id=identity,
        )
        for response in self.stream_of(asked):
            if response.has_error():
                raise RuntimeError(response.error().message())

    def response(self, texts: list[str], made: dict[str, Any]) -> Any:
        said = {"text_output": np.array([[text.encode() for text in texts]], np.object_)}
        said |= {name: made[name] for name in self.outputs if name in made}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in said.items()])


def one(given: dict[str, Any], name: str, usual: Any) -> Any:
    return np.ravel(given[name])[0] if name in given else usual


def length(count: int) -> dict[str, Any]:
    return {"_REQUEST_OUTPUT_LEN": np.array([[count]], np.int32)}


def returned(logits: bool) -> dict[str, Any]:
    return {"return_generation_logits": np.array([[True]])} if logits else {}


def ended(text: str, stops: list[str]) -> tuple[str, bool]:
    """A text up to the first word to stop at, with it; and whether there was one."""
    found = [(text.find(word) + len(word)) for word in stops if word in text]
    return (text[: min(found)], True) if found else (text, False)


def stopped(tokens: Any, words: Any) -> bool:
    """Whether tokens end in a word: a row of all their tokens, and a row of where each ends."""
    starts = [0, *words[1]]
    return any(
        end > start and tokens[start - end :].tolist() == words[0][start:end].tolist()
        for start, end in zip(starts, words[1], strict=False)
    )
