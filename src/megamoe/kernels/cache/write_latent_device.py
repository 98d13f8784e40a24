# SPDX-License-Identifier: Apache-2.0
"""Device half of write_latent."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.cache.write_latent_config import Config, one_warp_tile
from megamoe.kernels.parts.memory_device import store_global_vector_if
from megamoe.kernels.parts.pool_device import (
    both_true,
    round_vector,
    row_addresses,
    row_bytes,
    store_row,
    symbolic_pool,
)
from megamoe.kernels.parts.rope_device import Rotation
from megamoe.kernels.parts.rows import BLOCK_THREADS, VECTOR
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    current_stream,
    num_blocks,
    overlap_launches,
    row_rms_factor,
    symbolic_rows,
    symbolic_vector,
)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    kv = symbolic_rows(DTYPES[config.kv], num_rows, config.width)
    weight = symbolic_vector(DTYPES[config.weight], config.width)
    slots, pos = (make_fake_tensor(Int64, (num_rows,), (1,)) for _ in range(2))
    inv_freq = symbolic_vector(Float32, config.rope // 2)
    latent = (kv, weight, symbolic_pool(), slots, pos, inv_freq, Int32(0), Float32(0.0), current_stream())
    if config.query is None:
        return WriteLatent(config).rows_alone, latent
    query, y = (symbolic_rows(DTYPES[config.query_latent], num_rows, config.query) for _ in range(2))
    return WriteLatent(config).with_queries, (
        query,
        symbolic_vector(DTYPES[config.query_weight], config.query),
        y,
        *latent,
    )


class BlockRowThread(RowThread):
    """A RowThread of a block that is not the first of the grid: its number among the blocks of its kind is given."""

    def __init__(self, tile, num_rows, block):
        tidx, _, _ = cute.arch.thread_idx()
        self.tile, self.lane = tile, tidx % tile.lanes
        row = block * tile.rows + tidx // tile.lanes
        self.live = row < num_rows
        self.row = cutlass.min(row, num_rows - 1)


class WriteLatent:
    """Row slots[t] of the pool = encode(rope(rms_norm(kv[t]))); y[t] = rms_norm(query[t])."""

    def __init__(self, config: Config):
        self.config, self.tile = config, one_warp_tile(config.width)
        self.query_tile = None if config.query is None else one_warp_tile(config.query)

    @cute.jit
    def with_queries(
        self,
        query: cute.Tensor,
        query_weight: cute.Tensor,
        y: cute.Tensor,
        kv: cute.Tensor,
        weight: cute.Tensor,
        pool: cute.Tensor,
        slots: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        rows_per_block: Int32,
        eps: Float32,
        stream,
    ):
        blocks = num_blocks(self.tile, kv.shape[0]) + num_blocks(self.query_tile, kv.shape[0])
        self.kernel(query, query_weight, y, kv, weight, pool, slots, pos, inv_freq, rows_per_block, eps).launch(
            grid=(blocks, 1, 1), block=(BLOCK_THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def rows_alone(
        self,
        kv: cute.Tensor,
        weight: cute.Tensor,
        pool: cute.Tensor,
        slots: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        rows_per_block: Int32,
        eps: Float32,
        stream,
    ):
        self.kernel(None, None, None, kv, weight, pool, slots, pos, inv_freq, rows_per_block, eps).launch(
            grid=(num_blocks(self.tile, kv.shape[0]), 1, 1), block=(BLOCK_THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        query,
        query_weight,
        y,
        kv: cute.Tensor,
        weight: cute.Tensor,
        pool: cute.Tensor,
        slots: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        rows_per_block: Int32,
        eps: Float32,
    ):
        block, _, _ = cute.arch.block_idx()
        overlap_launches()
        if cutlass.const_expr(query is None):
            self.write_rows(kv, weight, pool, slots, pos, inv_freq, rows_per_block, eps, block)
        else:
            row_blocks = num_blocks(self.tile, kv.shape[0])
            if block >= row_blocks:
                self.norm_queries(query, query_weight, y, eps, block - row_blocks)
            else:
                self.write_rows(kv, weight, pool, slots, pos, inv_freq, rows_per_block, eps, block)

    @cute.jit
    def norm_queries(self, query: cute.Tensor, weight: cute.Tensor, y: cute.Tensor, eps: Float32, block: Int32):
        """Norm the query latents of a block."""
        thread = BlockRowThread(self.query_tile, query.shape[0], block)
        registers = thread.load(query)
        weights = thread.load_row(weight)
        factor = row_rms_factor(thread, registers, eps, None)
        target = y[(thread.row, None)].iterator.toint()
        for index in cutlass.range_constexpr(self.query_tile.vectors):
            result = registers[None, index].load().to(Float32) * factor * weights[None, index].load().to(Float32)
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
            rounded.store(result.to(y.element_type))
            words = cute.recast_tensor(rounded, Uint32)
            wanted = both(thread.live, thread.has(index))
            address = target + Int64(thread.vector(index)) * (VECTOR * y.element_type.width // 8)
            for first in cutlass.range_constexpr(0, VECTOR * y.element_type.width // 32, 4):
                store_global_vector_if(wanted, address + 4 * first, *[words[first + word] for word in range(4)])

    @cute.jit
    def write_rows(
        self,
        kv: cute.Tensor,
        weight: cute.Tensor,
        pool: cute.Tensor,
        slots: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        rows_per_block: Int32,
        eps: Float32,
        block: Int32,
    ):
        """Norm, rotate and store the latent rows of a block."""
        tile, config = self.tile, self.config
        thread = BlockRowThread(tile, kv.shape[0], block)
        slot, position = Int32(slots[thread.row]), Float32(Int32(pos[thread.row]))
        registers = thread.load(kv)
        weights = thread.load_row(weight)
        rotation = Rotation(thread, inv_freq, position, config.rope)
        factor = row_rms_factor(thread, registers, eps, None)
        values = []
        for index in cutlass.range_constexpr(tile.vectors):
            one = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            one.store(registers[None, index].load().to(Float32) * factor * weights[None, index].load().to(Float32))
            if cutlass.const_expr(config.kv == "bf16"):
                round_vector(one)
            if cutlass.const_expr(index in rotation.factors):
                turned = rotation.turned(thread, index, [one[element] for element in range(VECTOR)])
                for element in cutlass.range_constexpr(VECTOR):
                    one[element] = turned[element]
                if cutlass.const_expr(config.kv == "bf16"):
                    round_vector(one)
            values.append(one)
        sizes = row_bytes(config.row_format, config.width)
        data, scales = row_addresses(pool, cutlass.max(slot, 0), rows_per_block, *sizes)
        vectors = [thread.vector(index) for index in range(tile.vectors)]
        wanted = both_true(slot >= 0, thread.live)
        store_row(values, vectors, tile.lanes, wanted, config.row_format, config.width, data, scales)
