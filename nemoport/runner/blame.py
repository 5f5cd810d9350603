"""Whose fault it is that ONNX Runtime did not answer: the request's or the machine's.

Its codes do not say. A kernel that is given what does not fit reports FAIL, INVALID_ARGUMENT or RUNTIME_EXCEPTION,
whichever its author chose (release 1.31: FAIL of an Add that does not broadcast, INVALID_ARGUMENT of a Gather out of
range), and memory that is not there is FAIL or RUNTIME_EXCEPTION too. Triton's backend answers INTERNAL to all of them,
so that a client can make a server look broken. Here it is told by where it happened. What is checked before a run
(INVALID_ARGUMENT), and what a kernel refuses, depends on nothing but the graph and its inputs; the graph was loaded and
stays the same, so it is the request's. Allocators and the libraries of devices fail within a kernel as well, and are
known by their words. All else is the machine's.
"""

from __future__ import annotations

import re

from onnxruntime.capi import onnxruntime_pybind11_state as ort

from nemoport.runner.refusal import Code, Refusal

_OF_KERNELS = (ort.Fail, ort.RuntimeException)
_A_KERNEL = re.compile(r"while running \w+ node\.")
_MACHINE = re.compile(
    r"Failed to allocate memory|bad_alloc|bad allocation|out of memory"  # arenas; malloc, on Linux and Windows; CUDA
    r"|\b(CUDA|CUDNN|CUDNN_FE|CUBLAS|CUSPARSE|CURAND|CUFFT|NCCL) (failure|error)\b"  # cuda_call.cc of ONNX Runtime
)
_SAID = re.compile(r"\[ONNXRuntimeError\] : (?P<code>\d+) : \w+ : (?P<what>.*)", re.DOTALL)


def refused(error: Exception) -> Refusal:
    """The answer to a request whose run raised that, in the words of Triton's backend."""
    said = _SAID.match(str(error))
    text = f" {said['code']}: {said['what']}" if said else f": {error}"
    return Refusal(f"onnx runtime error{text}", _code(error))


def _code(error: Exception) -> Code:
    if _MACHINE.search(str(error)):
        return Code.INTERNAL
    if isinstance(error, ort.InvalidArgument) or (isinstance(error, _OF_KERNELS) and _A_KERNEL.search(str(error))):
        return Code.INVALID_ARG
    return Code.INTERNAL
