# SPDX-License-Identifier: Apache-2.0
"""Device half of rotate_queries."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64

from megamoe.kernels.parts.rope_device import HeadThread, Rotation, head_blocks
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    both,
    current_stream,
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
    positions = symbolic_vector(Int64, num_tokens)
    inv_freq = symbolic_vector(Float32, config.rope_dim // 2)
    y = symbolic_rows(DTYPES[config.q], cute.sym_int32(), config.width)
    return RotateQueries(config), (q, positions, inv_freq, y, Float32(0.0), current_stream())


class RotateQueries:
    """y = rope(x * rsqrt(mean(x^2) + eps)), rounded to the dtype of x in between."""

    def __init__(self, config: Config):
        self.config = config
        self.tile = row_tile(config.width)
        self.blocks = head_blocks(self.tile, config.passes, config.heads)

    @cute.jit
    def __call__(
        self, q: cute.Tensor, positions: cute.Tensor, inv_freq: cute.Tensor, y: cute.Tensor, eps: Float32, stream
    ):
        self.kernel(q, positions, inv_freq, y, eps).launch(
            grid=(self.blocks * positions.shape[0], 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, q: cute.Tensor, positions: cute.Tensor, inv_freq: cute.Tensor, y: cute.Tensor, eps: Float32):
        config, tile = self.config, self.tile
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        token, part = bidx // self.blocks, bidx % self.blocks
        overlap_launches()
        threads = [HeadThread(tile, part, tidx, index, config.passes, config.heads) for index in range(config.passes)]
        heads = q[(token, None, None)]
        loaded = [thread.load(heads) for thread in threads]
        rotation = Rotation(threads[0], inv_freq, Float32(positions[token]), config.rope_dim)
        for one in cutlass.range_constexpr(config.passes):
            thread, registers = threads[one], loaded[one]
            factor = row_rms_factor(thread, registers, eps, None)
            target = cute.zipped_divide(y[(token * config.heads + thread.row, None)], (VECTOR,))
            for index in cutlass.range_constexpr(tile.vectors):
                normed = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
                normed.store((registers[None, index].load().to(Float32) * factor).to(y.element_type))
                values = normed.load().to(Float32)
                turned = rotation.turned(thread, index, [values[element] for element in range(VECTOR)])
                result = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
                for element in cutlass.range_constexpr(VECTOR):
                    result[element] = turned[element]
                rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
                rounded.store(result.load().to(y.element_type))
                store_if(both(thread.live, thread.has(index)), rounded, target[(None,), thread.vector(index)])
