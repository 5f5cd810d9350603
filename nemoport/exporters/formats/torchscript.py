"""TorchScript archives, written without torch: a ZIP of source code, a pickle of modules, and their tensors.

    model/code/__torch__.py    the classes of the modules
    model/data.pkl             the modules: of each, by name, its tensors and the modules in it
    model/data/KEY             a tensor each; the keys here are the tensors' names
    model/constants.pkl        none
    model/version, byteorder

Sources: torch/csrc/jit/serialization/import.cpp, unpickler.cpp and docs/serialization.md. Version 10 is read by PyTorch
1.12 and later, 2.13 included; it says what operators mean whose meaning has changed.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Slot, TensorFile
from nemoport.exporters.formats import stored_zip, torch_zip
from nemoport.exporters.formats.unpickle import STORAGES, Record, StoredTensor
from nemoport.exporters.tensor import Files, LazyTensor

CODE = "code/__torch__.py"
_ROOT = "model"
_VERSION = 10
_STORAGE = {dtype: storage for storage, dtype in STORAGES.items()}


@dataclass(frozen=True, kw_only=True)
class Module:
    type: str
    """The name of its class."""
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    modules: Mapping[str, Module]

    def __iter__(self) -> Iterator[Module]:
        """Those in it, and itself."""
        for module in self.modules.values():
            yield from module
        yield self


def file(path: str, root: Module, code: str, slots: Sequence[Slot]) -> TensorFile:
    """The archive of a tree of modules, whose tensors are those of the slots, by their names."""
    tensors = {slot.name: slot.tensor for slot in slots}
    members = {
        CODE: code.encode(),
        "data.pkl": b"\x80\x02" + _module(root, "", tensors) + b".",
        "constants.pkl": b"\x80\x02).",
        "version": b"%d\n" % _VERSION,
        "byteorder": b"little",
    }
    return stored_zip.file(
        path,
        {f"{_ROOT}/{name}": content for name, content in members.items()},
        [(f"{_ROOT}/data/{slot.name}", slot) for slot in slots],
    )


def read(files: Files, path: Path) -> dict[str, LazyTensor]:
    """Every tensor of an archive by its place in the modules, unread."""
    store = files.store(path)
    root = torch_zip.load(store)
    if not isinstance(root, Record):
        raise DamagedInput(f"{path.name} holds a {type(root).__name__}, a module is needed; convert again")
    reach = torch_zip.tensors(store)
    return {name: reach(tensor, name) for name, tensor in _found(root, "")}


def _found(module: Record, name: str) -> Iterator[tuple[str, StoredTensor]]:
    for attribute, value in module.items():
        if isinstance(value, StoredTensor):
            yield f"{name}{attribute}", value
        elif isinstance(value, Record):
            yield from _found(value, f"{name}{attribute}.")


def _module(module: Module, name: str, tensors: Mapping[str, LazyTensor]) -> bytes:
    """An object of its class, made of nothing and given its state."""
    state = [_text(each) + _tensor(f"{name}{each}", tensors) for each in (*module.parameters, *module.buffers)]
    state.append(_text("training") + pickle.NEWFALSE)
    state += [_text(each) + _module(inner, f"{name}{each}.", tensors) for each, inner in module.modules.items()]
    made = _global("__torch__", module.type) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    return made + pickle.EMPTY_DICT + pickle.MARK + b"".join(state) + pickle.SETITEMS + pickle.BUILD


def _tensor(name: str, tensors: Mapping[str, LazyTensor]) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    tensor = tensors[name]
    shape = tensor.shape
    kind = _global("torch", _STORAGE[tensor.dtype])
    storage = _tuple(_text("storage"), kind, _text(name), _text("cpu"), _integer(prod(shape)))
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + len(content).to_bytes(4, "little") + content


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    content = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(content)]) + content
