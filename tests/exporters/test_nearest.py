"""Looking a number up gives what working it out gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nemoport.exporters.nearest import e4m3

LOWER = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Halves of a float32 below the one that is looked up: nothing, hardly anything, half-way, all but the next."""


@pytest.mark.parametrize("lower", LOWER)
def test_e4m3_is_what_ml_dtypes_rounds_every_upper_half_to(lower: int) -> None:
    numbers = (np.arange(1 << 16, dtype=np.uint32) << 16 | lower).view(np.float32)
    with np.errstate(all="ignore"):  # among them are infinities
        judge = numbers.astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(e4m3(numbers).view(np.uint8), judge.view(np.uint8))


def test_e4m3_keeps_the_shape_of_numbers_that_do_not_lie_together() -> None:
    numbers = np.linspace(-500, 500, 7 * 24, dtype=np.float32).reshape(7, 24)[::2, 1::3]
    judge = numbers.astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(e4m3(numbers).view(np.uint8), judge.view(np.uint8))
    assert e4m3(numbers).shape == numbers.shape
