"""The methods of quantization and what each may be written as: one table, from what the quantizers say. The docs print
it, and `quantize` refuses what it does not allow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

from nemoport import plugins
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.encoding import Encoding
from nemoport.exporters.rules import Column, Rule

DIALECTS: Mapping[str, tuple[str, ...]] = {
    "modelopt": ("hf", "vllm", "llmapi"),
    "compressed-tensors": ("hf", "vllm", "llmapi"),
    "trtllm": ("trtllm",),
    "onnx": ("onnx",),
}
"""Of quantized weights, and the targets that write it; an engine's target takes only what that engine loads."""
ENGINES: Mapping[str, str] = {"vllm": "vLLM", "llmapi": "TensorRT-LLM"}
"""The targets that are for one engine, by its name in `loads`."""
PADDED_BY_TRTLLM = ("int4_awq",)
"""Group-wise int4 layers are padded to 64 or a group on each rank, and the loader then refuses the file (layers.py of
tensorrt_llm 0.16, WeightOnlyGroupwiseQuantLinear)."""
LEAST_OF_TRTLLM = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a dialect."""

    method: str
    dialect: str
    algorithm: str
    """ModelOpt's word for it."""
    loads: tuple[str, ...]
    """Who loads it; nobody where it is refused."""
    refused: str
    needs: tuple[str, ...]
    """The statistics of activations without which it is not written."""
    shares: tuple[tuple[str, ...], ...]
    """Linears that get one scale."""
    alignment: str


def targets(row: Row) -> tuple[str, ...]:
    """Those that write it; of one that is refused, those that would."""
    known = (to for to in DIALECTS[row.dialect] if to in ENGINES)
    lacking = {to for to in known if not any(each.startswith(ENGINES[to]) for each in row.loads)}
    return tuple(to for to in DIALECTS[row.dialect] if to not in lacking)


_OF_LINEARS = re.compile(r"layers\.\{i\}\.(attn|ffn)\.(?!.*(norm|router|conv|shared_gate)).*\.weight")


def storable(column: Column) -> bool:
    """Whether the names of a family have places for quantized linears: their rows must stay whole there, and it is no
    encoder, whose norms stand where folding does not look for them."""
    if is_encoder(column):
        return False
    written: dict[str, Rule] = {}
    for rule in column.rules:
        for part in rule.parts:
            written.setdefault(part.replace("{every}", "{e}"), rule)
    return all(rule.layout.whole_rows for part, rule in written.items() if _OF_LINEARS.fullmatch(part))


def is_encoder(column: Column) -> bool:
    return any(dialect.fixed.get("causal") is False for dialect in column.dialects)


def rows() -> Iterator[Row]:
    for method, module in plugins.load_all(QUANTIZERS).items():
        for dialect in DIALECTS:
            yield _row(method, module, dialect)


def _row(method: str, module: ModuleType, dialect: str) -> Row:
    encoding: Encoding = module.encoding(None)
    loads = encoding.loads.get(dialect, ())
    return Row(
        method=method,
        dialect=dialect,
        algorithm=module.ALGORITHM,
        loads=loads,
        refused="" if loads else encoding.refused.get(dialect, "it has no words for it"),
        needs=module.NEEDS.get(dialect, ()),
        shares=module.SHARES.get(dialect, ()),
        alignment=alignment(encoding, dialect) if loads else "",
    )


def unit(encoding: Encoding, tp: int) -> int:
    """What the sizes of a linear must divide by in TensorRT-LLM's rank files, of the methods that it pads."""
    return max(LEAST_OF_TRTLLM, encoding.group or 0) * tp


def packed_rows(encoding: Encoding) -> int:
    """Rows that lie in one element of the weight."""
    return next(step for axis, step in encoding.fields[0].follows if axis == 0)


def alignment(encoding: Encoding, dialect: str) -> str:
    """In words."""
    if dialect == "trtllm" and encoding.method in PADDED_BY_TRTLLM:
        return f"inputs and rows by {unit(encoding, 1)} × tp"
    words = [f"inputs by {encoding.group}"] if encoding.group else []
    words += [f"rows by {packed_rows(encoding)}"] if packed_rows(encoding) > 1 else []
    return ", ".join(words) or "none"
