"""The rules, one row each: code, severity, the sentence that states it, and the function that looks."""

from nemoport.check.rules import (
    backends,
    ensembles,
    execution,
    files,
    graphs,
    instances,
    layout,
    releases,
    scheduling,
    tensors,
    wording,
)
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject

TEXT = wording.RULES
"""For the text of a config; the others need one that can be read."""

CONFIG: tuple[Rule[Subject], ...] = (
    *layout.RULES,
    *backends.RULES,
    *execution.RULES,
    *tensors.RULES,
    *scheduling.RULES,
    *files.RULES,
    *graphs.RULES,
    *ensembles.RULES,
    *instances.RULES,
    *releases.RULES,
)
