"""The answer to a request that will not be served: one sentence and a code of the KServe protocol."""

from __future__ import annotations

from enum import Enum

from nemoport.errors import InputError


class Code(Enum):
    """Triton's error codes; the value is the HTTP status that its server answers with."""

    INVALID_ARG = 400
    NOT_FOUND = 404
    INTERNAL = 500
    UNSUPPORTED = 501
    UNAVAILABLE = 503


class Refusal(InputError):
    """A request, not the server, is at fault unless the code says otherwise."""

    def __init__(self, message: str, code: Code = Code.INVALID_ARG) -> None:
        super().__init__(message)
        self.code = code
