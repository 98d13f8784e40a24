# SPDX-License-Identifier: Apache-2.0
"""How far a rounded weight is from its source: relative L2, cosine, largest error, and a histogram of errors.

Sums are taken in fp64 over rows in order, so they are the same numbers on every run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor

# |error| over the root mean square of the source, in half octaves: bin i holds [2^(i/2 - 12), 2^((i+1)/2 - 12)).
HISTOGRAM_LOWEST = -12
HISTOGRAM_BINS = 28
_VALUES = 1 << 20


def measure(source: torch.Tensor, made: torch.Tensor | NvFp4Tensor) -> dict[str, Any]:
    """Compare a weight with its source.

    Args:
        source: [N, K] fp32, bf16 or fp16.
        made: [N, K] values, or NVFP4.

    Returns:
        relative_l2, cosine, max_error, amax (of the source), zero_errors (values that are equal), and histogram (counts
        of the others, the ends hold what lies beyond). Of a source of zeros, relative_l2 is 0 if all errors are, else
        null, and cosine is 1 or null likewise.
    """
    num_rows, num_columns = source.shape
    rows = max(1, _VALUES // max(num_columns, 1))
    squared = 0.0
    for start in range(0, num_rows, rows):
        squared += float(source[start : start + rows].double().square().sum())
    rms = math.sqrt(squared / max(source.numel(), 1))
    error = made_squared = product = max_error = amax = 0.0
    histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
    num_equal = 0
    for start in range(0, num_rows, rows):
        part = slice(start, start + rows)
        left = source[part].float()
        if isinstance(made, NvFp4Tensor):
            right = nvfp4.dequantize(NvFp4Tensor(made.codes[part], made.scales[part], made.tensor_scale))
        else:
            right = made[part].float()
        difference = (right - left).abs_()
        error += float(difference.double().square().sum())
        made_squared += float(right.double().square().sum())
        product += float((left.double() * right.double()).sum())
        max_error = max(max_error, float(difference.amax()))
        amax = max(amax, float(left.abs().amax()))
        unequal = difference[difference > 0]
        num_equal += difference.numel() - unequal.numel()
        if rms > 0:
            bins = ((unequal / rms).log2_().sub_(HISTOGRAM_LOWEST).mul_(2)).floor_().clamp_(0, HISTOGRAM_BINS - 1)
            histogram += torch.bincount(bins.to(torch.int64), minlength=HISTOGRAM_BINS)
    norms = math.sqrt(squared) * math.sqrt(made_squared)
    equal = error == 0.0
    return {
        "relative_l2": math.sqrt(error / squared) if squared else (0.0 if equal else None),
        "cosine": min(product / norms, 1.0) if norms else (1.0 if equal else None),
        "max_error": max_error,
        "amax": amax,
        "zero_errors": num_equal,
        "histogram": histogram.tolist(),
    }
