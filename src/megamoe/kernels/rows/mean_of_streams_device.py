# SPDX-License-Identifier: Apache-2.0
"""Device half of mean_of_streams."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from megamoe.kernels.parts.ptx_device import divide, multiply
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
)
from megamoe.kernels.rows.mean_of_streams_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    x = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    y = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    return MeanOfStreams(config), (x, y, current_stream())


class MeanOfStreams:
    """y = (x_0 + x_1 + ...) / X, one rounding each."""

    def __init__(self, config: Config):
        self.streams = config.streams
        self.tile = row_tile(config.width)

    def _divided(self, total):
        """Return a sum over X; for a power of two the product with 1 / X is the same number, and much cheaper."""
        if self.streams & (self.streams - 1):
            return divide(total, Float32(self.streams))
        return multiply(total, Float32(1.0 / self.streams))

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, y).launch(
            grid=(num_blocks(self.tile, y.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        tile, streams = self.tile, self.streams
        overlap_launches()
        thread = RowThread(tile, y.shape[0])
        rows = [cute.zipped_divide(x[(thread.row * streams + j, None)], (VECTOR,)) for j in range(streams)]
        target = cute.zipped_divide(y[(thread.row, None)], (VECTOR,))
        for index in cutlass.range_constexpr(tile.vectors):
            vector, has = thread.vector(index), thread.has(index)
            registers = cute.make_rmem_tensor(cute.make_layout((VECTOR, streams)), x.element_type)
            for j in cutlass.range_constexpr(streams):
                copy_if(has, rows[j][(None,), vector], registers[None, j])
            total = registers[None, 0].load().to(Float32)
            for j in cutlass.range_constexpr(1, streams):
                total = total + registers[None, j].load().to(Float32)
            mean = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            for element in cutlass.range_constexpr(VECTOR):
                mean[element] = self._divided(total[element])
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            rounded.store(mean.load().to(y.element_type))
            store_if(both(thread.live, has), rounded, target[(None,), vector])
