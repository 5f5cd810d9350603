"""A TensorRT plan on a GPU, with torch for its memory. Nothing of nemoport is imported here, so that it can be checked
against TensorRT's own signatures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch

DATATYPES = {
    trt.DataType.FLOAT: "FP32",
    trt.DataType.HALF: "FP16",
    trt.DataType.BF16: "BF16",
    trt.DataType.INT64: "INT64",
    trt.DataType.INT32: "INT32",
    trt.DataType.INT8: "INT8",
    trt.DataType.UINT8: "UINT8",
    trt.DataType.BOOL: "BOOL",
}
"""As Triton calls them; it has no word for others (FP8, INT4 ...), and they keep TensorRT's name here."""
_TORCH = {
    "FP32": torch.float32,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class NotLoaded(Exception):
    """TensorRT's log says why."""


class NoContext(Exception):
    """TensorRT's log says why."""


class NotRun(Exception):
    """In a sentence."""


class Plan:
    """One execution context under the first profile; one run at a time."""

    def __init__(self, path: Path, gpu: int) -> None:
        self._device = torch.device("cuda", gpu)
        with torch.cuda.device(self._device):
            runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise NotLoaded(trt.__version__)
            self._runtime, self._engine = runtime, engine
            context = engine.create_execution_context()
            if context is None:
                raise NoContext
            self._context = context
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        ends = {name: (_name(engine.get_tensor_dtype(name)), _shape(engine.get_tensor_shape(name))) for name in names}
        taken = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs = {name: end for name, end in ends.items() if name in taken}
        self.outputs = {name: end for name, end in ends.items() if name not in taken}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors of torch, wherever they are; the answers are on the GPU."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            held = {name: feeds[name].to(self._device).contiguous() for name in self.inputs}
            for name, tensor in held.items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise NotRun(
                        f"{name} as {list(tensor.shape)} is outside of the profile that the plan was built for"
                    )
            for name, (datatype, _) in self.outputs.items():
                shape = _shape(self._context.get_tensor_shape(name))
                if -1 in shape:
                    raise NotRun(f"how large {name} is depends on numbers, for which this runner has no room")
                held[name] = torch.empty(shape, dtype=_TORCH[datatype], device=self._device)
            # An empty tensor has no address, and TensorRT wants one.
            nothing = torch.empty(8, dtype=torch.uint8, device=self._device)
            for name, tensor in held.items():
                self._context.set_tensor_address(name, (tensor if tensor.numel() else nothing).data_ptr())
            stream.wait_stream(torch.cuda.current_stream())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise NotRun("TensorRT did not run the plan; its log says why")
            stream.synchronize()
        return {name: held[name] for name in self.outputs}


def _name(datatype: trt.DataType) -> str:
    name: str = DATATYPES.get(datatype, datatype.name)
    return name


def _shape(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims)
