# SPDX-License-Identifier: Apache-2.0
"""Host side of FP8 linears, grouped or not, for few tokens: the weight is streamed once, row-major as it was loaded.

One block of 16 warps on each multiprocessor. The warps are teams of `split`; a team takes tiles of 16 weight rows one
after another, each of its warps a slice of the columns. A lane copies the 16-byte pieces that are its own fragments
into a ring of its own in shared memory (cp.async), so no thread waits for another before it multiplies. The tokens, in
FP8, lie in shared memory for all warps. At the end of a row tile the team adds its warps' sums in their order.

Per 128 columns the products of codes are added from zero, then multiplied by both scales, in fp32, columns ascending.
More than 8192 columns (4096 with more than 16 tokens) are multiplied in parts, one launch each, the later ones going on
from the sums of the earlier ones. Slices and their order depend on K alone, so a token's bits depend on nothing else.

Groups are the second dimension of the grid: a block belongs to one group, and reads that group's columns of the tokens.
"""

from __future__ import annotations

import torch

from megamoe.kernels.fp8.fp8_stream_config import BLOCK, TILE_ROWS, TOKENS_PER_TILE, WARPS, Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.store import kernel

TILE_COUNTS = (1, 2, 4)
EARLY_CHUNKS = 2  # copied before the tokens are asked for; a longer queue of weights would delay the tokens
PASS_TOKENS = TILE_COUNTS[-1] * TOKENS_PER_TILE
MAX_BLOCKS = {1: 64, 2: 64, 4: 32}  # blocks of columns whose tokens fit in shared memory, by token tiles


def slice_size(num_columns: int) -> int:
    """Return how many blocks of 128 columns a warp takes: at least two where there are so many, and a function of K."""
    blocks = num_columns // BLOCK
    in_part = -(-blocks // -(-blocks // MAX_BLOCKS[1]))
    warps = next(size for size in (16, 8, 4, 2, 1) if 2 * size <= in_part or size == 1)
    return -(-in_part // warps)


def column_parts(num_columns: int, num_tiles: int) -> list[tuple[int, int]]:
    """Return (first, last) of the parts that K columns are multiplied in: as few as possible, of whole slices."""
    size = slice_size(num_columns)
    slices = -(-num_columns // (BLOCK * size))
    count = -(-slices // min(WARPS, MAX_BLOCKS[num_tiles] // size))
    edges = [min(index * slices // count * size * BLOCK, num_columns) for index in range(count)] + [num_columns]
    return list(zip(edges[:-1], edges[1:], strict=True))


def stream_configs(num_columns: int, num_tokens: int, out: str, num_groups: int = 1) -> list[Config]:
    """Return the launches for up to 32 tokens; columns are those of one group."""
    num_tiles = next(count for count in TILE_COUNTS if num_tokens <= count * TOKENS_PER_TILE)
    size = slice_size(num_columns)
    return [
        Config(
            num_groups, num_columns, first, last, size, num_tiles, out if last == num_columns else "f32", EARLY_CHUNKS
        )
        for first, last in column_parts(num_columns, num_tiles)
    ]


def stream_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    out_dtype: torch.dtype,
    num_groups: int = 1,
) -> torch.Tensor:
    """Multiply by streaming the weight, once for every 32 tokens.

    Args:
        x: [T, G * K] uint8 codes; contiguous, as all of these, and 16-byte aligned.
        x_scales: [T, G * K/128] E8M0 or fp32.
        w: [G * N, K] uint8 codes, 16-byte aligned.
        w_scales: [G * ceil(N/128), K/128] E8M0 or fp32.
        out_dtype: bf16 or fp32.
        num_groups: G.

    Returns:
        [T, G * N].
    """
    (num_rows, num_columns), num_tokens = w.shape, x.shape[0]
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=w.device)
    sums = out
    if (
        out_dtype != torch.float32
        and len(stream_configs(num_columns, min(num_tokens, PASS_TOKENS), "f32", num_groups)) > 1
    ):
        sums = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=w.device)
    num_units = num_rows // num_groups // TILE_ROWS
    for first in range(0, num_tokens, PASS_TOKENS):
        tokens = slice(first, min(first + PASS_TOKENS, num_tokens))
        configs = stream_configs(num_columns, tokens.stop - first, DTYPE_NAMES[out_dtype], num_groups)
        scales = *scale_bytes(x_scales[tokens]), *scale_bytes(w_scales)
        for config in configs:
            blocks = min(max(1, num_multiprocessors(w.device) // num_groups), -(-num_units // config.teams))
            target = out if config is configs[-1] else sums
            earlier = (sums[tokens],) if config.adds else ()
            kernel(config, w.device)(x[tokens], w, *scales, *earlier, target[tokens], blocks)
    return out


def scale_bytes(scales: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return E8M0 or fp32 scales as bytes, and how many bytes one has."""
    return scales.view(torch.uint8), scales.element_size()
