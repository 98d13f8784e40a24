# SPDX-License-Identifier: Apache-2.0
"""Device half of clamped_swiglu."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from megamoe.kernels.parts.ptx_device import max_keeping_nan, min_keeping_nan
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    copy_if,
    current_stream,
    num_blocks,
    overlap_launches,
    store_if,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.clamped_swiglu_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    gate = symbolic_rows(DTYPES[config.gate], num_rows, config.width)
    up = symbolic_rows(DTYPES[config.up], num_rows, config.width)
    y = symbolic_rows(DTYPES[config.out], num_rows, config.width)
    swiglu = ClampedSwiglu(config)
    if config.weighted:
        weight = symbolic_vector(Float32, num_rows)
        return swiglu.weighted, (gate, up, weight, y, Float32(0.0), current_stream())
    return swiglu.plain, (gate, up, y, Float32(0.0), current_stream())


class ClampedSwiglu:
    """y = g / (1 + exp(-g)) * u * row_weight, g = min(gate, limit), u = clamp(up, -limit, limit)."""

    def __init__(self, config: Config):
        self.config = config
        self.tile = row_tile(config.width)

    @cute.jit
    def weighted(self, gate, up, row_weight, y, limit: Float32, stream):
        self._launch(gate, up, row_weight, y, limit, stream)

    @cute.jit
    def plain(self, gate, up, y, limit: Float32, stream):
        self._launch(gate, up, None, y, limit, stream)

    def _launch(self, gate, up, row_weight, y, limit, stream):
        self.kernel(gate, up, row_weight, y, limit).launch(
            grid=(num_blocks(self.tile, gate.shape[0]), 1, 1),
            block=(self.tile.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, gate: cute.Tensor, up: cute.Tensor, row_weight, y: cute.Tensor, limit: Float32):
        tile = self.tile
        overlap_launches()
        thread = RowThread(tile, gate.shape[0])
        gate_row = cute.zipped_divide(gate[(thread.row, None)], (VECTOR,))
        up_row = cute.zipped_divide(up[(thread.row, None)], (VECTOR,))
        target = cute.zipped_divide(y[(thread.row, None)], (VECTOR,))
        for index in cutlass.range_constexpr(tile.vectors):
            vector, has = thread.vector(index), thread.has(index)
            gates = cute.make_rmem_tensor(cute.make_layout(VECTOR), gate.element_type)
            ups = cute.make_rmem_tensor(cute.make_layout(VECTOR), up.element_type)
            copy_if(has, gate_row[(None,), vector], gates)
            copy_if(has, up_row[(None,), vector], ups)
            gate_values, up_values = gates.load().to(Float32), ups.load().to(Float32)
            result = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            for element in cutlass.range_constexpr(VECTOR):
                g, u = gate_values[element], up_values[element]
                if cutlass.const_expr(self.config.clamped):
                    g = min_keeping_nan(g, limit)
                    u = max_keeping_nan(min_keeping_nan(u, limit), -limit)
                value = g / (1.0 + cute.math.exp(-g)) * u
                if cutlass.const_expr(row_weight is not None):
                    value = value * row_weight[thread.row]
                result[element] = value
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            rounded.store(result.load().to(y.element_type))
            store_if(both(thread.live, has), rounded, target[(None,), vector])
