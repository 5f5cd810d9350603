"""How a Python model answers a request piece by piece."""

from __future__ import annotations

from threading import Lock
from typing import Any

from nemoport.runner.jobs import Job, Reply
from nemoport.runner.python_model import triton_python_backend_utils as pb_utils
from nemoport.runner.refusal import Code, Refusal

_CODES = {getattr(pb_utils.TritonError, code.name): code for code in Code}


class InferenceResponseSender:
    """`get_response_sender()` of a request. A model that lets go of it before the end leaves an error to the client."""

    def __init__(self, job: Job, decoupled: bool) -> None:
        self._job, self._decoupled = job, decoupled
        self._lock, self._ended = Lock(), False
        self._held: Reply | None = None

    def send(self, response: pb_utils.InferenceResponse | None = None, flags: int = 0) -> None:
        final = flags == pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if not final and flags != 0:
            raise pb_utils.TritonModelException(f"Unable to send response. Unsupported flag provided: {flags}.")
        if response is None and not final:
            raise pb_utils.TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        reply = None if response is None else reply_of(response, self._job)
        with self._lock:
            if self._ended:
                raise pb_utils.TritonModelException("Unable to send response. Response sender has been closed.")
            if self._held is not None and reply is not None:
                raise pb_utils.TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send more than one response."
                )
            if final and reply is None and self._held is None and not self._decoupled:
                raise pb_utils.TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
            self._ended = final
            if self._decoupled:
                self._job.deliver(reply, final)
                return
            self._held = reply if reply is not None else self._held
            if final:
                self._job.deliver(self._held, True)

    def is_cancelled(self) -> bool:
        return self._job.cancelled

    def close(self) -> bool:
        """Whether the request still has to be answered; the model can do it no more."""
        with self._lock:
            was_open, self._ended = not self._ended, True
        return was_open

    def __del__(self) -> None:
        if self.close():
            message = "the model let go of the request before its final response"
            self._job.deliver(Refusal(f"{self._job.request.label}{message}", Code.INTERNAL), True)


def reply_of(response: pb_utils.InferenceResponse, job: Job) -> Reply:
    """The outputs that were asked for, or the model's own error."""
    error = response.error()
    if error is not None:
        if isinstance(error, str):
            return Refusal(f"{job.request.label}{error}", Code.INTERNAL)
        return Refusal(error.message(), _CODES.get(error.code(), Code.INTERNAL))
    given = {tensor.name(): tensor._array for tensor in response.output_tensors()}
    return {name: given[name] for name in job.wanted if name in given}


def request_of(job: Job, sender: Any, model: str, version: int) -> pb_utils.InferenceRequest:
    request = pb_utils.InferenceRequest.__new__(pb_utils.InferenceRequest)
    request._inputs = [pb_utils.Tensor(name, array) for name, array in job.feeds.items()]
    request._wanted = list(job.wanted)
    request._id, request._model, request._version = job.request.id, model, version
    request._parameters = {name: value for name, value in job.request.parameters.items() if name not in _OF_THE_SERVER}
    request._priority, request._timeout = job.priority, job.timeout_us
    said = job.request.parameters
    correlation = said.get("sequence_id", 0)
    request._correlation_id = correlation if isinstance(correlation, int | str) else 0
    request._flags = sum(flag for name, flag in _FLAGS.items() if said.get(name))
    request._is_cancelled = lambda: job.cancelled
    request._sender = sender
    return request


_FLAGS = {
    "sequence_start": pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
    "sequence_end": pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
}
_OF_THE_SERVER = frozenset({"priority", "timeout", "sequence_id", "sequence_start", "sequence_end"}) | frozenset(
    {"binary_data_output", "headers", "triton_enable_empty_final_response"}
)
