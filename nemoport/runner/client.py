"""A client of the protocol, for validation: one connection, binary tensors, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPConnection
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import CheckFailed
from nemoport.runner.datatypes import BY_NAME, BY_NUMPY
from nemoport.runner.tensors import from_raw, to_raw

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
        self._connection.request("POST", f"{place}/infer", b"".join((head, *tails)), {HEADER: str(len(head))})
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise CheckFailed(f"the server answers {response.status} to a request of validation: {body.decode()[:400]}")
        return _outputs(memoryview(body), int(response.headers[HEADER]))


def _outputs(body: memoryview, header_length: int) -> dict[str, Array]:
    tail, outputs = body[header_length:], {}
    for entry in json.loads(bytes(body[:header_length]))["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        flat = from_raw(BY_NAME[entry["datatype"]], tail[:size])
        outputs[entry["name"]] = np.asarray(flat).reshape(entry["shape"])
        tail = tail[size:]
    return outputs
