"""What a pipeline asks for, as values: one for each model, matrices expanded and paths resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nemoport.errors import UsageError
from nemoport.pipeline import document
from nemoport.spec import Plan, Recipe

CACHE = ".nemoport-cache"


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Where the scales of a quantization come from."""

    tokens: Path | None = None
    samples: int | None = None
    length: int | None = None
    batch: int | None = None
    statistics: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One model, one way to convert it."""

    name: str
    source: Path
    to: str
    plan: Plan
    config: Path | None = None
    adapter: Path | None = None
    calibrated: Calibrated = Calibrated()
    publish: bool | None = None
    """None: where Triton can serve it."""
    max_batch_size: int | None = None
    triton_release: str | None = None
    validate: bool = True
    promote: bool = False
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Joined:
    """An ensemble: models of the file, served as one."""

    name: str
    steps: tuple[str, ...]
    max_batch_size: int | None = None
    """None: what every step takes."""
    triton_release: str | None = None
    validate: bool = True
    promote: bool = False
    label: str | None = None

    @property
    def does(self) -> tuple[str, ...]:
        return (
            *("compose", "publish"),
            *(["validate"] if self.validate else []),
            *(["promote"] if self.promote else []),
            *([f"label {self.label}"] if self.label else []),
        )

    def as_json(self) -> dict[str, Any]:
        return {"model": self.name, "of": list(self.steps), "steps": list(self.does)}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    path: Path
    repository: Path
    cache: Path
    models: tuple[Wanted, ...]
    ensembles: tuple[Joined, ...] = ()
    remote: str | None = None


def read(path: Path, only: tuple[str, ...] = ()) -> Pipeline:
    """`only` names models of the file; those of a matrix by the name that is written, or by the one that it becomes. An
    ensemble brings its steps."""
    data = document.load(path)
    base = path.resolve().parent
    models: dict[str, tuple[str, Wanted]] = {}
    for entry in data["models"]:
        for name, words in _expanded(_merged(data.get("defaults", {}), entry)):
            if name in models:
                raise UsageError(f"{path}: two models are called {name}; a matrix makes names of its own for each")
            models[name] = entry["name"], _wanted(path, base, name, words)
    ensembles = [_joined(path, words, models) for words in data.get("ensembles", [])]
    names = [each.name for each in ensembles]
    if twice := [name for at, name in enumerate(names) if name in models or name in names[:at]]:
        raise UsageError(f"{path}: two models are called {twice[0]}; give the ensemble a name of its own")
    unknown = [name for name in only if name not in names and not any(name in (k, v[0]) for k, v in models.items())]
    if unknown:
        raise UsageError(f"{path} has no model {unknown[0]!r}; it has {', '.join([*models, *names])}")
    chosen = [each for each in ensembles if not only or each.name in only]
    asked = {*only, *(step for each in chosen for step in each.steps)} if only else {*models}
    return Pipeline(
        path=path,
        repository=base / data["repository"],
        cache=base / data.get("cache", CACHE),
        remote=data.get("remote"),
        models=tuple(wanted for key, (own, wanted) in models.items() if {key, own} & asked),
        ensembles=tuple(chosen),
    )


def _joined(path: Path, words: Mapping[str, Any], models: Mapping[str, tuple[str, Wanted]]) -> Joined:
    name = words["name"]
    for step in words["steps"]:
        if step not in models:
            raise UsageError(
                f"{path}: ensemble {name} has the step {step}, which is no model; there are {', '.join(models)}"
            )
        if not models[step][1].promote:
            raise UsageError(f"{path}: ensemble {name} needs {step} live; say promote: true for it")
    return Joined(**{**words, "steps": tuple(words["steps"])})


def _merged(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **entry}


def _expanded(words: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """{tp: [1, 2]} of `llama` is llama-tp1 and llama-tp2."""
    matrix, name = words.pop("matrix", None), words["name"]
    if not matrix:
        yield name, words
        return
    for values in product(*matrix.values()):
        cell = dict(zip(matrix, values, strict=True))
        yield "-".join([name, *(_tag(word, value) for word, value in cell.items())]), {**words, **cell}


def _tag(word: str, value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("method")
    return f"{word}{value}" if word in ("tp", "pp", "ep") else str(value or "plain")


def _wanted(path: Path, base: Path, name: str, words: Mapping[str, Any]) -> Wanted:
    for word in ("source", "to"):
        if word not in words:
            raise UsageError(f"{path}: model {name} has no {word!r}; say it there or under defaults")
    quantize = words.get("quantize")
    said: dict[str, Any] = {"method": quantize} if isinstance(quantize, str) else dict(quantize or {})
    recipe = None
    if said:
        recipe = Recipe(
            method=said["method"],
            kv_cache=said.get("kv_cache"),
            exclude=tuple(said.get("exclude", ())),
            requantize=said.get("requantize", False),
        )
    sizes = {word: words[word] for word in ("tp", "pp", "ep", "dtype", "vocab", "weights") if word in words}
    rest = ("publish", "max_batch_size", "triton_release", "validate", "promote", "label")
    return Wanted(
        name=name,
        source=base / words["source"],
        to=words["to"],
        plan=Plan(**sizes, recipe=recipe),
        config=_path(base, words.get("config")),
        adapter=_path(base, words.get("adapter")),
        calibrated=Calibrated(
            tokens=_path(base, said.get("calib")),
            samples=said.get("calib_samples"),
            length=said.get("calib_length"),
            batch=said.get("calib_batch"),
            statistics=_path(base, said.get("calib_stats")),
        ),
        **{word: words[word] for word in rest if word in words},
    )


def _path(base: Path, text: str | None) -> Path | None:
    return base / text if text else None
