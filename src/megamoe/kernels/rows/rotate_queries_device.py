# SPDX-License-Identifier: Apache-2.0
"""Device half of rotate_queries."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.pool_device import round_vector
from megamoe.kernels.parts.rope_device import rotate_vector
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
    symbolic_heads,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.rotate_queries_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    q = symbolic_heads(DTYPES[config.q], num_tokens, config.heads, config.width)
    pos = make_fake_tensor(Int64, (num_tokens,), (1,))
    inv_freq = symbolic_vector(Float32, config.rope // 2)
    y = symbolic_rows(DTYPES[config.q], cute.sym_int32(), config.width)
    return RotateQueries(config), (q, pos, inv_freq, y, Float32(0.0), current_stream())


class RotateQueries:
    """y = rope(rms_norm(q))."""

    def __init__(self, config: Config):
        self.config, self.tile = config, row_tile(config.width)

    @cute.jit
    def __call__(self, q: cute.Tensor, pos: cute.Tensor, inv_freq: cute.Tensor, y: cute.Tensor, eps: Float32, stream):
        self.kernel(q, pos, inv_freq, y, eps).launch(
            grid=(num_blocks(self.tile, y.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, q: cute.Tensor, pos: cute.Tensor, inv_freq: cute.Tensor, y: cute.Tensor, eps: Float32):
        tile, config = self.tile, self.config
        scratch = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(tile.warps))
        overlap_launches()
        thread = RowThread(tile, y.shape[0])
        token, head = thread.row // config.heads, thread.row % config.heads
        registers = thread.load_row(q[(token, head, None)])
        factor = row_rms_factor(thread, registers, eps, scratch)
        position = Float32(Int32(pos[token]))
        target = cute.zipped_divide(y[(thread.row, None)], (VECTOR,))
        first = (config.width - config.rope) // VECTOR
        for index in cutlass.range_constexpr(tile.vectors):
            values = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            values.store(registers[None, index].load().to(Float32) * factor)
            if cutlass.const_expr(config.q == "bf16"):
                round_vector(values)
            if cutlass.const_expr((index + 1) * tile.lanes > first):
                rotate_vector(values, thread.vector(index), first, position, inv_freq, False)
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            rounded.store(values.load().to(y.element_type))
            store_if(both(thread.live, thread.has(index)), rounded, target[(None,), thread.vector(index)])
