"""What each exponent of AWQ's search costs: the mean squared error of a linear's output.

With D the error of the weight and X the inputs, |X D'|^2 is the trace of D (X' X) D': the inputs need not be kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nemoport.exporters.computed import single
from nemoport.exporters.dtypes import real
from nemoport.exporters.quantizers import int4_awq
from nemoport.exporters.quantizing import rounded
from nemoport.exporters.smoothing import mean_share
from nemoport.exporters.statistics import Array
from nemoport.exporters.tensor import LazyTensor, cut, read

_ROWS = 1024


@np.errstate(invalid="ignore")  # a weight that is not finite is refused where it is rounded, by name
def losses(weight: LazyTensor, mean: Array, gram: Tensor) -> Array:
    """float32, one for each of `int4_awq.EXPONENTS`; `gram` is x' x over all tokens, [in, in], by their number."""
    rows, inputs = weight.shape
    if inputs % int4_awq.GROUP:
        return np.zeros(len(int4_awq.EXPONENTS), np.float32)  # such a linear is refused or left plain
    kind, share = real(weight.dtype), mean_share(weight, int4_awq.GROUP)
    total = np.zeros(len(int4_awq.EXPONENTS))
    stretches = [int4_awq.stretch(mean, share, exponent) for exponent in int4_awq.EXPONENTS]
    for start in range(0, rows, _ROWS):
        numbers = single(read(cut(weight, 0, start, min(start + _ROWS, rows))))
        for index, stretch in enumerate(stretches):
            stretched = rounded(numbers * rounded(stretch, kind), kind)
            back = rounded(int4_awq.rounded_numbers(stretched), kind) * rounded(np.float32(1) / stretch, kind)
            error = torch.from_numpy(numbers - back).to(gram.device)
            total[index] += float(((error @ gram) * error).sum(dtype=torch.float64))
    return (total / rows).astype(np.float32)
