"""What is asked of a model and what it answers, whatever protocol carried it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemoport.runner.datatypes import BY_NUMPY, Datatype
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.tensors import Array, Buffer

Parameter = bool | int | float | str
_KINDS: Mapping[str, tuple[type, ...]] = {
    "sequence_id": (int, str),
    "sequence_start": (bool,),
    "sequence_end": (bool,),
    "triton_enable_empty_final_response": (bool,),
}
_ANY_KIND = (bool, int, float, str)
_UNSUPPORTED = {  # parameters of tensors that mean something this runner does not do
    "shared_memory_region": "shared memory is not supported by this server, send the tensor in the request",
    "classification": "classification is not supported by this server, ask for the whole output",
}


@dataclass(frozen=True, slots=True)
class InputTensor:
    """The data is an array of any shape with the right number of elements, or the raw bytes of one, undecoded."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: Array | Buffer


@dataclass(frozen=True, slots=True)
class InferRequest:
    """`outputs` are the names wanted; empty means every output that the config lists."""

    inputs: tuple[InputTensor, ...]
    outputs: tuple[str, ...] = ()
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How Triton begins the errors of a request."""
        return f"[request id: {self.id or '<id_unknown>'}] "


@dataclass(frozen=True, slots=True)
class OutputTensor:
    name: str
    datatype: Datatype
    array: Array


@dataclass(frozen=True, slots=True)
class InferResponse:
    model_name: str
    model_version: int
    outputs: tuple[OutputTensor, ...]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        return sum(output.array.nbytes for output in self.outputs)

    def arrays(self) -> dict[str, Array]:
        return {output.name: output.array for output in self.outputs}


@dataclass(frozen=True, slots=True)
class Response:
    """One of the answers to a request. None is the end of a decoupled one that has nothing more to say."""

    content: InferResponse | Refusal | None
    last: bool = True

    @property
    def size(self) -> int:
        return self.content.size if isinstance(self.content, InferResponse) else 0

    def value(self) -> InferResponse:
        """The response, or its refusal raised."""
        if isinstance(self.content, Refusal):
            raise self.content
        if self.content is None:
            raise Refusal("the model ended the request without an answer", Code.INTERNAL)
        return self.content


def check_parameters(parameters: Mapping[str, Any], own: Collection[str], wrong: str) -> None:
    """`own` are names that begin with `triton_` and mean something; `wrong` is how the protocol says, with the name
    for {}, that a value is of another kind."""
    for name, value in parameters.items():
        if name.startswith("triton_") and name not in own:
            raise Refusal(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified: "
                f"'{name[:100]}'"
            )
        if type(value) not in _KINDS.get(name, _ANY_KIND):
            raise Refusal(wrong.format(name[:100]))


def check_supported(parameters: Mapping[str, Any]) -> None:
    """Of a tensor, given or wanted."""
    for name in parameters:
        if name in _UNSUPPORTED:
            raise Refusal(_UNSUPPORTED[name])


def request_of(arrays: Mapping[str, Array], outputs: tuple[str, ...] = (), id: str = "") -> InferRequest:  # noqa: A002
    """A request from numpy arrays. BYTES are object arrays of `bytes`."""
    for name, array in arrays.items():
        if array.dtype not in BY_NUMPY:
            raise Refusal(f"input '{name}' is a numpy {array.dtype}, which no KServe datatype can carry")
    inputs = (InputTensor(name, BY_NUMPY[array.dtype], array.shape, array) for name, array in arrays.items())
    return InferRequest(tuple(inputs), outputs, id)
