# SPDX-License-Identifier: Apache-2.0
"""Division by a number that gives the same bits on every device.

torch multiplies a CUDA tensor by the reciprocal of a Python number, and of a scalar that lies on the CPU: 1 / 2688 is
rounded, the product is rounded again, and one quotient in four or five differs in its last bit from the one that the
CPU gives. A tensor on the same device is divided by.
"""

import functools

import torch
from torch import Tensor


def divide(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor, rounded once.

    The divisor is made on the device by a fill: nothing is copied from the host and nothing waits, so that a captured
    step may divide.

    Args:
        x: [...] of a floating-point dtype.
        divisor: a number that the dtype of x holds exactly.

    Returns:
        [...] the dtype of x, newly allocated.
    """
    if x.device.type == "cpu" and type(x) is Tensor:
        return x / _on_cpu(divisor, x.dtype)
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


@functools.cache
def _on_cpu(divisor: float, dtype: torch.dtype) -> Tensor:
    """Return a divisor that is made once: forty quotients a token would each take 5 us to fill their own."""
    with torch.inference_mode(False):
        return torch.full((), divisor, dtype=dtype)
