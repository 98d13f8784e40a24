# SPDX-License-Identifier: Apache-2.0
"""rotate_queries: norm every head of the queries and rotate it by the token's position.

Math       y[t, h, :] = rope(rms_norm(q[t, h, :]), pos[t])          the norm has no weight
Numerics   those of ops/rms_norm.py and ops/rope.py: the normed head is rounded to the dtype of q, then rotated and
           rounded again. Bit for bit their composition. Row-invariant.
Tolerance  verify/tolerance.py, "rotate_queries"
Kernels    one pass: a head stays in registers between norm and rotation; two heads share their angles
Source     DeepSeek-V4 reference code; ops/rms_norm.py, ops/rope.py
"""

from __future__ import annotations

import torch

from megamoe.ops import rms_norm, rope
from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.rope import RopeTable


def rotate_queries(q: torch.Tensor, pos: torch.Tensor, table: RopeTable, *, eps: float = 1e-6) -> torch.Tensor:
    """Norm and rotate queries.

    Args:
        q: [T, H, C] bf16 or fp32; tokens may lie at any stride, as a part of the columns of a stacked linear does.
            T may be 0.
        pos: [T] int64, absolute positions; -1 for a token that is nobody's, whose row is anything.
        table: frequencies; R must not exceed C.
        eps: added to the mean of squares.

    Returns:
        [T, H, C] in the dtype of q, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check("rotate_queries", q=(q, "T H C", FLOATS), pos=(pos, "T", INT64), table=(table.inv_freq, "P"))
    if dims["C"] < table.rope_dim:
        raise ValueError(
            f"rotate_queries: q must have at least the {table.rope_dim} channels of the table; got {list(q.shape)}. "
            "Pass the table of this layer."
        )
    y: torch.Tensor = pick("rotate_queries", q.device, reference)(q, pos, table, eps)
    return y


def reference(q: torch.Tensor, pos: torch.Tensor, table: RopeTable, eps: float) -> torch.Tensor:
    """Compute rotate_queries in plain torch."""
    return rope.reference(rms_norm.reference(q, None, eps, q.dtype), pos, table, False)
