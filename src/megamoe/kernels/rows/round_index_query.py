# SPDX-License-Identifier: Apache-2.0
"""round_index_query: every index head read once; rotation, Hadamard rotation and rounding in registers.

Meaning    ops/round_index_query.py; this file only makes it fast. After the angles every step is bit for bit the reference's
Grid       blocks of 128 threads with several heads of one token (parts/rows.py); a thread takes part in four of them, whose
           sines and cosines it computes once
Order      Hadamard: differences of channels K/2 apart first, of neighbours last. Four threads share a head of 128 channels,
           and two of its seven steps are shuffles
Memory     16-byte loads, 4-byte stores of MXFP4 codes, 8-byte stores of FP8 codes
Limits     K of 32 to 256, a power of two, R a multiple of 8; positions up to 2^22. It cannot raise for NaN and infinity
           without waiting for the device: their scale byte becomes 255 (NaN), which dequantize refuses
Bound      memory: 2 K + K / 2 + K / 32 bytes a head of bf16 and MXFP4
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import BLOCK, MxFp4Tensor
from megamoe.kernels.parts.launch import DTYPE_NAMES, RotaryTable, as_heads, as_vector, require_heads
from megamoe.kernels.rows.round_index_query_config import Config
from megamoe.kernels.store import kernel

PASSES = 4
ROUNDINGS = {RowFormat.INDEX_FP4: "mxfp4", RowFormat.INDEX_FP8: "fp8", RowFormat.BF16: None, RowFormat.FP32: None}
WIDTHS = (32, 64, 128, 256)


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["Hi"], dims["K"], dims["R"], "bf16", "mxfp4", True, PASSES)


def run(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RotaryTable,
    key_format: RowFormat,
    hadamard: bool,
    head_scale: float,
) -> tuple[torch.Tensor | MxFp4Tensor | Fp8RowTensor, torch.Tensor]:
    """Compute round_index_query."""
    num_tokens, num_heads, width = q.shape
    require_heads("round_index_query", width, table.rope_dim)
    if width not in WIDTHS:
        raise NotImplementedError(
            f"round_index_query: the kernel takes heads of {', '.join(map(str, WIDTHS))} channels; got {width}. Run the "
            f'reference: with megamoe.ops.use("reference").'
        )
    rounding, num_rows, device = ROUNDINGS[key_format], num_tokens * num_heads, q.device
    weights = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=device)
    outputs: tuple[torch.Tensor, ...]
    query: torch.Tensor | MxFp4Tensor | Fp8RowTensor
    if rounding == "mxfp4":
        codes = torch.empty((num_tokens, num_heads, width // 2), dtype=torch.uint8, device=device)
        scales = torch.empty((num_tokens, num_heads, width // BLOCK), dtype=torch.uint8, device=device)
        outputs = (codes.view(torch.int32).view(num_rows, width // 8), scales.view(num_rows, width // BLOCK))
        query = MxFp4Tensor(codes, scales.view(torch.float8_e8m0fnu))
    elif rounding == "fp8":
        codes = torch.empty((num_tokens, num_heads, width), dtype=torch.uint8, device=device)
        scales = torch.empty((num_tokens, num_heads, 1), dtype=torch.uint8, device=device)
        outputs = (codes.view(torch.int32).view(num_rows, width // 4), scales.view(num_rows, 1))
        query = Fp8RowTensor(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), width)
    else:
        query = torch.empty(q.shape, dtype=q.dtype, device=device)
        outputs = (query.view(num_rows, width),)
    if num_rows:
        config = Config(num_heads, width, table.rope_dim, DTYPE_NAMES[q.dtype], rounding, hadamard, PASSES)
        given = head_weights if head_weights.stride(-1) == 1 else head_weights.contiguous()
        frequencies = as_vector(table.inv_freq)
        kernel(config, device)(as_heads(q), given, pos.contiguous(), frequencies, *outputs, weights, head_scale)
    return query, weights
