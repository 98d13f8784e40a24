# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8_rows: rows to E4M3 codes with a power-of-two scale per group of 128, read once.

Meaning    ops/quantize.py and formats/fp8.py, bit for bit; this file only makes it fast
Grid       one block a row, or 128 threads for several short rows (parts/rows.py); 16 threads hold a group
Memory     16-byte loads, 8-byte stores of codes, one scale byte per group
Limits     groups of 128; K a multiple of 8 up to 32768, the last group partial or not. NaN and infinity give the scale
           byte 255 (NaN), which dequantize refuses
Bound      memory: 2 K + K + K / 128 bytes a row of bf16
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_width
from megamoe.kernels.rows.quantize_fp8_rows_config import GROUP, Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["K"], "bf16")


def run(x: torch.Tensor, group: int) -> Fp8RowTensor:
    """Compute quantize_fp8_rows."""
    width = x.shape[-1]
    require_width("quantize_fp8_rows", width)
    if group != GROUP:
        raise NotImplementedError(
            f"quantize_fp8_rows: the kernel takes groups of {GROUP}; got {group}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )
    num_groups = -(-width // GROUP)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], num_groups), dtype=torch.uint8, device=x.device)
    if codes.numel():
        launch = kernel(Config(width, DTYPE_NAMES[x.dtype]), x.device)
        launch(as_rows(x), codes.view(torch.int32).view(-1, width // 4), scales.view(-1, num_groups))
    return Fp8RowTensor(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), group)
