"""The tensors that Python models take and give."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemoport.runner.datatypes import BY_NUMPY, BYTES
from nemoport.runner.tensors import Array


class Tensor:
    """BYTES are object arrays; a model may give text in them, or a numpy array of fixed-size bytes."""

    def __init__(self, name: str, numpy_array: Array) -> None:
        array = np.asarray(numpy_array)
        if array.dtype.kind in "OSU":
            array = _as_bytes(array)
        elif array.dtype not in BY_NUMPY:
            raise ValueError(f"tensor '{name}' is a numpy {array.dtype}, which Triton cannot carry")
        self._name, self._array = name, np.ascontiguousarray(array).reshape(array.shape)

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> Tensor:
        return cls(name, np.from_dlpack(tensor))

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        """A model may write into it."""
        if not self._array.flags.writeable:
            self._array = self._array.copy()
        return self._array

    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def triton_dtype(self) -> str:
        return BY_NUMPY[self._array.dtype].config

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        return self.as_numpy().__dlpack__()

    def __dlpack__(self, *said: Any, **more: Any) -> Any:
        return self.as_numpy().__dlpack__(*said, **more)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _as_bytes(array: Array) -> Array:
    made = np.empty(array.shape, BYTES.numpy)
    made.reshape(-1)[:] = [each if type(each) is bytes else str(each).encode() for each in array.reshape(-1).tolist()]
    return made
