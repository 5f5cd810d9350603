"""The answer to a request that will not be served: one sentence and a code of the KServe protocol."""

from __future__ import annotations

from enum import Enum

from nemoport.errors import InputError


class Code(Enum):
    """Triton's error codes: the HTTP status that its server answers with, and the name of the gRPC status."""

    UNKNOWN = (400, "UNKNOWN")
    INVALID_ARG = (400, "INVALID_ARGUMENT")
    ALREADY_EXISTS = (400, "ALREADY_EXISTS")
    CANCELLED = (400, "CANCELLED")
    NOT_FOUND = (404, "NOT_FOUND")
    INTERNAL = (500, "INTERNAL")
    UNSUPPORTED = (501, "UNIMPLEMENTED")
    UNAVAILABLE = (503, "UNAVAILABLE")

    @property
    def http(self) -> int:
        return self.value[0]

    @property
    def grpc(self) -> str:
        return self.value[1]


class Refusal(InputError):
    """A request, not the server, is at fault unless the code says otherwise."""

    def __init__(self, message: str, code: Code = Code.INVALID_ARG) -> None:
        super().__init__(message)
        self.code = code
