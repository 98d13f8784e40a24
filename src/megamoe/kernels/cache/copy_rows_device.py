# SPDX-License-Identifier: Apache-2.0
"""Device half of copy_cache and save_rows: bytes of rows move from pool to pool."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from megamoe.kernels.cache.copy_rows_config import Config
from megamoe.kernels.parts.memory_device import load_global_if, load_global_vector_if, store_global_vector
from megamoe.kernels.parts.pool_device import (
    ring_slot,
    row_addresses,
    store_bytes,
    store_pair,
    symbolic_integers,
    symbolic_pool,
)
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    copier = CopyRows(config)
    if config.op == "copy":
        num_rows = cute.sym_int32()
        slots = [symbolic_integers(Int64, num_rows) for _ in range(2)]
        arguments = (symbolic_pool(), slots[0], symbolic_pool(), slots[1], Int32(0), Int32(0), current_stream())
        return copier.copy, arguments
    saves = symbolic_integers(Int32, cute.sym_int32(), 5)
    tables = symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32())
    pools = [symbolic_pool() for _ in range(3)]
    sizes = [Int32(0) for _ in range(4)]
    return copier.save, (*pools, saves, tables, *sizes, current_stream())


class CopyRows:
    """A few threads copy a row."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def copy(self, source, source_slots, target, target_slots, source_rows: Int32, target_rows: Int32, stream):
        rows = self.config.rows
        self.copy_kernel(source, source_slots, target, target_slots, source_rows, target_rows).launch(
            grid=((source_slots.shape[0] + rows - 1) // rows, 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.jit
    def save(
        self,
        ring,
        step,
        target,
        saves,
        tables,
        ring_rows: Int32,
        step_rows: Int32,
        target_rows: Int32,
        has_step: Int32,
        stream,
    ):
        rows = self.config.rows
        self.save_kernel(ring, step, target, saves, tables, ring_rows, step_rows, target_rows, has_step).launch(
            grid=((target_rows + rows - 1) // rows, saves.shape[0], 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def copy_kernel(self, source, source_slots, target, target_slots, source_rows: Int32, target_rows: Int32):
        config = self.config
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        index = block * config.rows + thread // config.lanes
        if index < source_slots.shape[0]:
            read, written = Int32(source_slots[index]), Int32(target_slots[index])
            if (read >= 0) & (written >= 0):
                self.copy_row(source, read, source_rows, target, written, target_rows, thread % config.lanes)

    @cute.kernel
    def save_kernel(
        self,
        ring,
        step,
        target,
        saves,
        tables,
        ring_rows: Int32,
        step_rows: Int32,
        target_rows: Int32,
        has_step: Int32,
    ):
        config = self.config
        block, save, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        row = block * config.rows + thread // config.lanes
        request = saves[save, 0]
        position = saves[save, 1] - target_rows + row
        if (row < target_rows) & (request >= 0) & (position >= 0) & (saves[save, 4] >= 0):
            written, lane = saves[save, 4] * target_rows + row, thread % config.lanes
            if (has_step != 0) & (position >= saves[save, 2]):
                read = saves[save, 3] + position - saves[save, 2]
                self.copy_row(step, read, step_rows, target, written, target_rows, lane)
            else:
                read = ring_slot(tables, ring_rows, request, position)
                if read >= 0:
                    self.copy_row(ring, read, ring_rows, target, written, target_rows, lane)

    @cute.jit
    def copy_row(
        self, source, read: Int32, source_rows: Int32, target, written: Int32, target_rows: Int32, lane: Int32
    ):
        """Copy the bytes of a row; all of a thread's loads are on their way before its first store."""
        config = self.config
        sizes = (config.data_bytes, config.scale_bytes)
        from_data, from_scales = row_addresses(source, read, source_rows, *sizes)
        to_data, to_scales = row_addresses(target, written, target_rows, *sizes)
        num_vectors = config.data_bytes // 16
        words = []
        for first in cutlass.range_constexpr(0, num_vectors, config.lanes):
            vector = first + lane
            words.append(load_global_vector_if(Int32(vector < num_vectors), from_data + Int64(vector) * 16, 4))
        for index in cutlass.range_constexpr(len(words)):
            vector = index * config.lanes + lane
            if vector < num_vectors:
                store_global_vector(to_data + Int64(vector) * 16, *words[index])
        if cutlass.const_expr(config.scale_bytes > 0):
            if lane == 0:
                if cutlass.const_expr(config.scale_bytes == 8):
                    store_pair(to_scales, *load_global_vector_if(Int32(1), from_scales, 2))
                else:
                    store_bytes(to_scales, load_global_if(Int32(1), from_scales), 4)
