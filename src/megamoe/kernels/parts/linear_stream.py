# SPDX-License-Identifier: Apache-2.0
"""Host side of y = x w^T for few tokens, shared by the two NVFP4 linears: compile key, launches.

A matrix wider than 8192 columns is multiplied in parts of columns, one launch each, the later ones adding to the sums
of the earlier ones in fp32.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from megamoe.formats.fragment_layout import TILE_COLUMNS, CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.parts.weight_stream import MAX_COLUMNS, TOKENS_PER_TILE, StreamPlan
from megamoe.kernels.store import kernel

MAX_TILES = 2
PASS_TOKENS = MAX_TILES * TOKENS_PER_TILE
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: K.
        first_column, last_column: the part of the columns that this launch multiplies.
        num_tiles: token tiles of 8 in a pass.
        one_pass: there are at most 8 * num_tiles tokens.
        x: "bf16" or "nvfp4".
        out: "bf16" or "f32".
        overlaps: the launch may start, and load weights, while the kernel ahead of it is still running.
    """

    num_columns: int
    first_column: int
    last_column: int
    num_tiles: int
    one_pass: bool
    x: str
    out: str
    overlaps: bool = True

    @property
    def plan(self) -> StreamPlan:
        """How the product is shared out."""
        return StreamPlan(self.last_column - self.first_column, 1, self.num_tiles)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.plan.shared_bytes

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that one pass over the weight serves."""
        return self.num_tiles * TOKENS_PER_TILE

    @property
    def adds(self) -> bool:
        """Whether this part adds to the sums of parts before it."""
        return self.first_column > 0


def stream_limit(num_rows: int) -> int:
    """Return up to how many tokens a weight of N rows is streamed; more of them are multiplied in tiles.

    From the measured crossover (benchmarks/h100/linears.csv). Both paths have the operation's meaning, with sums in
    another order, so this number is where the last bits may change: a function of N alone.
    """
    if num_rows < 8192:
        return 4 * PASS_TOKENS
    return 2 * PASS_TOKENS if num_rows <= 16384 else PASS_TOKENS


def stream_keys(num_rows: int, num_columns: int, x: str, out: str) -> list[Config]:
    """Return the compile keys of every number of tokens that is streamed."""
    counts = sorted({TOKENS_PER_TILE, PASS_TOKENS, stream_limit(num_rows)})
    return [config for count in counts for config in stream_configs(num_columns, count, x, out)]


def column_parts(num_columns: int) -> list[tuple[int, int]]:
    """Return (first, last) of the parts that K columns are multiplied in: as few as possible, of nearly equal size."""
    chunks = num_columns // TILE_COLUMNS
    count = -(-num_columns // MAX_COLUMNS)
    edges = [index * chunks // count * TILE_COLUMNS for index in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def stream_configs(num_columns: int, num_tokens: int, x: str, out: str) -> list[Config]:
    """Return the launches for that many tokens."""
    num_tiles = min(MAX_TILES, max(1, -(-num_tokens // TOKENS_PER_TILE)))
    parts = column_parts(num_columns)
    return [
        Config(
            num_columns,
            first,
            last,
            num_tiles,
            num_tokens <= num_tiles * TOKENS_PER_TILE,
            x,
            out if last == num_columns else "f32",
        )
        for first, last in parts
    ]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many blocks of a persistent kernel run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def require_fragments(op: str, *weights: NvFp4Tensor) -> None:
    """Refuse weights that are not in fragment order."""
    for weight in weights:
        if weight.code_layout is not CodeLayout.FRAGMENT_16X64:
            raise ValueError(
                f"{op}: the kernel takes weights in fragment order; got {weight.code_layout.value} codes. Convert them "
                "once, when loading: w.fragments()."
            )


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous and 16-byte aligned: itself, or a copy where it is not."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def stream_linear(x: tuple[torch.Tensor, ...], x_name: str, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply by streaming the weight.

    Args:
        x: (bf16 [T, K],), or codes [T, K/2], scales [T, K/16] as bytes and tensor scale [T]; all contiguous.
        x_name: "bf16" or "nvfp4".
        w: [N, K] in fragment order.
        out_dtype: bf16 or fp32.
    """
    num_rows, num_columns = w.shape
    num_tokens = x[0].shape[0]
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=w.device)
    if out.numel() == 0:
        return out
    configs = stream_configs(num_columns, num_tokens, x_name, DTYPE_NAMES[out_dtype])
    sums = out
    if len(configs) > 1 and out_dtype != torch.float32:
        sums = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=w.device)
    weight = (w.codes, w.scales.view(torch.uint8), w.tensor_scale.view(1))
    num_units = configs[0].plan.num_units(num_rows // 16) * -(-num_tokens // configs[0].tokens_per_pass)
    blocks = min(num_multiprocessors(w.device), num_units)
    for config in configs:
        target = out if config is configs[-1] else sums
        earlier = (sums,) if config.adds else ()
        kernel(__name__, config, w.device)(*x, *weight, *earlier, target, blocks)
    return out
