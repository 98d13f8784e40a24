# SPDX-License-Identifier: Apache-2.0
"""embed_streams: the rows of a table that some ids name, repeated into every residual stream.

Math       y[t, j, :] = table[token_ids[t], :]          for every stream j; zeros where token_ids[t] is -1
Numerics   one rounding to out_dtype, or none where the table has it; nothing is added. Row-invariant.
           An id of -1 is a token that is nobody's: a step padded to its bucket has such rows.
Tolerance  verify/tolerance.py, "embed_streams": exact
Kernels    a row read once and stored to every stream; an id outside the table gives zeros there
Source     DeepSeek-V4 reference code: the embedding is repeated hc_mult times
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.dispatch import pick


def embed_streams(
    table: torch.Tensor, token_ids: torch.Tensor, *, num_streams: int, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Look up ids and set up the streams.

    Args:
        table: [V, D] bf16 or fp32.
        token_ids: [T] int64, 0 to V - 1; -1 for a row of zeros. T may be 0.
        num_streams: X, at least 1.
        out_dtype: bf16 or fp32; None for the dtype of the table.

    Returns:
        [T, X, D] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, num_streams is below 1, or (on the CPU) an id is outside the table.
        NotImplementedError: the device has no kernel for this operation.
    """
    out_dtype = table.dtype if out_dtype is None else out_dtype
    check(
        "embed_streams",
        table=(table, "V D", FLOATS),
        token_ids=(token_ids, "T", INT64),
        out_dtype=(out_dtype, FLOATS),
    )
    if num_streams < 1:
        raise ValueError(f"embed_streams: num_streams must be at least 1; got {num_streams}. Pass hc_mult.")
    streams: torch.Tensor = pick("embed_streams", token_ids.device, reference)(table, token_ids, num_streams, out_dtype)
    return streams


def reference(table: torch.Tensor, token_ids: torch.Tensor, num_streams: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute embed_streams in plain torch."""
    num_ids = table.shape[0]
    bad = (token_ids < -1) | (token_ids >= num_ids)
    if bool(bad.any()):
        raise ValueError(
            f"embed_streams: token_ids must be 0 to {num_ids - 1}, the rows of the table, or -1 for nobody; got "
            f"{int(token_ids[bad][0])}. Check the vocabulary."
        )
    rows = table[token_ids.clamp(min=0)] if num_ids else table.new_zeros(token_ids.shape[0], table.shape[1])
    rows = rows.to(out_dtype).masked_fill_((token_ids < 0)[:, None], 0.0)  # [T, D]
    return rows[:, None, :].repeat(1, num_streams, 1)
