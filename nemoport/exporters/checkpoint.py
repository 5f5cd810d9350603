"""What flows through the exporters: a `Checkpoint` as a reader found it, a `Model` once its names are resolved, and
the `Output` that a target wants written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemoport.artifact import Signature
from nemoport.exporters.encoding import Encoding
from nemoport.exporters.formats.tree import Tree
from nemoport.exporters.tensor import LazyTensor
from nemoport.spec import ModelSpec, Plan


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole model as stored, whatever TP, PP or EP it was saved with. No tensor byte has been read."""

    path: Path
    format: str
    """The reader's name."""
    writer: str
    """The program that wrote it, with its version where the files tell."""
    naming: str
    """Whose words names and config are in: `megatron` or `huggingface`."""
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Stored things that are no weights, each with the rule that skips it."""
    masters: Mapping[str, LazyTensor] = field(default_factory=dict)
    """float32 copies of tensors that the optimizer kept, under the same names."""
    tokenizer: Tree | None = None
    """The directory that holds the tokenizer's files."""
    trained: Mapping[str, int] = field(default_factory=dict)
    """tp, pp, ep of the training run, where known."""


class Reader(Protocol):
    """A module in `readers/`."""

    WRAPS: tuple[str, ...]
    """The formats that this one is a more specific form of."""
    LOOKS_FOR: str
    """What it recognises, in words, for whom nothing is recognised."""
    NEEDED: tuple[str, ...]
    """The pickles among its files that `read` opens: names with `*` for what varies, `*.distcp/NAME` for an object
    among the tensors of a distributed checkpoint."""

    def recognises(self, path: Path) -> bool:
        """From names and first bytes only; never an error."""
        ...

    def files(self, path: Path) -> Tree:
        """All that belongs to the checkpoint at a path that it recognises."""
        ...

    def read(self, path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
        """`config` is the user's, in the words of the naming; it goes before what the files say."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How a model's weights are quantized, and what its checkpoint says of it."""

    encoding: Encoding
    said: Mapping[str, Any]
    """For the manifest."""
    dialect: str = "modelopt"
    """Whose words and names it is in."""
    kv_cache: str | None = None
    excluded: tuple[str, ...] = ()
    """Patterns of the linears that are not quantized, in the checkpoint's names."""
    config: Mapping[str, Any] | None = None
    """`quantization_config` of config.json, word for word."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Descriptions beside the weights, byte for byte."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint whose every tensor is explained: canonical names, canonical shapes."""

    checkpoint: Checkpoint
    spec: ModelSpec
    tensors: Mapping[str, LazyTensor]
    sources: Mapping[str, tuple[str, ...]]
    """Canonical name -> the stored tensors it is made of."""
    transforms: Mapping[str, str] = field(default_factory=dict)
    """Canonical name -> what was done to it on the way, in words; of most tensors, nothing."""
    adapter: Mapping[str, Any] | None = None
    """What the manifest says of the adapter that goes with it."""
    quantized: Quantized | None = None
    undone: Mapping[str, Any] | None = None
    """What the checkpoint said of a quantization that was undone, since it was asked for."""

    @property
    def dtype(self) -> str:
        """The dtype that the model is said to have: its embedding's."""
        return self.tensors["embed.weight"].dtype


@dataclass(frozen=True)
class Slot:
    """One tensor of an output file."""

    name: str
    tensor: LazyTensor
    parts: tuple[str, ...]
    """The canonical tensors it is made of."""
    transform: str = ""
    """What was done to them, in words, for the ledger."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file of slots: `header`, then each slot's bytes at its offset, zeros between."""

    path: str
    header: bytes
    slots: tuple[Slot, ...]
    offsets: tuple[int, ...]
    """Of each slot, from the start of the file; increasing."""
    seal: Callable[[Sequence[int]], Mapping[int, bytes]] | None = None
    """Of the CRC-32 of each slot, known when they are written: what stands between and behind them, by its offset."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """All that a target writes: tensor files, and small files whose bytes are known already."""

    files: tuple[TensorFile, ...]
    sidecars: Mapping[str, bytes]
    loads: tuple[str, ...]
    dtype: str
    signature: Signature | None = None
    stages: tuple[Signature, ...] = ()
    """Of each pipeline stage, where they are executed one by one."""
    late: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    """Small files whose bytes are known when the tensors are written."""
    warnings: tuple[str, ...] = ()
    """What whoever converts should know before it is served, each a sentence."""


class Target(Protocol):
    """A module in `targets/`: pure, reads nothing but shapes."""

    LOADS: tuple[str, ...]
    """What loads what it writes, of some model or other; an output says it of one."""

    def output(self, model: Model, plan: Plan) -> Output: ...
