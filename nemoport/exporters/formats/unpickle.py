"""The one place where pickles are opened: nothing in them is ever imported or called.

An allow-list maps each global that checkpoints really contain to an inert stand-in of our own: dataclasses of torch's
distributed metadata become `Record`s, dtypes and enums become names, Namespaces become dicts. Any other global is
refused by its name. What stands on the list was seen in checkpoints of torch 2.x, megatron-core 0.8 to 0.17,
Megatron-LM, Megatron-Bridge and NeMo; sources: torch/distributed/checkpoint/metadata.py, torch/_utils.py.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from nemoport.errors import DamagedInput, PolicyError

BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The first pickle of a file of torch.save from before 1.6: the magic number in torch/serialization.py."""


TORCHSCRIPT = "__torch__"
"""Where TorchScript says that its classes are, whatever they are called; there is no such module in Python."""


class Record(dict[str, Any]):
    """The state of an object whose class was not imported. Fields that are absent had their default."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        if args:
            self["args"] = args

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)
        else:
            self["state"] = state

    def __hash__(self) -> int:  # type: ignore[override]
        """Records are keys of `.metadata`'s storage index, hashed before their state is set."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Name:
    """A global that is only named: a dtype, an enum, a storage class."""

    module: str
    name: str

    def __call__(self, *args: object) -> EnumValue:
        return EnumValue(self, args)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class EnumValue:
    """An enum member: its class by name and its value."""

    kind: Name
    args: tuple[object, ...]


@dataclass(frozen=True)
class StoredStorage:
    """Where a torch.save archive keeps the bytes of a storage: `data/KEY`."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a torch.save archive, unread. Offset and stride in elements."""

    storage: StoredStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e5m2Storage": "float8_e5m2",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_TORCH_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
}
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "ShardedTensorMetadata"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan", "MCoreMetadata"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    # StorageMeta's checkpoint_id, where the writer was given a Path; Python 3.13 names the inner module.
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    # RNG states and arguments of per-rank files; extra states of Transformer Engine 1.
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "io": {"BytesIO"},
    "collections": {"defaultdict"},
}
_ENUMS = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "signal": {"Signals"},
    "megatron.core.transformer.enums": {"AttnBackend", "AttnType", "AttnMaskType", "LayerType", "ModelType"},
    "megatron.core.enums": {"ModelType", "Fp8Recipe"},
    "megatron.model.enums": {"AttnMaskType", "AttnType", "LayerType", "ModelType"},
    "megatron.legacy.model.enums": {"AttnMaskType", "AttnType", "LayerType"},
    "megatron.core.rerun_state_machine": {"RerunMode", "RerunState", "RerunDiagnostic"},
}


def _rebuild_tensor(
    storage: StoredStorage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> StoredTensor:
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: StoredTensor, *_: object) -> StoredTensor:
    return data


def _size(dimensions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dimensions)


_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def unpickle(content: bytes, what: str) -> Any:
    """The pickle as inert data. `what` names it in errors: PolicyError for a global that is not on the allow-list,
    DamagedInput for bytes that are no pickle."""
    _check_memo(content, what)
    try:
        with _without_warnings():
            return _Restricted(io.BytesIO(content), what).load()
    except PolicyError:
        raise
    # A damaged pickle can fail anywhere in the interpreter of its opcodes, with any of these.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:
        raise DamagedInput(f"{what} is not a readable pickle ({error}); copy the checkpoint again") from error
    except (MemoryError, RecursionError) as error:
        raise DamagedInput(f"{what} asks for more memory or depth than a checkpoint needs; it is damaged") from error


_ARGUMENTS = {ord(each.code): each.arg.n if each.arg else 0 for each in pickletools.opcodes}
"""Bytes after each opcode; below zero, pickletools' words for a line or for a size of so many bytes before the data."""
_SIZES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
}
_SIZES |= {pickletools.TAKEN_FROM_ARGUMENT8U: 8}
_LINES = {ord("i"): 2, ord("c"): 2}
"""Opcodes of more lines than one."""
_STOP, _PUT, _LONG_PUT = b".pr"


def _check_memo(content: bytes, what: str) -> None:
    """No object is memoized under a number that there can be no so many objects for: pickle makes room up to it."""
    at, size = 0, len(content)
    while at < size and (opcode := content[at]) != _STOP:
        after = at + 1
        length = _ARGUMENTS.get(opcode, 0)
        if opcode == _LONG_PUT and int.from_bytes(content[after : after + 4], "little") > size // 2:
            raise DamagedInput(f"{what} numbers more objects than it can hold; copy the checkpoint again")
        if length >= 0:
            at = after + length
        elif width := _SIZES.get(length):
            at = after + width + int.from_bytes(content[after : after + width], "little")
        else:
            for _ in range(_LINES.get(opcode, 1)):
                at = content.find(b"\n", after) + 1 or size
                line, after = content[after:at], at
            if opcode == _PUT and (not line.strip().isdigit() or len(line) > 10 or int(line) > size // 2):
                raise DamagedInput(f"{what} numbers more objects than it can hold; copy the checkpoint again")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Python warns of escapes in strings that mean nothing, for whoever writes them in source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def survey(content: bytes) -> tuple[tuple[str, ...], bool]:
    """The globals beyond the allow-list that a pickle names, read from its opcodes, and whether it is whole: nothing is
    built. Of a file of torch.save from before 1.6, which is five pickles and then numbers, of all five."""
    file = io.BytesIO(content)
    found: dict[str, None] = {}
    whole = True
    for _ in range(5 if content.startswith(BEFORE_ZIP) else 1):
        beyond, whole = _surveyed(file)
        found |= dict.fromkeys(beyond)
        if not whole:
            break
    return tuple(sorted(found)), whole


def _surveyed(file: io.BytesIO) -> tuple[tuple[str, ...], bool]:
    memo: dict[int, object] = {}
    strings: list[str] = []
    found: dict[tuple[str, str], None] = {}
    top: object = None
    whole = False
    with _without_warnings(), suppress(ValueError, OverflowError):  # of a damaged pickle, what was seen so far counts
        for opcode, argument, _ in pickletools.genops(file):
            match opcode.name:
                case "MEMOIZE":
                    memo[len(memo)] = top
                    continue
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(str(argument))] = top
                    continue
                case "GET" | "BINGET" | "LONG_BINGET":
                    top = memo.get(int(str(argument)))
                case "GLOBAL" | "INST":
                    module, _, name = str(argument).partition(" ")
                    found[module, name] = None
                    top = None
                case "STACK_GLOBAL":
                    module, name = [*["?"] * 2, *strings][-2:]
                    found[module, name] = None
                    top = None
                case _:
                    top = argument
            if isinstance(top, str):
                strings.append(top)
        whole = True
    return tuple(f"{module}.{name}" for module, name in sorted(found) if not _known(module, name)), whole


def _known(module: str, name: str) -> bool:
    named = name in _ENUMS.get(module, ()) or (module == "torch" and (name in _TORCH_DTYPES or name in STORAGES))
    return named or (module, name) in _FUNCTIONS or _is_record(module, name)


def _is_record(module: str, name: str) -> bool:
    return module == TORCHSCRIPT or name in _RECORDS.get(module, ())


class _Restricted(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, what: str) -> None:
        super().__init__(file)
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if (function := _FUNCTIONS.get((module, name))) is not None:
            return function
        if _is_record(module, name):
            return Record
        if name in _ENUMS.get(module, ()) or (module == "torch" and (name in _TORCH_DTYPES or name in STORAGES)):
            return Name(module, name)
        raise PolicyError(
            f"{self._what} would import {module}.{name}, which no checkpoint needs; "
            "nothing was executed: refuse this file, or ask whoever wrote it"
        )

    def persistent_load(self, pid: Any) -> StoredStorage:
        """torch.save: ('storage', storage class, key, device, number of elements)."""
        match pid:
            case ("storage", Name(module="torch", name=storage), str(key), str(), int(elements)) if storage in STORAGES:
                return StoredStorage(STORAGES[storage], key, elements)
        raise DamagedInput(f"{self._what} refers to storage {pid!r}, which is none of torch's")
