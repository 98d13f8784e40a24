# SPDX-License-Identifier: Apache-2.0
"""round_index_query: every index head read once, rotated twice and rounded to MXFP4 in registers.

Meaning    ops/round_index_query.py; this file only makes it fast
Grid       a warp takes 16 heads of a token after the other, and loads the next ones before it works on these; as many
           blocks of warps as fit the device at once. A lane makes the sine and cosine of one pair
Matrix     the Hadamard rotation is a product with signs on the matrix unit. Channels are dealt to the instruction's
           rows and columns so that a lane ends up with the 32 values of an MXFP4 block, and so that only a quarter of
           the 128 x 128 signs is multiplied: the other factor of four is butterflies in registers
Rounding   codes by bf16 arithmetic, two at a time; every step of it is exact but the one that rounds
Memory     16-byte loads of heads, 16-byte stores of codes
Limits     bf16 heads of 128 channels, of which 32 or 64 rotate; INDEX_FP4 keys after the Hadamard rotation: what the
           quantized recipes ask for. Positions up to 2^20. It cannot raise for NaN and infinity without waiting for the
           device: the scale bytes of such a head become 255 (NaN), which dequantize refuses
Bound      memory: 256 + 64 + 4 + 8 bytes a head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.mxfp4 import BLOCK, MxFp4Tensor
from megamoe.kernels.parts.launch import as_heads, as_vector, num_multiprocessors
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.rows.round_index_query_config import TILE, WIDTH, Config
from megamoe.kernels.store import kernel

ROPE_DIMS = (32, 64)
FEW_WARPS, MANY_WARPS = 4, 8  # of a block: small ones reach more multiprocessors, large ones work on more at once
RESIDENT = 2
"""Blocks that a multiprocessor holds at once: each goes on to further heads, which it loads ahead."""


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    for warps in (FEW_WARPS, MANY_WARPS):
        yield Config(dims["Hi"], dims["R"], warps)


def run(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    key_format: RowFormat,
    hadamard: bool,
    head_scale: float,
) -> tuple[MxFp4Tensor, torch.Tensor]:
    """Compute round_index_query."""
    num_tokens, num_heads, width = q.shape
    if (q.dtype, width, key_format, hadamard) != (torch.bfloat16, WIDTH, RowFormat.INDEX_FP4, True):
        raise NotImplementedError(
            f"round_index_query: the kernel takes bf16 heads of {WIDTH} channels for INDEX_FP4 keys after a Hadamard "
            f"rotation; got {q.dtype} {list(q.shape)}, {key_format.name}, hadamard={hadamard}. Choose a quantized "
            'recipe, or run the reference: with megamoe.ops.use("reference").'
        )
    if table.rope_dim not in ROPE_DIMS:
        raise NotImplementedError(
            f"round_index_query: the kernel rotates {' or '.join(map(str, ROPE_DIMS))} channels; got {table.rope_dim}. "
            'Run the reference: with megamoe.ops.use("reference").'
        )
    num_rows, device = num_tokens * num_heads, q.device
    codes = torch.empty((num_tokens, num_heads, width // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((num_tokens, num_heads, width // BLOCK), dtype=torch.uint8, device=device)
    weights = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=device)
    if num_rows:
        multiprocessors = num_multiprocessors(device)
        num_units = num_tokens * -(-num_heads // TILE)
        warps = FEW_WARPS if num_units <= FEW_WARPS * multiprocessors else MANY_WARPS
        kernel(Config(num_heads, table.rope_dim, warps), device)(
            as_heads(q),
            head_weights if head_weights.stride(-1) == 1 else head_weights.contiguous(),
            pos.contiguous(),
            as_vector(table.inv_freq),
            codes.view(torch.int32).view(num_rows, width // 8),
            scales.view(num_rows, width // BLOCK),
            weights,
            min(-(-num_units // warps), RESIDENT * multiprocessors),
            head_scale,
        )
    return MxFp4Tensor(codes, scales.view(torch.float8_e8m0fnu)), weights
