# SPDX-License-Identifier: Apache-2.0
"""Device half of add_to_streams."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

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
from megamoe.kernels.rows.add_to_streams_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    x = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    e = symbolic_rows(DTYPES[config.e], cute.sym_int32(), config.width)
    y = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    return AddToStreams(config), (x, e, y, current_stream())


class AddToStreams:
    """y_j = x_j + e."""

    def __init__(self, config: Config):
        self.streams = config.streams
        self.tile = row_tile(config.width)

    @cute.jit
    def __call__(self, x: cute.Tensor, e: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, e, y).launch(
            grid=(num_blocks(self.tile, e.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, e: cute.Tensor, y: cute.Tensor):
        tile, streams = self.tile, self.streams
        overlap_launches()
        thread = RowThread(tile, e.shape[0])
        added = thread.load(e)
        rows = [cute.zipped_divide(x[(thread.row * streams + j, None)], (VECTOR,)) for j in range(streams)]
        targets = [cute.zipped_divide(y[(thread.row * streams + j, None)], (VECTOR,)) for j in range(streams)]
        for index in cutlass.range_constexpr(tile.vectors):
            vector, has = thread.vector(index), thread.has(index)
            registers = cute.make_rmem_tensor(cute.make_layout((VECTOR, streams)), x.element_type)
            for j in cutlass.range_constexpr(streams):
                copy_if(has, rows[j][(None,), vector], registers[None, j])
            for j in cutlass.range_constexpr(streams):
                total = added[None, index].load().to(Float32) + registers[None, j].load().to(Float32)
                rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
                rounded.store(total.to(y.element_type))
                store_if(both(thread.live, has), rounded, targets[j][(None,), vector])
