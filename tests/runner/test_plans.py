"""TensorRT plans, as far as a machine without TensorRT can tell: what they say of themselves, held against Triton."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from nemoport.errors import UnsupportedInput
from nemoport.runner.backends.tensorrt import PlanSession
from nemoport.runner.datatypes import BY_NAME
from nemoport.runner.model_config import ModelConfig

Ends = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Said:
    """What a plan says of its ends. It is not run."""

    inputs: Ends = field(default_factory=lambda: {"x": ("FP32", (-1, 3))})
    outputs: Ends = field(default_factory=lambda: {"y": ("FP32", (-1, 3))})


@pytest.mark.parametrize("datatype", ["FP8", "INT4", "FP4", "E8M0"])
@pytest.mark.parametrize("end", ["inputs", "outputs"])
def test_an_end_in_a_type_that_triton_has_not_is_refused_by_name(end: str, datatype: str) -> None:
    plan = Said()
    setattr(plan, end, {"z": (datatype, (-1, 7))})
    with pytest.raises(UnsupportedInput, match=f"the plan of model 'm' has z in {datatype}, .*FP32.* a cast"):
        PlanSession(plan, ModelConfig(name="m"), complete=True)


@pytest.mark.parametrize("datatype", sorted(BY_NAME.keys() - {"BYTES"}))
def test_an_end_in_a_type_that_triton_has_is_taken(datatype: str) -> None:
    session = PlanSession(Said(inputs={"z": (datatype, (-1, 7))}), ModelConfig(name="m"), complete=True)
    assert (session.inputs["z"].datatype.name, session.inputs["z"].shape) == (datatype, (-1, 7))
