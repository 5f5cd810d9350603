"""What a conversion says of itself: the ledger, a row for every tensor that was read and written, and the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemoport.artifact import Artifact, File
from nemoport.exporters.checkpoint import TensorFile
from nemoport.exporters.job import Job, hashed, transform
from nemoport.exporters.tensor import nbytes


def rows(
    job: Job, digests: Mapping[tuple[str, str], str], seals: Mapping[str, Mapping[int, bytes]]
) -> Iterator[dict[str, Any]]:
    """One row for each source tensor, each skipped thing, each header and tensor written, and what seals them."""
    sources = job.model.sources if job.output.files else {}
    checkpoint, used = job.model.checkpoint, {name for names in sources.values() for name in names}
    for name, tensor in checkpoint.tensors.items():
        if name in used:
            yield {"source": name, "dtype": tensor.dtype, "shape": tensor.shape, "fate": "used"}
    for name, rule in checkpoint.skipped.items():
        yield {"source": name, "fate": "skipped", "rule": rule}
    for file in job.output.files:
        plain = {**({0: file.header} if file.header else {}), **seals[file.path]}
        held = [_plain(file, offset, content) for offset, content in plain.items()]
        held += [
            {
                "target": slot.name,
                "file": file.path,
                "dtype": slot.tensor.dtype,
                "shape": slot.tensor.shape,
                "offset": offset,
                "bytes": nbytes(slot.tensor),
                "blake3": digests[file.path, slot.name],
                "parts": slot.parts,
                "sources": sorted({name for part in slot.parts for name in job.model.sources[part]}),
                "transform": transform(job.model, slot),
            }
            for slot, offset in zip(file.slots, file.offsets, strict=True)
        ]
        yield from sorted(held, key=lambda row: row["offset"])


def _plain(file: TensorFile, offset: int, content: bytes) -> dict[str, Any]:
    return {"file": file.path, "offset": offset, "bytes": len(content), "blake3": hashed(content)}


def artifact(job: Job, files: tuple[File, ...]) -> Artifact:
    checkpoint = job.model.checkpoint
    return Artifact(
        kind=job.kind,
        spec=job.model.spec,
        plan=job.plan,
        dtype=job.output.dtype,
        files=files,
        loads=job.output.loads,
        signature=job.output.signature,
        stages=job.output.stages,
        source={
            "format": checkpoint.format,
            "writer": checkpoint.writer,
            "tensors": len(checkpoint.tensors),
            "skipped": len(checkpoint.skipped),
            "trained": dict(checkpoint.trained),
            **({"adapter": job.model.adapter} if job.model.adapter else {}),
            **_source_quantization(job),
        },
    )


def _source_quantization(job: Job) -> dict[str, Any]:
    """What the source said of a quantization of its own, kept or undone."""
    if job.model.undone:
        return {"quantization": {**job.model.undone, "undone": True}}
    if job.model.quantized and job.plan.recipe is None:
        return {"quantization": job.model.quantized.said}
    return {}
