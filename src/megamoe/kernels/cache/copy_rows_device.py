# SPDX-License-Identifier: Apache-2.0
"""Device half of copy_cache and save_rows: bytes of rows move from pool to pool."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from megamoe.kernels.cache.copy_rows_config import THREADS, Config
from megamoe.kernels.parts.memory_device import load_global_if, load_global_vector_if, store_global_vector_if
from megamoe.kernels.parts.pool_device import ring_slot, row_addresses, store_bytes, symbolic_integers, symbolic_pool
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches

VECTOR_BYTES = 16
WORD_BYTES = 4


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    copier = CopyRows(config)
    if config.op == "copy":
        num_rows = cute.sym_int32()
        slots = [symbolic_integers(Int64, num_rows) for _ in range(2)]
        sizes = [Int32(0) for _ in range(4)]
        return copier.copy, (symbolic_pool(), slots[0], symbolic_pool(), slots[1], *sizes, current_stream())
    saves = symbolic_integers(Int32, cute.sym_int32(), 5)
    tables = symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32())
    pools = [symbolic_pool() for _ in range(3)]
    sizes = [Int32(0) for _ in range(6)]
    return copier.save, (*pools, saves, tables, *sizes, current_stream())


def chunks_of(config: Config, vectors, words):
    """Return into how many chunks a row of 16-byte vectors and 4-byte words is cut."""
    most_vectors, most_words = config.lanes * config.vectors, config.lanes * config.words
    return cutlass.max((vectors + most_vectors - 1) // most_vectors, (words + most_words - 1) // most_words)


class CopyRows:
    """A group of threads copies a chunk of a row's data, and some of its scales."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def copy(
        self,
        source,
        source_slots,
        target,
        target_slots,
        source_rows: Int32,
        target_rows: Int32,
        vectors: Int32,
        words: Int32,
        stream,
    ):
        units = source_slots.shape[0] * chunks_of(self.config, vectors, words)
        self.copy_kernel(source, source_slots, target, target_slots, source_rows, target_rows, vectors, words).launch(
            grid=((units + self.config.groups - 1) // self.config.groups, 1, 1),
            block=(THREADS, 1, 1),
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
        vectors: Int32,
        words: Int32,
        has_step: Int32,
        stream,
    ):
        units = saves.shape[0] * target_rows * chunks_of(self.config, vectors, words)
        self.save_kernel(
            ring, step, target, saves, tables, ring_rows, step_rows, target_rows, vectors, words, has_step
        ).launch(
            grid=((units + self.config.groups - 1) // self.config.groups, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def copy_kernel(
        self,
        source,
        source_slots,
        target,
        target_slots,
        source_rows: Int32,
        target_rows: Int32,
        vectors: Int32,
        words: Int32,
    ):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        group, lane = thread // self.config.lanes, thread % self.config.lanes
        unit, chunks = block * self.config.groups + group, chunks_of(self.config, vectors, words)
        row = unit // chunks
        if row < source_slots.shape[0]:
            read, written = Int32(source_slots[row]), Int32(target_slots[row])
            if (read >= 0) & (written >= 0):
                sizes = (vectors * VECTOR_BYTES, words * WORD_BYTES)
                origin = row_addresses(source, read, source_rows, *sizes)
                goal = row_addresses(target, written, target_rows, *sizes)
                self.copy_chunk(*origin, *goal, vectors, words, unit - row * chunks, lane)

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
        vectors: Int32,
        words: Int32,
        has_step: Int32,
    ):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        group, lane = thread // self.config.lanes, thread % self.config.lanes
        unit, chunks = block * self.config.groups + group, chunks_of(self.config, vectors, words)
        place = unit // chunks
        save = place // target_rows
        if save < saves.shape[0]:
            row = place - save * target_rows
            request, first, written = saves[save, 0], saves[save, 2], saves[save, 4] * target_rows + row
            position = saves[save, 1] - target_rows + row
            if (request >= 0) & (position >= 0) & (saves[save, 4] >= 0):
                sizes = (vectors * VECTOR_BYTES, words * WORD_BYTES)
                from_data, from_scales = Int64(0), Int64(0)
                if (has_step != 0) & (position >= first):
                    in_step = saves[save, 3] + position - first
                    from_data, from_scales = row_addresses(step, in_step, step_rows, *sizes)
                else:
                    in_ring = ring_slot(tables, ring_rows, request, position)
                    if in_ring >= 0:
                        from_data, from_scales = row_addresses(ring, in_ring, ring_rows, *sizes)
                if from_data != 0:
                    goal = row_addresses(target, written, target_rows, *sizes)
                    self.copy_chunk(from_data, from_scales, *goal, vectors, words, unit - place * chunks, lane)

    @cute.jit
    def copy_chunk(
        self,
        from_data: Int64,
        from_scales: Int64,
        to_data: Int64,
        to_scales: Int64,
        vectors: Int32,
        words: Int32,
        chunk: Int32,
        lane: Int32,
    ):
        """Copy a thread's part of a chunk of a row; all of it is loaded before any is stored."""
        config, data, scales = self.config, [], []
        for index in cutlass.range_constexpr(config.vectors):
            vector = (chunk * config.vectors + index) * config.lanes + lane
            data.append(load_global_vector_if(Int32(vector < vectors), from_data + Int64(vector) * VECTOR_BYTES, 4))
        for index in cutlass.range_constexpr(config.words):
            word = (chunk * config.words + index) * config.lanes + lane
            scales.append(load_global_if(Int32(word < words), from_scales + Int64(word) * WORD_BYTES))
        for index in cutlass.range_constexpr(config.vectors):
            vector = (chunk * config.vectors + index) * config.lanes + lane
            store_global_vector_if(vector < vectors, to_data + Int64(vector) * VECTOR_BYTES, *data[index])
        for index in cutlass.range_constexpr(config.words):
            word = (chunk * config.words + index) * config.lanes + lane
            if word < words:
                store_bytes(to_scales + Int64(word) * WORD_BYTES, scales[index], WORD_BYTES)
