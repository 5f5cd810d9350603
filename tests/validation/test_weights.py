"""What each rank must hold of a tensor, and the words for what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemoport.exporters import source
from nemoport.exporters.tensor import Held, cut, pad
from nemoport.validation.weights import Share, differences, of_model, rounded

from .small import write

Q, K, HEAD = "layers.0.attn.q.weight", "layers.0.attn.k.weight", "head.weight"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return source.model(write(tmp_path / "source"))


def wrong(model: Any, *shares: Share) -> list[str]:
    """Of these shares; that the other tensors are missing is left out."""
    return [text for text in differences(model, shares) if not text.endswith("is missing")]


def test_a_whole_model_equals_itself_and_lacks_what_is_left_out(model: Any) -> None:
    whole = of_model(model)
    assert differences(model, whole) == ()
    assert differences(model, whole[1:]) == (f"{whole[0].name} is missing",)
    assert {tensor.dtype for tensor in rounded(model, whole).values()} == {"float32"}


@pytest.mark.parametrize("position, first", [(0, 0), (1, 12)])
def test_rows_are_divided_in_order(model: Any, position: int, first: int) -> None:
    share = cut(model.tensors[Q], 0, first, first + 12)
    assert wrong(model, Share(Q, share, "rank", position, 2)) == []
    assert "differs in" in wrong(model, Share(Q, share, "rank", 1 - position, 2))[0]


def test_kv_heads_serve_as_many_ranks_as_they_must(model: Any) -> None:
    """2 KV heads of 6 rows over 4 ranks: [0 0 1 1]."""
    heads = [cut(model.tensors[K], 0, first, first + 6) for first in (0, 6)]
    held = [Share(K, heads[position // 2], "rank", position, 4) for position in range(4)]
    assert wrong(model, *held) == []
    assert len(wrong(model, *(Share(K, heads[position % 2], "rank", position, 4) for position in range(4)))) == 2


def test_the_padding_of_the_head_may_be_anything(model: Any) -> None:
    """53 rows over 4 ranks: 14 each, and 3 of padding."""
    padded = pad(model.tensors[HEAD], 0, 56)
    held = [Share(HEAD, cut(padded, 0, 14 * i, 14 * i + 14), f"rank{i}", i, 4) for i in range(4)]
    assert wrong(model, *held) == []


def test_one_element_is_counted_and_a_wrong_shape_named(model: Any) -> None:
    array = np.full((12, 24), 7, np.float32)
    assert wrong(model, Share(Q, Held(array, "float32"), "rank0", 0, 2)) == [
        f"{Q} in rank0 differs in 288 of 288 elements"
    ]
    assert wrong(model, Share(Q, Held(array[:, :5], "float32"), "rank0", 0, 2)) == [
        f"{Q} in rank0 is [12, 5], a share of [24, 24] needed"
    ]
    assert wrong(model, Share("layers.9.attn.q.weight", Held(array, "float32"))) == [
        "layers.9.attn.q.weight is no tensor of the source"
    ]
