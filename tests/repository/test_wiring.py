"""Ensembles wired: tensors by name from step to step, and what does not fit, in a sentence."""

from __future__ import annotations

import pytest

from nemoport.artifact import Signature, Tensor
from nemoport.errors import UsageError
from nemoport.repository.ensemble import Member, wired

IDS = Tensor("input_ids", "int64", ("batch", "sequence"))
MASK = Tensor("attention_mask", "int64", ("batch", "sequence"))
TYPES = Tensor("token_type_ids", "int64", ("batch", "sequence"))
TEXT = Tensor("TEXT", "string", ("batch", 1))
VECTORS = Tensor("embeddings", "float32", ("batch", 8))


@pytest.mark.parametrize(
    "made, taken, words",
    [
        ((IDS, MASK, TYPES), (IDS, MASK), "makes token_type_ids, which no later step takes"),
        ((IDS, MASK), (IDS, Tensor("attention_mask", "int32", ("batch", "sequence"))), "takes attention_mask as int32"),
        (
            (IDS, MASK),
            (IDS, Tensor("attention_mask", "int64", ("batch", 1, "n"))),
            r"as int64 \[batch, 1, n\], and first",
        ),
        ((IDS, VECTORS), (IDS, VECTORS), "makes embeddings, which is there before it"),
        ((TYPES,), (IDS, MASK), "takes input_ids, attention_mask, and the steps before it make token_type_ids"),
    ],
)
def test_steps_that_do_not_fit_are_refused_in_a_sentence(
    made: tuple[Tensor, ...], taken: tuple[Tensor, ...], words: str
) -> None:
    row = [Member("first", Signature((TEXT,), made)), Member("second", Signature(taken, (VECTORS,)))]
    with pytest.raises(UsageError, match=words):
        wired("e", row)


def test_what_no_step_makes_is_the_clients_to_give() -> None:
    wide = Tensor("dimensions", "int64", ("batch", 1))
    row = [Member("first", Signature((TEXT,), (IDS, MASK))), Member("second", Signature((IDS, MASK, wide), (VECTORS,)))]
    assert wired("e", row) == Signature((TEXT, wide), (VECTORS,))
