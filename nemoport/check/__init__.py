"""What a server would refuse, and what it would take and should not: said without a server and without a GPU.

    look       disk   -> subject   models as values, bounded in everything that is read
    text       a config's text with the place of every field
    graph      what an ONNX file says of itself, without its weights
    rules/     subject -> problems, a row a rule
    repair     problems -> other text
    sarif      findings -> SARIF 2.1.0

A repository, one model of it, a model's directory, an artifact's, or one for NIM: `check` tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemoport.check import artifacts, look, nim, rules
from nemoport.check.finding import Finding, Problem
from nemoport.check.rules.row import Rule
from nemoport.check.subject import ANY, Model, Subject, Target, Trouble
from nemoport.compatibility import Runtime
from nemoport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Request:
    directory: Path
    model: str | None = None
    target: Target = ANY
    runtime: Runtime | None = None
    """What is meant to load it; None is any."""


@dataclass(frozen=True, kw_only=True)
class Report:
    root: Path
    """What the files of the findings are relative to, as it was given."""
    looked_at: tuple[str, ...]
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        return sum(each.severity == severity for each in self.findings)

    @property
    def passed(self) -> bool:
        return not self.count("error")

    def as_json(self) -> dict[str, Any]:
        return {
            "subject": str(self.root),
            "looked_at": list(self.looked_at),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [_as_json(each) for each in self.findings],
        }


def _as_json(finding: Finding) -> dict[str, Any]:
    row = asdict(finding)
    return row | {"repair": finding.repair is not None}


def check(request: Request) -> Report:
    root = request.directory
    if not root.is_dir():
        raise UsageError(f"{root} is no directory; give a model repository, a model's directory or an artifact's")
    if not (root / look.CONFIG).is_file() and (found := tuple(_directory(root, request.runtime))):
        return Report(root=root, looked_at=(root.name,), findings=tuple(each for part in found for each in part))
    if (root / look.CONFIG).is_file():
        root, wanted = root.resolve().parent, root.resolve().name
        return _repository(root, wanted, request)
    return _repository(root, request.model, request)


def _directory(root: Path, runtime: Runtime | None) -> Iterator[Iterable[Finding]]:
    """What is said of an artifact, of a quantized directory of whoever's, of one for NIM."""
    if artifacts.is_one(root):
        yield artifacts.findings(root, runtime)
    if nim.is_one(root) or (nim.is_meant(runtime) and nim.looks_alike(root)):
        yield nim.findings(root, runtime)


def _repository(root: Path, wanted: str | None, request: Request) -> Report:
    if request.runtime and not request.runtime.release:
        raise UsageError(f"{root} is a repository, which Triton serves, and {request.runtime} is no release of it")
    top = look.listing(root, "")
    if wanted is not None and wanted not in top.directories:
        raise UsageError(f"{root} has no model {wanted!r}; it has {', '.join(top.directories[:8]) or 'none'}")
    known: dict[str, tuple[Model, ...]] = {}
    names = top.directories if wanted is None else (wanted,)
    _read(root, names, top.directories, known)
    models = {name: found[0] for name, found in known.items()}
    found: list[Finding] = [_trouble(each) for each in top.troubles]
    broken: set[str] = set()
    for name in _members_first(models):
        for variant in known[name]:
            said = list(
                judge(
                    Subject(
                        model=variant,
                        models=models,
                        target=request.target,
                        runtime=request.runtime,
                        broken=frozenset(broken),
                    )
                )
            )
            if variant is known[name][0] and any(each.severity == "error" for each in said):
                broken.add(name)
            found += said if name in names else []
    unique = dict.fromkeys(found)
    return Report(root=root, looked_at=tuple(names), findings=tuple(sorted(unique, key=_order)))


def judge(subject: Subject) -> Iterator[Finding]:
    """All that the rules say of one model."""
    model = subject.model
    told = [_finding(rule, problem, model) for rule in rules.TEXT for problem in rule.look(subject)]
    yield from told
    for rule in rules.CONFIG:
        for problem in rule.look(subject):
            yield _finding(rule, problem, model)


def _finding(rule: Rule[Subject], problem: Problem, model: Model) -> Finding:
    file, (line, column) = model.config_path if model.has_config else model.name, (1, 1)
    if isinstance(problem.at, str):
        file = problem.at
    elif model.text is not None:
        offset = problem.at if isinstance(problem.at, int) else model.text.offset(problem.at)
        line, column = model.text.position(offset)
    return Finding(
        code=rule.code,
        severity=rule.severity,
        model=model.name,
        file=file,
        line=line,
        column=column,
        found=problem.found,
        needed=problem.needed,
        fix=problem.fix,
        repair=problem.repair,
    )


def _read(root: Path, names: Sequence[str], there: Sequence[str], known: dict[str, tuple[Model, ...]]) -> None:
    """The models that are meant and, through the steps of ensembles, those that they need."""
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known[name] = look.model(root, name)
        waiting += [member for variant in known[name] for member in _members(variant) if member in there]


def _members(model: Model) -> tuple[str, ...]:
    config = model.config
    return tuple(step.model_name for step in config.ensemble_scheduling.step) if config is not None else ()


def _members_first(models: Mapping[str, Model]) -> list[str]:
    """What an ensemble needs comes before it; in a circle any order."""
    done: dict[str, None] = {}
    for name in models:
        waiting = [name]
        seen = set()
        while waiting:
            at = waiting[-1]
            needs = [each for each in _members(models[at]) if each in models and each not in done and each not in seen]
            seen.add(at)
            if needs:
                waiting += needs
            else:
                done[waiting.pop()] = None
    return list(done)


def _trouble(trouble: Trouble) -> Finding:
    rule = next(rule for rule in rules.CONFIG if rule.code == "NP201")
    problem = Problem(
        trouble.path or ".", trouble.reason, "something that can be looked at", "mend it, or take it away"
    )
    return _finding(rule, problem, Model(name="", config_path=""))


def _order(finding: Finding) -> tuple[Any, ...]:
    return finding.model, finding.file, finding.line, finding.column, finding.code, finding.found
