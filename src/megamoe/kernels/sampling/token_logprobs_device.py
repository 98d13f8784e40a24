# SPDX-License-Identifier: Apache-2.0
"""Device half of token_logprobs."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.logits_device import (
    LEAST,
    NO_INDEX,
    block_best,
    order_of,
    row_best,
    symbolic_column,
    symbolic_logits,
)
from megamoe.kernels.parts.ptx_device import add, subtract
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, share_among_warps
from megamoe.kernels.sampling.token_logprobs_config import THREADS, Config

WARPS = THREADS // 32


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows, num_top = cute.sym_int32(), cute.sym_int32()
    top_ids, top = (make_fake_tensor(dtype, (num_rows, num_top), (cute.sym_int64(), 1)) for dtype in (Int64, Float32))
    token_ids, chosen = symbolic_column(Int64, num_rows), symbolic_column(Float32, num_rows)
    return TokenLogprobs(), (symbolic_logits(num_rows), token_ids, chosen, top_ids, top, current_stream())


class TokenLogprobs:
    """See ops/token_logprobs.py."""

    @cute.jit
    def __call__(self, logits, token_ids, chosen, top_ids, top, stream):
        self.kernel(logits, token_ids, chosen, top_ids, top).launch(
            grid=(chosen.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, logits, token_ids, chosen, top_ids, top):
        row, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        shared = cutlass.memory.SmemAllocator()
        scratch = shared.allocate_tensor(Int32, cute.make_layout((2, WARPS)))
        sums = shared.allocate_tensor(Float32, cute.make_layout(WARPS))
        overlap_launches()
        token, num_tokens = Int32(token_ids[row]), logits.shape[1]
        if token < 0:
            if thread == 0:
                chosen[row] = Float32(0.0)
            for place in cutlass.range(thread, top_ids.shape[1], THREADS):
                top_ids[row, place] = Int64(-1)
                top[row, place] = Float32(0.0)
        else:
            last_order, last_index = row_best(logits, row, thread, THREADS, scratch)
            best = logits[row, last_index]
            total = Float32(0.0)
            for one in cutlass.range(thread, num_tokens, THREADS, unroll=4):
                total = total + cute.math.exp(subtract(logits[row, one], best))
            total = cute.arch.warp_reduction(total, lambda a, b: a + b, threads_in_group=32)
            share_among_warps(total, sums)
            total = sums[0]
            for warp in cutlass.range_constexpr(1, WARPS):
                total = total + sums[warp]
            shift = add(best, cute.math.log(total))
            if thread == 0:
                chosen[row] = subtract(logits[row, cutlass.min(token, num_tokens - 1)], shift)
            for place in cutlass.range(top_ids.shape[1], unroll=1):
                if place > 0:
                    order, index = Int32(LEAST), Int32(NO_INDEX)
                    for one in cutlass.range(thread, num_tokens, THREADS, unroll=4):
                        own = order_of(logits[row, one])
                        is_behind = (own < last_order) | ((own == last_order) & (one > last_index))
                        if is_behind & ((own > order) | (index == NO_INDEX)):
                            order, index = own, one
                    last_order, last_index = block_best(order, index, scratch, WARPS)
                if thread == 0:
                    top_ids[row, place] = Int64(last_index)
                    top[row, place] = subtract(logits[row, last_index], shift)
