# SPDX-License-Identifier: Apache-2.0
"""Device half of write_latent."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.cache.write_latent_config import Config
from megamoe.kernels.parts.pool_device import (
    both_true,
    round_vector,
    row_addresses,
    row_bytes,
    store_row,
    symbolic_pool,
)
from megamoe.kernels.parts.rope_device import rotate_vector
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
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
    arguments = (kv, weight, symbolic_pool(), slots, pos, inv_freq, Int32(0), Float32(0.0), current_stream())
    return WriteLatent(config), arguments


class WriteLatent:
    """Row slots[t] of the pool = encode(rope(rms_norm(kv[t])))."""

    def __init__(self, config: Config):
        self.config, self.tile = config, row_tile(config.width, min_lanes=8)

    @cute.jit
    def __call__(
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
        self.kernel(kv, weight, pool, slots, pos, inv_freq, rows_per_block, eps).launch(
            grid=(num_blocks(self.tile, kv.shape[0]), 1, 1),
            block=(self.tile.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        kv: cute.Tensor,
        weight: cute.Tensor,
        pool: cute.Tensor,
        slots: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        rows_per_block: Int32,
        eps: Float32,
    ):
        tile, config = self.tile, self.config
        scratch = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(tile.warps))
        overlap_launches()
        thread = RowThread(tile, kv.shape[0])
        registers = thread.load(kv)
        factor = row_rms_factor(thread, registers, eps, scratch)
        slot, position = Int32(slots[thread.row]), Float32(Int32(pos[thread.row]))
        first = (config.width - config.rope) // VECTOR
        values = []
        for index in cutlass.range_constexpr(tile.vectors):
            one = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            one.store(registers[None, index].load().to(Float32) * factor * thread.load_shared(weight, index))
            if cutlass.const_expr(config.kv == "bf16"):
                round_vector(one)
            if cutlass.const_expr((index + 1) * tile.lanes > first):
                rotate_vector(one, thread.vector(index), first, position, inv_freq, False)
            if cutlass.const_expr(config.kv == "bf16"):
                round_vector(one)
            values.append(one)
        sizes = row_bytes(config.row_format, config.width)
        data, scales = row_addresses(pool, cutlass.max(slot, 0), rows_per_block, *sizes)
        vectors = [thread.vector(index) for index in range(tile.vectors)]
        wanted = slot >= 0
        if cutlass.const_expr(thread.live is not True):
            wanted = both_true(wanted, thread.live)
        store_row(values, vectors, min(tile.lanes, 32), wanted, config.row_format, config.width, data, scales)
