# SPDX-License-Identifier: Apache-2.0
"""round_index_query: rotate the index queries, round them as the index keys are rounded, and scale the head weights.

Math       r = rope(q[t, h, :], pos[t]), then hadamard(r) where asked
           y = quantize_mxfp4(r), quantize_fp8_rows(r, group=K) or r itself, by the format of the keys
           w[t, h] = head_weights[t, h] * head_scale
Numerics   those of ops/rope.py, ops/hadamard.py and ops/quantize.py: rounded to the dtype of q after the rotation and
           after the Hadamard rotation. Bit for bit their composition; the product of the weights is one fp32 product.
           Row-invariant.
Tolerance  verify/tolerance.py, "round_index_query"
Kernels    one pass for INDEX_FP4 keys after the Hadamard rotation, which runs on the matrix unit; others: none
Source     DeepSeek-V4 inference code, lightning indexer; docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.ops import hadamard as hadamard_op
from megamoe.ops import quantize, rope
from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.rope import RopeTable

IndexQuery = torch.Tensor | MxFp4Tensor | Fp8RowTensor

KEY_FORMATS = (RowFormat.INDEX_FP4, RowFormat.INDEX_FP8, RowFormat.BF16, RowFormat.FP32)


def round_index_query(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    *,
    key_format: RowFormat,
    hadamard: bool,
    head_scale: float,
) -> tuple[IndexQuery, torch.Tensor]:
    """Make of projected index queries and head weights what index_topk takes.

    Args:
        q: [T, Hi, K] bf16 or fp32; tokens may lie at any stride, as the columns of a stacked linear do. T may be 0.
        head_weights: [T, Hi] fp32, at any stride.
        pos: [T] int64, absolute positions; -1 for a token that is nobody's, whose rows are anything finite.
        table: frequencies; R must not exceed K.
        key_format: how the index keys are stored: INDEX_FP4 (K a multiple of 32), INDEX_FP8, or BF16 or FP32, for
            which the query is not rounded further.
        hadamard: rotate by the Hadamard matrix before rounding, as the keys were; K a power of two.
        head_scale: multiplies the head weights.

    Returns:
        The query [T, Hi, K] (MXFP4, FP8 rows with one scale per head, or the dtype of q), and [T, Hi] fp32; newly
        allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, key_format is not one of these, or (on the CPU) a value is not finite.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "round_index_query",
        q=(q, "T Hi K", FLOATS),
        head_weights=(head_weights, "T Hi", FLOAT32),
        pos=(pos, "T", INT64),
        table=(table.inv_freq, "P"),
        key_format=(key_format, KEY_FORMATS),
    )
    width = dims["K"]
    if width < table.rope_dim or (hadamard and (width < 1 or width & (width - 1))):
        raise ValueError(
            f"round_index_query: q must have at least the {table.rope_dim} channels of the table"
            f"{', and a power of two of them for the Hadamard rotation' if hadamard else ''}; got {list(q.shape)}. "
            "Pass the table of this layer and whole index heads."
        )
    if key_format is RowFormat.INDEX_FP4 and width % 32:
        raise ValueError(
            f"round_index_query: INDEX_FP4 needs a multiple of 32 channels; got {list(q.shape)}. Use INDEX_FP8 keys."
        )
    run = pick("round_index_query", q.device, reference)
    return run(q, head_weights, pos, table, key_format, hadamard, head_scale)  # type: ignore[no-any-return]


def reference(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    key_format: RowFormat,
    hadamard: bool,
    head_scale: float,
) -> tuple[IndexQuery, torch.Tensor]:
    """Compute round_index_query in plain torch."""
    rotated = rope.reference(q, pos, table, False)
    if hadamard:
        rotated = hadamard_op.reference(rotated, rotated.dtype)
    weights = (head_weights * head_scale).contiguous()
    if key_format is RowFormat.INDEX_FP4:
        return quantize.reference_mxfp4(rotated), weights
    if key_format is RowFormat.INDEX_FP8:
        return quantize.reference_fp8_rows(rotated, rotated.shape[-1]), weights
    return rotated, weights
