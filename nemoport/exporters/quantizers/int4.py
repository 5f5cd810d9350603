"""INT4, weights only: groups of inputs rounded to nearest, without calibration. Stored as INT4 AWQ without pre-scales,
as ModelOpt does.

scale = max |w| of the group / 7, or of a share of it where cutting off what is beyond makes the squared error smaller.
compressed-tensors has its own, max |w| / 7.5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemoport.exporters.arithmetic import ARITHMETIC
from nemoport.exporters.computed import Single
from nemoport.exporters.quantizers import int4_awq
from nemoport.exporters.quantizers.int4_awq import MOST, Groups, dequantize, encoding, rounded_groups
from nemoport.exporters.quantizing import APART, Fields, Given

__all__ = ["ALGORITHM", "NEEDS", "SHARES", "dequantize", "encoding", "quantize"]

ALGORITHM = int4_awq.ALGORITHM
NEEDS: Mapping[str, tuple[str, ...]] = {"modelopt": (), "trtllm": (), "compressed-tensors": (), "onnx": ()}
SHARES = {"modelopt": APART, "trtllm": APART, "compressed-tensors": APART, "onnx": APART}
GROUPS = {"onnx": (128, 64, 32, 16)}
"""By dialect: the sizes of groups that may be asked for."""
CLIPS = tuple(np.float32(1 - step / 20) for step in range(1, 9))
"""Shares of the largest magnitude that are tried in its place."""


def quantize(given: Given) -> tuple[Fields, ...]:
    pairs = zip(given.weights, given.largest(), strict=True)
    return tuple(
        rounded_groups(weight, largest, ARITHMETIC[given.dialect], SEARCH[given.dialect], given.group)
        for weight, largest in pairs
    )


def clipped(groups: Groups) -> Single:
    """[rows, groups]: the scale of each group with the smallest squared error; the largest of equals."""
    whole = int4_awq.scales(groups)
    best, least = whole, _error(groups, whole)
    for share in CLIPS:
        scale = whole * share
        better = (error := _error(groups, scale)) < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _error(groups: Groups, scale: Single) -> Single:
    each = scale[:, :, None]
    gap = groups - np.clip(np.rint(groups / each), -MOST - 1, MOST) * each
    squared: Single = np.einsum("rgi,rgi->rg", gap, gap)
    return squared


SEARCH = {"modelopt": clipped, "trtllm": clipped, "compressed-tensors": None, "onnx": clipped}
