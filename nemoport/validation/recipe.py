"""What a recipe makes of the source, computed anew: every field, bit for bit, from the statistics in the artifact.

The quantizers are those that `convert` used, so this proves what was written, not how well it was thought of: whether
the numbers are a good quantization is for their own tests and for the text to say.
"""

from __future__ import annotations

from functools import partial

from nemoport import plugins
from nemoport.exporters import quantize, statistics
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.computed import Once
from nemoport.exporters.convert import TARGETS
from nemoport.exporters.statistics import Statistics
from nemoport.spec import Recipe
from nemoport.validation.subject import Subject


def requantized(model: Model, subject: Subject, recipe: Recipe) -> Model:
    """The source as the artifact must hold it. Nothing is computed until a field is read."""
    kind, plan = subject.artifact.kind, subject.artifact.plan
    chosen = quantize.chosen(recipe, kind, plugins.load(TARGETS, kind), recipe.calibration is not None, plan.dialect)
    seen = Once(partial(_kept, subject)) if chosen.needs else None
    return quantize.quantized(model, chosen, plan, seen)


def _kept(subject: Subject) -> Statistics:
    return statistics.read(subject.files / statistics.FILE)[0]
