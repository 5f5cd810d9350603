"""The floors of the house: who may import whom, and what a command does not need to import at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemoport

ROOT = Path(nemoport.__file__).parent
GROUND = {"errors", "spec", "artifact", "plugins", "compatibility"}
TOWERS = {"exporters", "compilers", "repository", "runner", "reference"}
TOWER_MAY = {"reference": {"exporters.tensor", "exporters.dtypes"}}
"""Beyond the ground floor and itself."""
MODULE_MAY = {
    "runner.backends.reference": {"reference", "reference.executor", "exporters.source", "exporters.dequantized"}
}
"""A backend imports its engine; of this one the engine is the reference, fed by the exporters' reader."""
UPSTAIRS = {"calibration", "cli", "show", "check", "validation", "pipeline", "doctor", "__main__"}
GROUND_OUTSIDE = {"blake3"}
DATA = Path(__file__).parent / "data"
SOURCE = DATA / "megatron/megatron_lm/torch_dist_tp2"


def modules() -> dict[str, Path]:
    """Every module by its name below `nemoport`; what lies in templates is written out and never imported."""
    found = {}
    for path in ROOT.rglob("*.py"):
        if path.is_relative_to(ROOT / "templates"):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> Iterator[str]:
    """Absolute names of all that a module imports, wherever in it; of `from x import y`, both x and x.y."""
    package = ("nemoport." + module).rstrip(".").split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names) if name == "nemoport" else (name,)
            if name != "nemoport":
                yield from (f"{name}.{alias.name}" for alias in node.names)


def inner(module: str, path: Path) -> set[str]:
    """The modules of nemoport that a module imports, without the package's name."""
    known = modules()
    below = {name.removeprefix("nemoport.") for name in imports(module, path) if name.startswith("nemoport.")}
    return {name for name in below if name in known}


def outer(module: str, path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(module, path)} - {"nemoport"} - sys.stdlib_module_names


MODULES = modules()
every_module = pytest.mark.parametrize("module", sorted(MODULES))


@every_module
def test_every_module_has_a_floor(module: str) -> None:
    assert module.partition(".")[0] in GROUND | TOWERS | UPSTAIRS | {""}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.partition(".")[0] in GROUND))
def test_the_ground_floor_needs_the_standard_library_and_blake3(module: str) -> None:
    assert outer(module, MODULES[module]) <= GROUND_OUTSIDE
    assert {name.partition(".")[0] for name in inner(module, MODULES[module])} <= GROUND


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.partition(".")[0] in TOWERS))
def test_towers_meet_only_on_the_ground_floor(module: str) -> None:
    tower = module.partition(".")[0]
    allowed = GROUND | TOWER_MAY.get(tower, set()) | MODULE_MAY.get(module, set())
    found = inner(module, MODULES[module])
    # Naming a package on the way to a module in it is no use of it.
    packages = {name.rpartition(".")[0] for name in allowed}
    assert {name for name in found if name.partition(".")[0] != tower} - packages <= allowed


@every_module
def test_nobody_imports_the_command_line(module: str) -> None:
    assert module.partition(".")[0] in ("cli", "__main__") or "cli" not in inner(module, MODULES[module])


def test_the_walk_of_imports_sees_what_is_there() -> None:
    assert "spec" in inner("artifact", MODULES["artifact"])
    assert "exporters.tensor" in inner("exporters.layouts", MODULES["exporters.layouts"])
    assert "blake3" in outer("artifact", MODULES["artifact"])
    assert "numpy" in outer("exporters.tensor", MODULES["exporters.tensor"])
    assert "exporters.convert" in inner("cli.convert", MODULES["cli.convert"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["inspect", "--help"]])
def test_help_imports_neither_numpy_nor_torch(arguments: list[str]) -> None:
    loaded = loaded_by(*arguments)
    assert "nemoport.cli" in loaded
    assert not loaded & {"numpy", "torch", "onnx", "onnxruntime", "safetensors", "rich", "yaml", "blake3", "ml_dtypes"}


def test_what_builders_may_be_told_is_known_without_what_they_build_with() -> None:
    assert not loaded_by("compile", "--help") & {"numpy", "torch", "onnx", "onnxruntime", "safetensors"}


@pytest.mark.parametrize("target", ["hf", "trtllm", "onnx", "vllm", "llmapi"])
def test_converting_imports_no_torch(target: str, tmp_path: Path) -> None:
    loaded = loaded_by("convert", str(SOURCE), "--to", target, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out/manifest.json").is_file()
    assert "numpy" in loaded
    assert not loaded & {"torch", "megatron", "transformers", "nemo", "tensorrt_llm", "onnxruntime"}


@pytest.mark.parametrize("target", ["hf", "trtllm"])
def test_a_reshard_imports_nothing_that_computes(target: str, tmp_path: Path) -> None:
    loaded = loaded_by("convert", str(SOURCE), "--to", target, "-o", str(tmp_path / "out"))
    assert not loaded & {"ml_dtypes", "onnx", "jinja2", "tritonclient", "google.protobuf"}


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sorted(sys.modules), file=sys.stderr))\n"
        "from nemoport.cli import main\n"
        "main(sys.argv[1:], prog_name='nemoport')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])
