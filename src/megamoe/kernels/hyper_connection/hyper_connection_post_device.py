# SPDX-License-Identifier: Apache-2.0
"""Device half of hyper_connection_post."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from megamoe.kernels.hyper_connection.hyper_connection_post_config import Config
from megamoe.kernels.parts.ptx_device import add, multiply
from megamoe.kernels.parts.rows import VECTOR, RowTile, row_tile
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

MAX_THREADS = 1024


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32()
    streams = config.streams
    y = symbolic_rows(DTYPES[config.y], num_tokens, config.width)
    x = symbolic_rows(DTYPES[config.x], num_rows, config.width)
    post = symbolic_rows(Float32, num_tokens, streams, 4)
    comb = symbolic_rows(Float32, num_tokens, streams * streams, 4)
    out = symbolic_rows(DTYPES[config.x], num_rows, config.width)
    return HyperConnectionPost(config), (y, x, post, comb, out, current_stream())


def post_tile(width: int) -> RowTile:
    """Return row_tile's tile with twice the threads for long rows: what one does for four streams is long enough."""
    tile = row_tile(width)
    if tile.rows > 1 or tile.vectors % 2 or 2 * tile.lanes > MAX_THREADS:
        return tile
    return dataclasses.replace(tile, lanes=2 * tile.lanes, vectors=tile.vectors // 2)


class HyperConnectionPost:
    """x'_k = post_k * y + sum_j C_jk * x_j, j ascending; products and sums rounded one by one, as the reference does.

    The next sublayer starts from these bits: a stream that rounds otherwise moves all that follows.
    """

    def __init__(self, config: Config):
        self.streams = config.streams
        self.tile = post_tile(config.width)

    @cute.jit
    def __call__(self, y: cute.Tensor, x: cute.Tensor, post: cute.Tensor, comb: cute.Tensor, out: cute.Tensor, stream):
        self.kernel(y, x, post, comb, out).launch(
            grid=(num_blocks(self.tile, y.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, y: cute.Tensor, x: cute.Tensor, post: cute.Tensor, comb: cute.Tensor, out: cute.Tensor):
        streams = self.streams
        overlap_launches()
        thread = RowThread(self.tile, y.shape[0])
        token = thread.row
        post_weights = [post[token, k] for k in range(streams)]
        comb_weights = [[comb[token, j * streams + k] for k in range(streams)] for j in range(streams)]
        y_row = cute.zipped_divide(y[(token, None)], (VECTOR,))
        x_rows = [cute.zipped_divide(x[(token * streams + j, None)], (VECTOR,)) for j in range(streams)]
        out_rows = [cute.zipped_divide(out[(token * streams + k, None)], (VECTOR,)) for k in range(streams)]
        for index in cutlass.range_constexpr(self.tile.vectors):
            vector, has = thread.vector(index), thread.has(index)
            y_registers = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            copy_if(has, y_row[(None,), vector], y_registers)
            x_registers = cute.make_rmem_tensor(cute.make_layout((VECTOR, streams)), x.element_type)
            for j in cutlass.range_constexpr(streams):
                copy_if(has, x_rows[j][(None,), vector], x_registers[None, j])
            y_values = y_registers.load().to(Float32)
            x_values = [x_registers[None, j].load().to(Float32) for j in range(streams)]
            for k in cutlass.range_constexpr(streams):
                mixed = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
                for element in cutlass.range_constexpr(VECTOR):
                    total = multiply(y_values[element], post_weights[k])
                    for j in cutlass.range_constexpr(streams):
                        total = add(total, multiply(x_values[j][element], comb_weights[j][k]))
                    mixed[element] = total
                rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), out.element_type)
                rounded.store(mixed.load().to(out.element_type))
                store_if(both(thread.live, has), rounded, out_rows[k][(None,), vector])
