"""Every family is quantized: what is written reads back as the same model, and answers nearly as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemoport import reference
from nemoport.errors import UnsupportedInput
from nemoport.exporters import convert, methods, source, stream
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.groups import groups
from nemoport.spec import Plan, Recipe, tensors

from .test_transformers import CASES, save

FAMILIES = {case.family: name for name, case in reversed(CASES.items()) if "biases" not in name}
BETWEEN = (0.002, 0.2)
"""Of the logits' norm: less, and nothing was rounded; more, and it was rounded wrongly."""


STORABLE = {family: methods.storable(source.column(family, "huggingface", "give it one")) for family in FAMILIES}
"""As the table in the README says."""


def test_the_table_knows_who_cannot_be_quantized() -> None:
    """GPT-2 is stored transposed, GPT-OSS as stacks with gate and up in turns."""
    assert [family for family, yes in STORABLE.items() if not yes] == ["gpt_oss", "gpt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized(family: str, tmp_path: Path) -> None:
    saved = save(CASES[FAMILIES[family]], tmp_path / "model")
    plan = Plan(recipe=Recipe(method="fp8_dynamic"))
    if not STORABLE[family]:
        with pytest.raises(UnsupportedInput, match="is quantized, and cannot be stored"):
            convert.plan(saved.path, "hf", tmp_path / "out", plan=plan)
        return
    stream.run(convert.plan(saved.path, "hf", tmp_path / "out", plan=plan))
    model = source.model(tmp_path / "out")
    assert model.spec == source.model(saved.path).spec
    linears = {f"{linear}.weight" for group in groups(tensors(model.spec)) for linear in group.linears}
    assert {name for name, tensor in model.tensors.items() if isinstance(tensor, Encoded)} == linears
    found = reference.logits(model.spec, all_dequantized(model.tensors), saved.ids)
    apart = np.linalg.norm(found - saved.logits) / np.linalg.norm(saved.logits)
    assert BETWEEN[0] < apart < BETWEEN[1]
