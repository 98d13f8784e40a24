# SPDX-License-Identifier: Apache-2.0
"""Device half of penalize."""

import cutlass.cute as cute
from cutlass import Float32, Int64

from megamoe.kernels.parts.logits_device import symbolic_column, symbolic_logits
from megamoe.kernels.parts.ptx_device import divide, multiply, subtract
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches
from megamoe.kernels.sampling.penalize_config import THREADS, Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows, num_pairs = cute.sym_int32(), cute.sym_int32()
    pairs = [symbolic_column(dtype, num_pairs) for dtype in (Int64, Int64, Float32)]
    factors = [symbolic_column(Float32, num_rows) for _ in range(3)]
    return Penalize(), (symbolic_logits(num_rows), *pairs, *factors, current_stream())


class Penalize:
    """See ops/penalize.py."""

    @cute.jit
    def __call__(self, logits, row_idx, token_ids, counts, repetition, presence, frequency, stream):
        self.kernel(logits, row_idx, token_ids, counts, repetition, presence, frequency).launch(
            grid=((row_idx.shape[0] + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, logits, row_idx, token_ids, counts, repetition, presence, frequency):
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        pair = block * THREADS + thread
        if pair < row_idx.shape[0]:
            row, token = row_idx[pair], token_ids[pair]
            is_row = (row >= 0) & (row < Int64(logits.shape[0]))
            if is_row & (token >= 0) & (token < Int64(logits.shape[1])):
                value, factor, count = logits[row, token], repetition[row], counts[pair]
                if value > 0.0:
                    value = divide(value, factor)
                else:
                    value = multiply(value, factor)
                if count > 0.0:
                    value = subtract(subtract(value, multiply(frequency[row], count)), presence[row])
                logits[row, token] = value
