"""Quantized rank files, for a reference that runs plain numbers.

The reference knows the names, shapes and layout of plain rank files, written down apart from the exporter's. So it is
shown the directory as it would be without quantization, headers over files that are holes, and what it finds at a place
there is replaced by the quantized weight that has this place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemoport.artifact import json_bytes
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Slot
from nemoport.exporters.dequantized import algorithms, all_dequantized
from nemoport.exporters.encoding import Encoded, Encoding, gather
from nemoport.exporters.formats import safetensors
from nemoport.exporters.quantize import KV_CACHES
from nemoport.exporters.quantized import with_kv_cache
from nemoport.exporters.targets.trtllm import DIALECT
from nemoport.exporters.tensor import Files, LazyTensor, MappedFile, Squeezed, Stored, Zeros, nbytes, squeeze
from nemoport.reference import rank_files

if TYPE_CHECKING:
    from nemoport.reference.ranks import RankedDecoder

Places = Mapping[tuple[str, int], LazyTensor]
"""By file and offset in the plain directory."""
CONFIG = "config.json"


def is_quantized(directory: Path) -> bool:
    return bool(_quantization(directory).get("quant_algo"))


def read(directory: Path, windows: Sequence[int] | None) -> rank_files.Ranked:
    """As the reference's own `read`, with quantized weights among the tensors."""
    encoding, config = _encoding(directory), json.loads((directory / CONFIG).read_bytes())
    places: dict[tuple[str, int], LazyTensor] = {}
    with TemporaryDirectory(prefix="nemoport-") as scratch:
        plain = Path(scratch)
        (plain / CONFIG).write_bytes(json_bytes(config | {"quantization": {"quant_algo": None}}))
        for path in sorted(directory.glob("rank*.safetensors")):
            found = gather(safetensors.read(Files(), path), encoding, DIALECT).tensors
            for offset, tensor in _holes(plain / path.name, found, config.get("dtype", "")):
                places[path.name, offset] = tensor
        ranked = rank_files.read(plain, windows)
    ranks = tuple({name: _placed(tensor, places) for name, tensor in local.items()} for local in ranked.ranks)
    return replace(ranked, ranks=ranks)


def load(ranked: rank_files.Ranked, *, keep: int, device: str) -> RankedDecoder:
    """The ranks as the reference runs them."""
    from nemoport.reference.ranks import RankedDecoder
    from nemoport.reference.weights import Weights

    each = keep // ranked.plan.world
    ranks = tuple(Weights(all_dequantized(local), device=device, keep=each) for local in ranked.ranks)
    return RankedDecoder(ranked.spec, ranked.plan, ranked.embedding_axis, ranks)


def _quantization(directory: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((directory / CONFIG).read_bytes()).get("quantization") or {}
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}  # the reader of the config says what is wrong


def _encoding(directory: Path) -> Encoding:
    said = _quantization(directory)
    known = algorithms()
    if (algorithm := said.get("quant_algo")) not in known:
        raise UnsupportedInput(f"{directory} is quantized by {algorithm}; {', '.join(known)} are run")
    if (cache := said.get("kv_cache_quant_algo")) not in (None, *KV_CACHES.values()):
        raise UnsupportedInput(f"{directory} has a KV cache of {cache}; {', '.join(KV_CACHES.values())} is known")
    if "lm_head" not in (said.get("exclude_modules") or ()):
        raise DamagedInput(f"{directory / CONFIG} does not exclude lm_head, which is not quantized; convert again")
    found: Encoding = known[algorithm].encoding(said.get("group_size"))
    if bool(said.get("pre_quant_scale")) != any(each.name == "pre_scale" for each in found.fields):
        raise DamagedInput(f"{directory / CONFIG} says pre_quant_scale {said.get('pre_quant_scale')}; convert again")
    return with_kv_cache(found, DIALECT) if cache else found


def _holes(path: Path, tensors: Mapping[str, LazyTensor], dtype: str) -> list[tuple[int, LazyTensor]]:
    """Write a rank file of plain tensors that takes no room; where each of them lies in it."""
    slots = [
        Slot(name, Zeros(tensor.shape, dtype if isinstance(tensor, Encoded) else tensor.dtype), ())
        for name, tensor in tensors.items()
    ]
    file = safetensors.file(path.name, slots)
    path.write_bytes(file.header)
    os.truncate(path, len(file.header) + sum(nbytes(slot.tensor) for slot in slots))
    return list(zip(file.offsets, tensors.values(), strict=True))


def _placed(tensor: LazyTensor, places: Places) -> LazyTensor:
    match tensor:
        case Stored(store=MappedFile(name=name)):
            return places[name, tensor.offset].cut(tensor.spans)
        case Squeezed():
            return squeeze(_placed(tensor.source, places))
        case _:
            raise UnsupportedInput(f"a {type(tensor).__name__} among the ranks' tensors is not run quantized")
