# SPDX-License-Identifier: Apache-2.0
"""Host side of fp8_linear for few tokens: the weight is streamed once, row-major as it was loaded.

One block of 16 warps on each multiprocessor. The warps are teams of `split`; a team takes tiles of 16 weight rows one
after another, each of its warps a slice of the columns. A lane copies the 16-byte pieces that are its own fragments
into a ring of its own in shared memory (cp.async), so no thread waits for another before it multiplies. The tokens, in
FP8, lie in shared memory for all warps. At the end of a row tile the team adds its warps' sums in their order.

Per 128 columns the products of codes are added from zero, then multiplied by both scales, in fp32, columns ascending.
More than 8192 columns (4096 with more than 16 tokens) are multiplied in parts, one launch each, the later ones going on
from the sums of the earlier ones. Slices and their order depend on K alone, so a token's bits depend on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from megamoe.kernels.store import kernel

BLOCK = 128
CHUNK = 64  # columns of a ring slot: 16 rows of them are 1024 bytes
WARPS = 16
THREADS = WARPS * 32
TILE_ROWS = 16
TOKENS_PER_TILE = 8
TILE_COUNTS = (1, 2, 4)
PASS_TOKENS = TILE_COUNTS[-1] * TOKENS_PER_TILE
MAX_BLOCKS = {1: 64, 2: 64, 4: 32}  # blocks of columns whose tokens fit in shared memory, by token tiles
MAX_DEPTH = 8
EARLY_CHUNKS = 2  # copied before the tokens are asked for; a longer queue of weights would delay the tokens
SHARED_BYTES = 226 * 1024
SLOT_BYTES = TILE_ROWS * CHUNK
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: K.
        first_column, last_column: the part of the columns that this launch multiplies.
        slice_blocks: blocks of 128 columns of a warp; the last warp may have fewer.
        num_tiles: token tiles of 8.
        out: "bf16" or "f32".
        early: ring slots that are filled before the kernel ahead of this one has finished.
    """

    num_columns: int
    first_column: int
    last_column: int
    slice_blocks: int
    num_tiles: int
    out: str
    early: int = EARLY_CHUNKS

    @property
    def adds(self) -> bool:
        """Whether this part adds to the sums of parts before it."""
        return self.first_column > 0

    @property
    def num_blocks(self) -> int:
        """Blocks of 128 columns."""
        return (self.last_column - self.first_column) // BLOCK

    @property
    def slices(self) -> int:
        """Slices of this part."""
        return -(-self.num_blocks // self.slice_blocks)

    @property
    def split(self) -> int:
        """Warps of a team: a power of two, so that teams fill a block; those without a slice only help to add."""
        return next(size for size in (1, 2, 4, 8, 16) if size >= self.slices)

    @property
    def teams(self) -> int:
        """Teams of a thread block."""
        return WARPS // self.split

    # Shared memory, in this order: partial sums, token scales, tokens, rings.

    @property
    def partial_bytes(self) -> int:
        """Shared memory for the partial sums of one row tile of every team."""
        return THREADS * self.num_tiles * 16 if self.split > 1 else 0

    @property
    def scale_bytes(self) -> int:
        """Shared memory for token scales in fp32: [blocks, tokens]."""
        return self.num_blocks * self.num_tiles * TOKENS_PER_TILE * 4

    @property
    def token_bytes(self) -> int:
        """Shared memory for the codes of the tokens."""
        return self.num_blocks * BLOCK * self.num_tiles * TOKENS_PER_TILE

    def _depth(self, buffers: int) -> int:
        left = SHARED_BYTES - buffers * self.partial_bytes - self.scale_bytes - self.token_bytes
        return min(MAX_DEPTH, left // (WARPS * SLOT_BYTES))

    @property
    def partial_buffers(self) -> int:
        """Two, so that warps go on while others add, unless the rings would suffer."""
        return 2 if self._depth(2) >= min(4, self._depth(1)) else 1

    @property
    def depth(self) -> int:
        """Slots of a ring."""
        return self._depth(self.partial_buffers)

    @property
    def scale_offset(self) -> int:
        """Where token scales start."""
        return self.partial_buffers * self.partial_bytes

    @property
    def token_offset(self) -> int:
        """Where tokens start."""
        return self.scale_offset + self.scale_bytes

    @property
    def ring_offset(self) -> int:
        """Where the rings start."""
        return self.token_offset + self.token_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.ring_offset + WARPS * self.depth * SLOT_BYTES


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


def stream_configs(num_columns: int, num_tokens: int, out: str) -> list[Config]:
    """Return the launches for up to 32 tokens."""
    num_tiles = next(count for count in TILE_COUNTS if num_tokens <= count * TOKENS_PER_TILE)
    size = slice_size(num_columns)
    return [
        Config(num_columns, first, last, size, num_tiles, out if last == num_columns else "f32")
        for first, last in column_parts(num_columns, num_tiles)
    ]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many blocks of a persistent kernel run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream_linear(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply by streaming the weight, once for every 32 tokens.

    Args:
        x: [T, K] uint8 codes; contiguous, as all of these, and 16-byte aligned.
        x_scales: [T, K/128] E8M0 or fp32.
        w: [N, K] uint8 codes, 16-byte aligned.
        w_scales: [ceil(N/128), K/128] E8M0 or fp32.
        out_dtype: bf16 or fp32.
    """
    (num_rows, num_columns), num_tokens = w.shape, x.shape[0]
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=w.device)
    sums = out
    if out_dtype != torch.float32 and len(stream_configs(num_columns, min(num_tokens, PASS_TOKENS), "f32")) > 1:
        sums = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=w.device)
    num_units = num_rows // TILE_ROWS
    for first in range(0, num_tokens, PASS_TOKENS):
        tokens = slice(first, min(first + PASS_TOKENS, num_tokens))
        configs = stream_configs(num_columns, tokens.stop - first, DTYPE_NAMES[out_dtype])
        scales = *scale_bytes(x_scales[tokens]), *scale_bytes(w_scales)
        for config in configs:
            blocks = min(num_multiprocessors(w.device), -(-num_units // config.teams))
            target = out if config is configs[-1] else sums
            earlier = (sums[tokens],) if config.adds else ()
            kernel(__name__, config, w.device)(x[tokens], w, *scales, *earlier, target[tokens], blocks)
    return out


def scale_bytes(scales: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return E8M0 or fp32 scales as bytes, and how many bytes one has."""
    return scales.view(torch.uint8), scales.element_size()
