# SPDX-License-Identifier: Apache-2.0
"""fp8_linear: E4M3 codes are exact in fp16, fp16 tensor cores add their products in fp32, 128 at a time.

Meaning    ops/fp8_linear.py; this file only makes it fast
Few tokens the weight streams once, row-major, tokens in shared memory (fp8/fp8_stream.py)
Many       Hopper alone: tokens are expanded to fp16 (fp8_expand.py), then tiles on wgmma (fp8_tiles_sm90.py)
Choice     by N and T alone: stream_limit. The two paths add in different orders
Scales     E8M0 or fp32, on either side; both multiply sums of 128 products in fp32
Limits     groups of 128 in x; N a multiple of 16 and K of 128; codes of w contiguous and 16-byte aligned, as loaded
Bound      few tokens: the weight's bytes, one a value; many: the tensor cores at their fp16 rate
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.fp8 import BLOCK, Fp8BlockTensor, Fp8RowTensor
from megamoe.kernels.fp8 import fp8_expand_config, fp8_tiles_sm90, fp8_tiles_sm90_config
from megamoe.kernels.fp8.fp8_stream import PASS_TOKENS, TILE_COUNTS, stream_configs, stream_linear
from megamoe.kernels.fp8.fp8_stream_config import TILE_ROWS, TOKENS_PER_TILE
from megamoe.kernels.fp8.fp8_tiles_sm90 import tile_linear
from megamoe.kernels.parts.launch import aligned, require_more

OP = "fp8_linear"


def stream_limit(num_rows: int) -> int:
    """Return up to how many tokens a weight of N rows is streamed; more of them are multiplied in tiles."""
    return 2 * PASS_TOKENS if num_rows < 4096 else PASS_TOKENS


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    for count in TILE_COUNTS:
        yield from stream_configs(dims["K"], count * TOKENS_PER_TILE, "bf16")
    yield from tile_keys()


def tile_keys() -> Iterator[Any]:
    """Yield what many tokens need, of any size."""
    for folded in (True, False):
        yield fp8_expand_config.Config(folded)
        for rows, tokens in fp8_tiles_sm90.TILE_TIMES:
            if folded or rows == fp8_tiles_sm90_config.GROUP_ROWS:
                yield fp8_tiles_sm90_config.Config(rows, tokens, folded, "bf16")


def run(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute fp8_linear."""
    codes = require_weight(OP, x, w)
    num_rows = w.shape[0]
    if x.shape[0] == 0 or num_rows == 0:
        return torch.empty(x.shape[0], num_rows, dtype=out_dtype, device=w.device)
    arguments = aligned(x.codes.view(torch.uint8)), x.scales.contiguous(), codes, w.scales.contiguous(), out_dtype
    limit = stream_limit(num_rows)
    if x.shape[0] <= limit:
        return stream_linear(*arguments)
    require_more(OP, x.shape[0], limit, w.device)
    return tile_linear(*arguments)


def require_weight(op: str, x: Fp8RowTensor, w: Fp8BlockTensor) -> torch.Tensor:
    """Return the bytes of a weight; refuse operands that the kernels do not take.

    Raises:
        NotImplementedError: what, named.
    """
    num_rows, num_columns = w.shape[-2:]
    if x.group != BLOCK:
        raise NotImplementedError(
            f"{op}: the kernel takes activations with a scale per {BLOCK}; got {x.group}. Quantize them with "
            "quantize_fp8_rows as it is."
        )
    if num_rows % TILE_ROWS or num_columns % BLOCK:
        raise NotImplementedError(
            f"{op}: the kernel takes N a multiple of {TILE_ROWS} and K of {BLOCK}; got {[num_rows, num_columns]}. Run "
            'the reference: with megamoe.ops.use("reference").'
        )
    codes = w.codes.view(torch.uint8)
    if not codes.is_contiguous() or codes.data_ptr() % 16:
        raise NotImplementedError(
            f"{op}: the kernel takes weights whose codes are contiguous and 16-byte aligned; got strides "
            f"{list(codes.stride())} at {codes.data_ptr() % 16} bytes past 16. Clone them once, when loading."
        )
    return codes
