"""A client of the protocol, for validation: one connection, binary tensors, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPMessage
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import CheckFailed
from nemoport.runner.datatypes import BY_NAME, BY_NUMPY, BYTES
from nemoport.runner.tensors import from_raw, split_bytes, to_raw

Array = NDArray[Any]
HEADER = "Inference-Header-Content-Length"


class Client:
    """`with Client("127.0.0.1:8000") as client: client.infer("model", {"x": array})`"""

    def __init__(self, address: str, timeout: float = 600.0) -> None:
        self._connection = HTTPConnection(address, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()

    def infer(self, model: str, inputs: Mapping[str, Array], version: int | None = None) -> dict[str, Array]:
        """Every output of the model; CheckFailed with the server's own words when it refuses."""
        entries, tails = [], []
        for name, array in inputs.items():
            datatype = BY_NUMPY[array.dtype]
            tails.append(to_raw(datatype, array))
            parameters = {"binary_data_size": len(tails[-1])}
            entries.append({"name": name, "datatype": datatype.name, "shape": array.shape, "parameters": parameters})
        head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
        place = f"/v2/models/{model}" + (f"/versions/{version}" if version is not None else "")
        body, headers = self._ask("POST", f"{place}/infer", b"".join((head, *tails)), {HEADER: str(len(head))})
        return _outputs(memoryview(body), int(headers[HEADER]))

    def get(self, path: str) -> Any:
        return json.loads(self._ask("GET", path)[0])

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What is in the answer, None where it is empty."""
        answer, _ = self._ask("POST", path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def events(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Server-sent events, to the last."""
        answer, _ = self._ask("POST", path, json.dumps(body).encode())
        lines = [line.removeprefix("data:").strip() for line in answer.decode().splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, HTTPMessage]:
        self._connection.request(method, path, body, dict(headers or {}))
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            said = answer.decode(errors="replace")[:400]
            raise CheckFailed(f"the server answers {response.status} to a request of validation: {said}")
        return answer, response.headers


def _outputs(body: memoryview, header_length: int) -> dict[str, Array]:
    tail, outputs = body[header_length:], {}
    for entry in json.loads(bytes(body[:header_length]))["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        datatype, shape, raw = BY_NAME[entry["datatype"]], entry["shape"], tail[:size]
        strings = datatype is BYTES
        flat = split_bytes(raw, math.prod(shape), entry["name"]) if strings else from_raw(datatype, raw)
        outputs[entry["name"]] = np.asarray(flat).reshape(shape)
        tail = tail[size:]
    return outputs
