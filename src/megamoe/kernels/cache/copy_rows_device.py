# SPDX-License-Identifier: Apache-2.0
"""Device half of copy_cache and save_rows: bytes of rows move from pool to pool."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from megamoe.kernels.cache.copy_rows_config import LANES, PIECES, THREADS, Config
from megamoe.kernels.parts.memory_device import load_global_if, load_global_vector_if, store_global_vector
from megamoe.kernels.parts.pool_device import ring_slot, row_addresses, store_bytes, symbolic_integers, symbolic_pool
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches

WARPS = THREADS // LANES
VECTOR_BYTES = 16
WORD_BYTES = 4


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    copier = CopyRows()
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


def chunks_of(vectors, words):
    """Return how many warps copy a row of 16-byte vectors and then 4-byte words."""
    return (vectors + words + LANES * PIECES - 1) // (LANES * PIECES)


class CopyRows:
    """A warp copies up to 2 KiB of a row.

    A row is cut into pieces: the vectors of its data, then the words of its scales.
    """

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
        units = source_slots.shape[0] * chunks_of(vectors, words)
        self.copy_kernel(source, source_slots, target, target_slots, source_rows, target_rows, vectors, words).launch(
            grid=((units + WARPS - 1) // WARPS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
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
        units = saves.shape[0] * target_rows * chunks_of(vectors, words)
        self.save_kernel(
            ring, step, target, saves, tables, ring_rows, step_rows, target_rows, vectors, words, has_step
        ).launch(grid=((units + WARPS - 1) // WARPS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True)

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
        unit, chunks = block * WARPS + thread // LANES, chunks_of(vectors, words)
        row = unit // chunks
        if row < source_slots.shape[0]:
            read, written = Int32(source_slots[row]), Int32(target_slots[row])
            if (read >= 0) & (written >= 0):
                piece = (unit - row * chunks) * (LANES * PIECES) + thread % LANES
                self.copy_pieces(source, read, source_rows, target, written, target_rows, vectors, words, piece)

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
        unit, chunks = block * WARPS + thread // LANES, chunks_of(vectors, words)
        place = unit // chunks
        save = place // target_rows
        if save < saves.shape[0]:
            row = place - save * target_rows
            request, first, written = saves[save, 0], saves[save, 2], saves[save, 4] * target_rows + row
            position = saves[save, 1] - target_rows + row
            if (request >= 0) & (position >= 0) & (saves[save, 4] >= 0):
                piece = (unit - place * chunks) * (LANES * PIECES) + thread % LANES
                if (has_step != 0) & (position >= first):
                    read = saves[save, 3] + position - first
                    self.copy_pieces(step, read, step_rows, target, written, target_rows, vectors, words, piece)
                else:
                    read = ring_slot(tables, ring_rows, request, position)
                    if read >= 0:
                        self.copy_pieces(ring, read, ring_rows, target, written, target_rows, vectors, words, piece)

    @cute.jit
    def copy_pieces(
        self,
        source,
        read: Int32,
        source_rows: Int32,
        target,
        written: Int32,
        target_rows: Int32,
        vectors: Int32,
        words: Int32,
        first: Int32,
    ):
        """Copy a thread's pieces of a row, every LANES-th from `first` on; all are loaded before one is stored."""
        sizes = (vectors * VECTOR_BYTES, words * WORD_BYTES)
        from_data, from_scales = row_addresses(source, read, source_rows, *sizes)
        to_data, to_scales = row_addresses(target, written, target_rows, *sizes)
        data, scales = [], []
        for index in cutlass.range_constexpr(PIECES):
            vector = first + index * LANES
            word = vector - vectors
            is_word = (word >= 0) & (word < words)
            data.append(load_global_vector_if(Int32(vector < vectors), from_data + Int64(vector) * VECTOR_BYTES, 4))
            scales.append(load_global_if(Int32(is_word), from_scales + Int64(word) * WORD_BYTES))
        for index in cutlass.range_constexpr(PIECES):
            vector = first + index * LANES
            word = vector - vectors
            if vector < vectors:
                store_global_vector(to_data + Int64(vector) * VECTOR_BYTES, *data[index])
            elif word < words:
                store_bytes(to_scales + Int64(word) * WORD_BYTES, scales[index], WORD_BYTES)
