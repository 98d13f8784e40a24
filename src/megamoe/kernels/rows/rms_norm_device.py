# SPDX-License-Identifier: Apache-2.0
"""Device half of rms_norm."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    current_stream,
    num_blocks,
    overlap_launches,
    row_rms_factor,
    store_if,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.rms_norm_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    x = symbolic_rows(DTYPES[config.x], num_rows, config.width)
    y = symbolic_rows(DTYPES[config.out], num_rows, config.width)
    norm = RmsNorm(config)
    if config.weight is None:
        return norm.without_weight, (x, y, Float32(0.0), current_stream())
    weight = symbolic_vector(DTYPES[config.weight], config.width)
    return norm.with_weight, (x, weight, y, Float32(0.0), current_stream())


class RmsNorm:
    """y = weight * x * rsqrt(mean(x^2) + eps)."""

    def __init__(self, config: Config):
        self.tile = row_tile(config.width)

    @cute.jit
    def with_weight(self, x: cute.Tensor, weight: cute.Tensor, y: cute.Tensor, eps: Float32, stream):
        self.kernel(x, weight, y, eps).launch(
            grid=(num_blocks(self.tile, x.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def without_weight(self, x: cute.Tensor, y: cute.Tensor, eps: Float32, stream):
        self.kernel(x, None, y, eps).launch(
            grid=(num_blocks(self.tile, x.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, weight, y: cute.Tensor, eps: Float32):
        tile = self.tile
        scratch = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(tile.warps))
        overlap_launches()
        thread = RowThread(tile, x.shape[0])
        registers = thread.load(x)
        # y = values * rsqrt(mean_square + eps) * weight
        factor = row_rms_factor(thread, registers, eps, scratch)
        target = cute.zipped_divide(y[(thread.row, None)], (VECTOR,))
        for index in cutlass.range_constexpr(tile.vectors):
            result = registers[None, index].load().to(Float32) * factor
            if cutlass.const_expr(weight is not None):
                result = result * thread.load_shared(weight, index)
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            rounded.store(result.to(y.element_type))
            store_if(both(thread.live, thread.has(index)), rounded, target[(None,), thread.vector(index)])
