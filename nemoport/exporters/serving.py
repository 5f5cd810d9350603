"""What the targets that Triton serves through an engine of texts share: the `hf` directory below `weights/`, written
once for any number of ranks, with the plan's ranks checked and left to the engine's arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemoport.errors import UnsupportedInput
from nemoport.exporters.checkpoint import Model, Output
from nemoport.exporters.methods import ENGINES
from nemoport.exporters.targets import hf
from nemoport.spec import LanguageModel, Plan, check_divisible

WEIGHTS = "weights"
"""The directory, within the artifact and so within a version."""


def huggingface(artifact: Path, kind: str) -> Path | None:
    """Where the Hugging Face directory of an artifact lies; None for a kind that has none."""
    return artifact if kind == "hf" else artifact / WEIGHTS if kind in ENGINES else None


def of_engine(loads: tuple[str, ...], target: str) -> tuple[str, ...]:
    """Those that are releases of a target's engine."""
    return tuple(each for each in loads if each.startswith(ENGINES[target]))


def weights(model: Model, plan: Plan, target: str) -> Output:
    """The `hf` output a directory lower, for the engine of a target. An engine may give its stages different
    numbers of layers, so pp need not divide them."""
    engine = ENGINES[target]
    if not isinstance(model.spec.head, LanguageModel):
        raise UnsupportedInput(
            f"{model.checkpoint.path} is of the family {model.spec.family}, which writes no text, and "
            f"{engine} is given text to continue here; use --to onnx"
        )
    check_divisible(model.spec, replace(plan, pp=1))
    made = hf.output(model, replace(plan, tp=1, pp=1, ep=1))
    loads = of_engine(made.loads, target)
    if not loads:
        raise UnsupportedInput(
            f"{model.checkpoint.path} becomes what {', '.join(made.loads)} can load, and {engine} is not among them; "
            "use --to hf, or another --quantize method"
        )
    return replace(
        made,
        files=tuple(replace(file, path=f"{WEIGHTS}/{file.path}") for file in made.files),
        sidecars={f"{WEIGHTS}/{name}": content for name, content in made.sidecars.items()},
        loads=loads,
    )
