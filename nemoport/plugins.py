"""Plug-ins: a plug-in is a module, its file name is its name.

Each room (`nemoport.exporters.readers`, `...families`, `...targets`, `nemoport.runner.backends`...) is a package whose
modules are its plug-ins. A third party names a module of its own in the entry point group of the same name as the
room: `[project.entry-points."nemoport.exporters.families"] mine = "my_package.mine"`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import ModuleType

from nemoport.errors import UsageError


@cache
def names(room: str) -> tuple[str, ...]:
    """The plug-ins of a room, sorted, without importing them."""
    package = import_module(room)
    found = {module.name for module in iter_modules(package.__path__)}
    return tuple(sorted(found | {point.name for point in entry_points(group=room)}))


@cache
def load(room: str, name: str) -> ModuleType:
    """Import one plug-in, a third party may replace one of ours."""
    if name not in names(room):
        kind = room.rpartition(".")[2].rstrip("s")
        raise UsageError(f"no {kind} is called {name!r}; there are {', '.join(names(room))}")
    for point in entry_points(group=room, name=name):
        module = point.load()
        assert isinstance(module, ModuleType), f"entry point {name} of {room} must name a module"
        return module
    return import_module(f"{room}.{name}")


def load_all(room: str) -> dict[str, ModuleType]:
    return {name: load(room, name) for name in names(room)}
