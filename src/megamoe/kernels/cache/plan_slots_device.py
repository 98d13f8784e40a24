# SPDX-License-Identifier: Apache-2.0
"""Device half of plan_slots and write_block_tables: a thread a token, a thread a change."""

import cutlass.cute as cute
from cutlass import Int32, Int64

from megamoe.kernels.cache.plan_slots_config import KINDS, THREADS, Config
from megamoe.kernels.parts.pool_device import ring_slot, symbolic_integers
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, plan = cute.sym_int32(), PlanSlots()
    if config.op == "tables":
        changes = symbolic_integers(Int32, cute.sym_int32(), 3)
        return plan.write_tables, (symbolic_tables(), changes, current_stream())
    tokens = symbolic_integers(Int32, 4, num_tokens)
    dtypes = (Int64, Int64, Int32, Int32, Int64, Int64, *(Int64, Int64, Int64, Int32) * KINDS)
    outputs = [symbolic_integers(dtype, num_tokens) for dtype in dtypes]
    tables = [symbolic_tables() for _ in range(1 + 2 * KINDS)]
    sizes = [Int32(0) for _ in range(1 + 3 * KINDS + 2)]
    return plan.fill, (tokens, tables[0], *outputs[:6], *tables[1:], *outputs[6:], *sizes, current_stream())


def symbolic_tables():
    """Return an argument of block tables, [requests, blocks]."""
    return symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32())


class PlanSlots:
    """See ops/plan_slots.py. What is of the first kind of layers with entries ends in _a, of the second in _b."""

    @cute.jit
    def fill(
        self,
        tokens,
        window_tables,
        token_ids,
        positions,
        requests,
        first_idx,
        window_slots,
        window_kept,
        state_tables_a,
        entry_tables_a,
        state_tables_b,
        entry_tables_b,
        state_slots_a,
        state_kept_a,
        entry_slots_a,
        num_visible_a,
        state_slots_b,
        state_kept_b,
        entry_slots_b,
        num_visible_b,
        window_rows: Int32,
        state_rows_a: Int32,
        entry_rows_a: Int32,
        ratio_a: Int32,
        state_rows_b: Int32,
        entry_rows_b: Int32,
        ratio_b: Int32,
        num_kinds: Int32,
        in_rings: Int32,
        stream,
    ):
        self.fill_kernel(
            tokens,
            (token_ids, positions, requests, first_idx),
            (window_tables, window_slots, window_kept, window_rows),
            (state_tables_a, state_slots_a, state_kept_a, state_rows_a),
            (entry_tables_a, entry_slots_a, num_visible_a, entry_rows_a, ratio_a),
            (state_tables_b, state_slots_b, state_kept_b, state_rows_b),
            (entry_tables_b, entry_slots_b, num_visible_b, entry_rows_b, ratio_b),
            in_rings,
        ).launch(
            grid=((tokens.shape[1] + THREADS - 1) // THREADS, 1 + num_kinds, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def fill_kernel(self, tokens, of_tokens, window, state_a, entries_a, state_b, entries_b, in_rings: Int32):
        block, part, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        token = block * THREADS + thread
        if token < tokens.shape[1]:
            position, request = tokens[1, token], tokens[2, token]
            if part == 0:
                token_ids, positions, requests, first_idx = of_tokens
                token_ids[token] = Int64(tokens[0, token])
                positions[token] = Int64(position)
                requests[token] = request
                first_idx[token] = tokens[3, token]
                self.ring_row(tokens, *window, in_rings, token, position, request)
            elif part == 1:
                self.ring_row(tokens, *state_a, in_rings, token, position, request)
                self.entry(*entries_a, token, position, request)
            else:
                self.ring_row(tokens, *state_b, in_rings, token, position, request)
                self.entry(*entries_b, token, position, request)

    @cute.jit
    def ring_row(
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

    @cute.jit
    def entry(
        self,
        tables,
        slots,
        num_visible,
        rows_per_block: Int32,
        ratio: Int32,
        token: Int32,
        position: Int32,
        request: Int32,
    ):
        """Fill where the entry goes that a token completes, and how many entries it sees."""
        visible = (position + 1) // ratio
        entry = Int32(-1)
        if visible * ratio == position + 1:
            entry = visible - 1
        num_visible[token] = visible
        slots[token] = Int64(ring_slot(tables, rows_per_block, request, entry))

    @cute.jit
    def write_tables(self, tables, changes, stream):
        self.tables_kernel(tables, changes).launch(
            grid=((changes.shape[0] + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

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
