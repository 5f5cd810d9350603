"""Conversions that several tests look at are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .adapters import merged
from .commands import converted
from .fixtures import Fixture
from .modelopt import METHODS, Twin, save

Once = Callable[..., Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(fixture, to, **plan)`: the artifact, which no test may change."""
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[tuple[Any, ...], Path] = {}

    def convert(source: Fixture | Path, to: str, **plan: Any) -> Path:
        path = source.path if isinstance(source, Fixture) else source
        key = (path, to, *sorted(plan.items()))
        if key not in made:
            made[key] = converted(source, to, root / str(len(made)), **plan)
        return made[key]

    return convert


@pytest.fixture(scope="session")
def merged_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's adapter in the fixture's base, which no test may change."""
    return merged("hf", tmp_path_factory.mktemp("lora") / "merged")


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    """What ModelOpt would make of one model, by method, which no test may change."""
    return {method: save(tmp_path_factory.mktemp("twins") / method, method) for method in METHODS}
