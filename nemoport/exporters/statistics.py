"""Statistics of a model's activations: what calibration leaves and quantizers take, and the file that keeps it.

    amax     [in]    the largest magnitude of each channel of a linear's input
    mean     [in]    the mean magnitude of each
    losses   [11]    the mean squared error of the output at each exponent of AWQ's search; where it was asked for
    keys, values []  the largest magnitude of what goes into the cache, of an attention

Linears of a group read the same, so `amax` and `mean` stand under the first of them. `calibration.npz` holds an array
for each under `layers.0.attn.q/amax`, in float32, and under `said` what it was made of.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

FILE = "calibration.npz"
_SAID = "said"
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Statistics:
    arrays: Mapping[str, Array]
    """`layers.0.attn.q/amax` -> float32."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """How many tokens, a digest of them, what computed."""

    def of(self, name: str, what: str) -> Array:
        if (found := self.arrays.get(f"{name}/{what}")) is None:
            raise UnsupportedInput(f"the statistics have no {what} of {name}; calibrate anew with --calib FILE")
        if not np.isfinite(found).all():
            raise DamagedInput(
                f"among the {what} of {name} is one that is not finite, so the model computed no number there; look "
                "for NaN in the embedding, in norms and in what comes before, then calibrate anew"
            )
        return found


def to_bytes(statistics: Statistics) -> bytes:
    """The same statistics, the same bytes."""
    said = np.frombuffer(json.dumps(statistics.said, sort_keys=True).encode(), np.uint8)
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in sorted({**statistics.arrays, _SAID: said}.items()):
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
        return buffer.getvalue()


def read(path: Path) -> tuple[Statistics, str]:
    """The statistics in a file, or in the artifact that it lies in, and their digest."""
    place = path / FILE if path.is_dir() else path
    if not place.is_file():
        raise UsageError(f"{place} does not exist; give a {FILE} that a quantizing convert wrote")
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        said = json.loads(arrays.pop(_SAID).tobytes()) if _SAID in arrays else {}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DamagedInput(f"{place} is no file of statistics ({error}); give the {FILE} of an artifact") from error
    if odd := [name for name, array in arrays.items() if array.dtype != np.float32 or "/" not in name]:
        raise DamagedInput(f"{place} is no file of statistics: it holds {odd[0]}; give token ids with --calib")
    return Statistics(arrays, said), blake3(place.read_bytes()).hexdigest()
