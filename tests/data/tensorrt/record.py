"""Records what our programs use of TensorRT's Python API, from NVIDIA's own wheels: `python record.py VERSION`.

The wheel `tensorrt-cu13-bindings` holds the binding module without the libraries that it is linked to. Empty libraries
of the same names, made with gcc, let it be imported, which is enough to read the signatures that pybind11 wrote. Kept
are the names that occur in the programs below: one that uses another name has no type by this record.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PROGRAMS = (ROOT / "nemoport/templates/job/build_plan.py", ROOT / "nemoport/runner/plans.py")
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
UNSAID = {
    "build_serialized_network": "(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None",
    "deserialize_cuda_engine": "(self, serialized_engine: bytes) -> ICudaEngine | None",
    "create_execution_context": "(self) -> IExecutionContext | None",
    "set_input_shape": "(self, name: str, shape: Sequence[int]) -> bool",
}
"""Of which pybind11 wrote no signature; from the API's documentation."""
IS_ALSO = {"IHostMemory": "bytes", "Dims": "tuple[int, ...]"}
"""What its protocols make of a class."""
WORDS = {"nvinfer1::IBuilder": "Builder", "nvonnxparser::IParserError": "ParserError"}
WORDS |= {"typing.SupportsInt": "int", "typing_extensions.Buffer": "bytes", "buffer": "bytes", "capsule": "int"}
TAKES = {"Dims": "Sequence[int]"}
"""What is taken for it too."""


def main(version: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        module = bindings(version, Path(scratch))
    (HERE / f"{version}.pyi.txt").write_text(stub(module, version))


def bindings(version: str, scratch: Path) -> ModuleType:
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(scratch))
    subprocess.run([*pip, f"tensorrt-cu13-bindings=={version}"], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("tensorrt_bindings/tensorrt.so", scratch)
    listed = subprocess.run(["nm", "-D", "-u", library], check=True, capture_output=True, text=True).stdout
    needed = [name for name in (line.split()[-1] for line in listed.splitlines()) if name.isidentifier()]
    functions = (f"void *{name}(void) {{ return 0; }}" for name in needed if not name.lstrip("_").startswith("Py"))
    for name, content in zip(LIBRARIES, ("\n".join(functions), "", ""), strict=True):
        file = scratch / f"{name}.so.{version.partition('.')[0]}"
        gcc = ("gcc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{file.name}", "-o", str(file))
        subprocess.run([*gcc, "-x", "c", "-"], input=content, text=True, check=True)
        ctypes.CDLL(str(file))
    spec = importlib.util.spec_from_file_location("tensorrt", library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub(module: ModuleType, version: str) -> str:
    """The classes that are used, and those in the signatures of what is."""
    used = {name for program in PROGRAMS for name in names(program)}
    kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    waiting, lines = sorted(used & kinds.keys()), list[str]()
    for name in waiting:
        body = list(members(kinds[name], used)) or ["..."]
        bases = [base.__name__ for base in kinds[name].__bases__ if base.__name__ in kinds]
        head = ", ".join([*bases, *([IS_ALSO[name]] if name in IS_ALSO else [])])
        lines += ["", f"class {name}({head}):" if head else f"class {name}:", *(f"    {line}" for line in body)]
        said = {*re.findall(r"\w+", " ".join(body)), *bases}
        waiting += sorted(each for each in said & kinds.keys() if each not in waiting)
    head = f"# Recorded by record.py from tensorrt-cu13-bindings {version}."
    return "\n".join([head, "from collections.abc import Sequence", "", "__version__: str", *lines]) + "\n"


def names(program: Path) -> Iterator[str]:
    with program.open("rb") as stream:
        yield from (token.string for token in tokenize.tokenize(stream.readline) if token.type == tokenize.NAME)


def members(kind: type, used: set[str]) -> Iterator[str]:
    for name, member in vars(kind).items():
        if isinstance(member, kind) and name in used:  # of an enumeration
            yield f"{name}: {kind.__name__}"
        elif isinstance(member, property) and name in used:
            what = returned(member.fget.__doc__) if member.fget else "object"
            yield from ("@property", f"def {name}(self) -> {what}: ...")
            if member.fset:
                yield from (f"@{name}.setter", f"def {name}(self, value: {what}) -> None: ...")
        elif name == "Severity" and isinstance(member, type):
            yield "class Severity: ..."
        elif type(member).__name__ == "Severity" and name in used:
            yield f"{name}: ILogger.Severity"
        elif name in (*used, "__init__", "__int__") and callable(member):
            signature = UNSAID.get(name) or plain(member)
            if signature:
                yield f"def {name}{signature}: ..."


def plain(member: Any) -> str | None:
    """`(self, input: str, min: Sequence[int]) -> None`, of the first line that pybind11 wrote."""
    found = re.match(r"\w+\(self: [\w.]+(.*)\) -> (.+)", member.__doc__ or "")
    return f"(self{typed(found[1], TAKES)}) -> {typed(found[2])}" if found else None


def returned(text: str | None) -> str:
    found = re.search(r"-> (.+)", text or "")
    return typed(found[1]) if found else "int"


def typed(text: str, also: dict[str, str] | None = None) -> str:
    text = re.sub(r"= [^,)]+", "= ...", re.sub(r"\btensorrt(\.tensorrt)?\.", "", text))
    for name, kind in {**WORDS, **(also or {})}.items():
        text = re.sub(rf"(?<![\w.]){re.escape(name)}\b", kind, text)
    return re.sub(r"\bnv\w+::", "", text)


if __name__ == "__main__":
    main(*sys.argv[1:])
