"""A model.py as a module of its own, found by no other model."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType

from nemoport.runner.name_locks import NameLocks
from nemoport.runner.python_model import triton_python_backend_utils

_NUMBERS = count()
_MODULES = NameLocks()  # sys.modules belongs to all


def load_module(path: Path) -> ModuleType:
    """Execute the file. Modules beside it are its own: another model may have others of the same name."""
    sys.modules["triton_python_backend_utils"] = triton_python_backend_utils
    name = f"_nemoport_python_model_{next(_NUMBERS)}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with own_modules(path.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def own_modules(version_directory: Path) -> Iterator[None]:
    """In the block, imports look into the version directory and the model's; after it, what came from there is out of
    `sys.modules`, and lives on in whoever imported it. Waits for a model that has a module of the same name."""
    places = [str(version_directory), str(version_directory.parent)]
    with ExitStack() as stack:
        for name in sorted(_names(version_directory) | _names(version_directory.parent)):
            stack.enter_context(_MODULES.held(name))
        before = set(sys.modules)
        sys.path[:0] = places
        try:
            yield
        finally:
            for place in places:
                sys.path.remove(place)
            for name in set(sys.modules) - before:
                file = getattr(sys.modules.get(name), "__file__", None) or ""
                if file.startswith(f"{places[1]}/") and not name.startswith("_nemoport_python_model_"):
                    sys.modules.pop(name, None)


def _names(place: Path) -> set[str]:
    """Of the modules and packages in it, but for each model's own file, which nobody imports."""
    found = (each for each in place.iterdir() if each.suffix in (".py", ".so") or any(each.glob("**/*.py")))
    return {name for each in found if (name := each.name.partition(".")[0]).isidentifier()} - {"model"}


def told(error: BaseException) -> str:
    """As Triton's python backend prints an exception: what, and where in the model."""
    if isinstance(error, triton_python_backend_utils.TritonModelException):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if not frame.filename.startswith(str(Path(__file__).parents[1]))]
    at = "".join(f"\n  {frame.filename}({frame.lineno}): {frame.name}" for frame in reversed(inner))
    return f"{type(error).__name__}: {error}" + (f"\n\nAt:{at}\n" if at else "")
