# SPDX-License-Identifier: Apache-2.0
"""Device half of plan_slots and write_block_tables: a thread a token, a thread a change."""

import cutlass.cute as cute
from cutlass import Int32, Int64

from megamoe.kernels.cache.plan_slots_config import THREADS, Config
from megamoe.kernels.parts.pool_device import ring_slot, symbolic_integers
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, plan = cute.sym_int32(), PlanSlots()
    tables = [symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32()) for _ in range(2)]
    if config.op == "tables":
        changes = symbolic_integers(Int32, cute.sym_int32(), 3)
        return plan.tables, (tables[0], changes, current_stream())
    tokens = symbolic_integers(Int32, 4, num_tokens)
    if config.op == "window":
        dtypes = (Int64, Int64, Int32, Int32, Int64, Int64)
        outputs = [symbolic_integers(dtype, num_tokens) for dtype in dtypes]
        return plan.window, (tokens, tables[0], *outputs, Int32(0), Int32(0), current_stream())
    outputs = [symbolic_integers(dtype, num_tokens) for dtype in (Int64, Int64, Int64, Int32)]
    sizes = [Int32(0) for _ in range(4)]
    return plan.kind, (tokens, *tables, *outputs, *sizes, current_stream())


class PlanSlots:
    """See ops/plan_slots.py."""

    @cute.jit
    def window(
        self,
        tokens,
        tables,
        token_ids,
        positions,
        requests,
        first_idx,
        slots,
        kept,
        rows_per_block: Int32,
        in_rings: Int32,
        stream,
    ):
        self.window_kernel(
            tokens, tables, token_ids, positions, requests, first_idx, slots, kept, rows_per_block, in_rings
        ).launch(
            grid=((tokens.shape[1] + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def kind(
        self,
        tokens,
        state_tables,
        entry_tables,
        slots,
        kept,
        entry_slots,
        num_visible,
        state_rows: Int32,
        entry_rows: Int32,
        ratio: Int32,
        in_rings: Int32,
        stream,
    ):
        self.kind_kernel(
            tokens,
            state_tables,
            entry_tables,
            slots,
            kept,
            entry_slots,
            num_visible,
            state_rows,
            entry_rows,
            ratio,
            in_rings,
        ).launch(
            grid=((tokens.shape[1] + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def tables(self, tables, changes, stream):
        self.tables_kernel(tables, changes).launch(
            grid=((changes.shape[0] + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def window_kernel(
        self,
        tokens,
        tables,
        token_ids,
        positions,
        requests,
        first_idx,
        slots,
        kept,
        rows_per_block: Int32,
        in_rings: Int32,
    ):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        token = block * THREADS + thread
        if token < tokens.shape[1]:
            position, request = tokens[1, token], tokens[2, token]
            token_ids[token] = Int64(tokens[0, token])
            positions[token] = Int64(position)
            requests[token] = request
            first_idx[token] = tokens[3, token]
            self.ring(tokens, tables, slots, kept, rows_per_block, in_rings, token, position, request)

    @cute.kernel
    def kind_kernel(
        self,
        tokens,
        state_tables,
        entry_tables,
        slots,
        kept,
        entry_slots,
        num_visible,
        state_rows: Int32,
        entry_rows: Int32,
        ratio: Int32,
        in_rings: Int32,
    ):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        token = block * THREADS + thread
        if token < tokens.shape[1]:
            position, request = tokens[1, token], tokens[2, token]
            self.ring(tokens, state_tables, slots, kept, state_rows, in_rings, token, position, request)
            visible = (position + 1) // ratio
            num_visible[token] = visible
            entry = Int32(-1)
            if visible * ratio == position + 1:
                entry = visible - 1
            entry_slots[token] = Int64(ring_slot(entry_tables, entry_rows, request, entry))

    @cute.jit
    def ring(
        self,
        tokens,
        tables,
        slots,
        kept,
        rows_per_block: Int32,
        in_rings: Int32,
        token: Int32,
        position: Int32,
        request: Int32,
    ):
        """Fill where a token's row goes in one kind of ring."""
        slot = ring_slot(tables, rows_per_block, request, position)
        place, keeping = slot, Int32(-1)
        if in_rings == 0:
            keeping = slot
            place = Int32(-1)
            if position >= 0:
                place = token
            later = token + tables.shape[1] * rows_per_block  # overwrites this token where it is of the same request
            if later < tokens.shape[1]:
                if tokens[3, later] <= token:
                    keeping = Int32(-1)
        slots[token] = Int64(place)
        kept[token] = Int64(keeping)

    @cute.kernel
    def tables_kernel(self, tables, changes):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        change = block * THREADS + thread
        if change < changes.shape[0]:
            request, column = changes[change, 0], changes[change, 1]
            is_inside = (request < tables.shape[0]) & (column >= 0) & (column < tables.shape[1])
            if (request >= 0) & is_inside:
                tables[request, column] = changes[change, 2]
