# SPDX-License-Identifier: Apache-2.0
"""round_index_query: every index head rotated, rotated again by a Hadamard matrix and rounded in registers.

Meaning    ops/round_index_query.py; this file only makes it fast
Grid       128 threads for 32 heads, 4 threads a head
Memory     16-byte loads; stores of 4 to 16 bytes
Limits     K = 128, R a multiple of 8
Bound      memory: Hi K values read, the codes written
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_heads, as_vector
from megamoe.kernels.rows.round_index_query_config import Config
from megamoe.kernels.store import kernel
from megamoe.ops.rope import RopeTable
from megamoe.ops.round_index_query import IndexQuery

WIDTH = 128


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["Hi"], dims["K"], dims["R"], "bf16", "index_fp4", True)


def run(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    key_format: RowFormat,
    hadamard: bool,
    head_scale: float,
) -> tuple[IndexQuery, torch.Tensor]:
    """Compute round_index_query."""
    num_tokens, heads, width = q.shape
    if width != WIDTH:
        raise NotImplementedError(
            f"round_index_query: the kernel takes heads of {WIDTH} channels; got {width}. Run the reference: "
            'with megamoe.ops.use("reference").'
        )
    rounding = {RowFormat.INDEX_FP4: "index_fp4", RowFormat.INDEX_FP8: "index_fp8"}.get(key_format, "plain")
    data_bytes = {"index_fp4": width // 2, "index_fp8": width, "plain": width * q.element_size()}[rounding]
    num_scales = {"index_fp4": width // 32, "index_fp8": 1, "plain": 0}[rounding]
    device, shape = q.device, (num_tokens, heads)
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    data = torch.empty((*shape, data_bytes), dtype=torch.uint8, device=device)
    scales = torch.empty((*shape, max(num_scales, 1)), dtype=torch.uint8, device=device)
    if num_tokens and heads:
        launch = kernel(Config(heads, width, table.rope_dim, DTYPE_NAMES[q.dtype], rounding, hadamard), device)
        inv_freq, rows = as_vector(table.inv_freq), num_tokens * heads
        launch(
            as_heads(q),
            head_weights,
            pos,
            inv_freq,
            data.view(rows, data_bytes),
            scales.view(rows, -1),
            weights.view(rows),
            head_scale,
        )
    if rounding == "index_fp4":
        return MxFp4Tensor(data, scales.view(torch.float8_e8m0fnu)), weights
    if rounding == "index_fp8":
        return Fp8RowTensor(data.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), width), weights
    return data.view(q.dtype), weights
