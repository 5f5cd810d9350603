"""The datatypes of the KServe protocol, with their names in a model's config, in numpy and in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_WHOLE, _REAL, _TRUTH, _TEXT, _NO_JSON = (int,), (int, float), (bool,), (str,), ()


@dataclass(frozen=True)
class Datatype:
    """One row: `json` are the Python types an element may have in a JSON request, empty where JSON is refused."""

    name: str
    config: str
    numpy: np.dtype[Any]
    json: tuple[type, ...]


DATATYPES = (
    Datatype("BOOL", "TYPE_BOOL", np.dtype(np.bool_), _TRUTH),
    Datatype("UINT8", "TYPE_UINT8", np.dtype(np.uint8), _WHOLE),
    Datatype("UINT16", "TYPE_UINT16", np.dtype(np.uint16), _WHOLE),
    Datatype("UINT32", "TYPE_UINT32", np.dtype(np.uint32), _WHOLE),
    Datatype("UINT64", "TYPE_UINT64", np.dtype(np.uint64), _WHOLE),
    Datatype("INT8", "TYPE_INT8", np.dtype(np.int8), _WHOLE),
    Datatype("INT16", "TYPE_INT16", np.dtype(np.int16), _WHOLE),
    Datatype("INT32", "TYPE_INT32", np.dtype(np.int32), _WHOLE),
    Datatype("INT64", "TYPE_INT64", np.dtype(np.int64), _WHOLE),
    Datatype("FP16", "TYPE_FP16", np.dtype(np.float16), _NO_JSON),
    Datatype("FP32", "TYPE_FP32", np.dtype(np.float32), _REAL),
    Datatype("FP64", "TYPE_FP64", np.dtype(np.float64), _REAL),
    Datatype("BF16", "TYPE_BF16", np.dtype(ml_dtypes.bfloat16), _NO_JSON),
    Datatype("BYTES", "TYPE_STRING", np.dtype(np.object_), _TEXT),
)

BY_NAME = {datatype.name: datatype for datatype in DATATYPES}
BY_CONFIG = {datatype.config: datatype for datatype in DATATYPES}
BY_NUMPY = {datatype.numpy: datatype for datatype in DATATYPES}
BYTES = BY_NAME["BYTES"]
