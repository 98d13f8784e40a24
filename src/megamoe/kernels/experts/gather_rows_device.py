# SPDX-License-Identifier: Apache-2.0
"""Device half of gather_rows."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.experts.gather_rows_config import THREADS, Config
from megamoe.kernels.parts.fragment import plain_pair
from megamoe.kernels.parts.fragment_device import block_scales, multiply_bf16x2
from megamoe.kernels.parts.memory_device import (
    load_global_if,
    load_global_int,
    load_global_vector_if,
    store_global_vector_if,
)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_routed, num_pairs, columns = (*(cute.sym_int32() for _ in range(3)), config.num_columns)

    def matrix(dtype, count, width):
        return make_fake_tensor(dtype, (count, width), (width, 1), assumed_align=16)

    def vector(dtype):
        return make_fake_tensor(dtype, (num_pairs,), (1,))

    rows, gather = matrix(BFloat16, num_pairs, columns), GatherRows(config)
    route = make_fake_tensor(Float32, (num_routed,), (1,))
    shared = (Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))
    if config.x == "bf16":
        x = matrix(BFloat16, num_tokens, columns)
        return gather.plain, (x, vector(Int32), route, rows, vector(Float32), *shared)
    x = (
        matrix(Uint8, num_tokens, columns // 2),
        matrix(Uint8, num_tokens, columns // 16),
        make_fake_tensor(Float32, (num_tokens,), (1,)),
    )
    return gather.nvfp4, (*x, vector(Int32), route, rows, vector(Float32), vector(Float32), *shared)


class GatherRows:
    """One block gathers one row; a thread has 16 bytes of it, or one block of 16 codes."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def plain(self, x, order, route, rows, rows_route, num_slots: Int32, stream):
        self.kernel((x,), order, route, rows, None, rows_route, num_slots).launch(
            grid=(order.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def nvfp4(self, x, xs, xt, order, route, rows, rows_scale, rows_route, num_slots: Int32, stream):
        self.kernel((x, xs, xt), order, route, rows, rows_scale, rows_route, num_slots).launch(
            grid=(order.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x, order, route, rows, rows_scale, rows_route, num_slots: Int32):
        tid, _, _ = cute.arch.thread_idx()
        position, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        pair = load_global_int(order.iterator.toint() + Int64(position) * 4)
        if pair >= 0:
            self.gather(x, pair, position, route, rows, rows_scale, rows_route, num_slots, tid)

    @cute.jit
    def gather(
        self, x, pair: Int32, position: Int32, route, rows, rows_scale, rows_route, num_slots: Int32, tid: Int32
    ):
        """Gather the row of a pair."""
        token, num_routed = pair // num_slots, route.shape[0]
        if pair >= num_routed:  # the shared expert's
            token = pair - num_routed
        columns = self.config.num_columns
        target = rows.iterator.toint() + Int64(position) * (columns * 2)
        if cutlass.const_expr(self.config.x == "bf16"):
            source = x[0].iterator.toint() + Int64(token) * (columns * 2)
            self.copy(source, target, tid)
        else:
            codes = x[0].iterator.toint() + Int64(token) * (columns // 2)
            scales = x[1].iterator.toint() + Int64(token) * (columns // 16)
            self.expand(codes, scales, target, tid)
            if tid == 0:
                rows_scale[position] = x[2][token]
        if tid == 0:
            weight = Float32(1.0)
            if pair < num_routed:
                weight = route[pair]
            rows_route[position] = weight

    def copy(self, source, target, tid):
        """Copy a row; all of a thread's loads are on their way before its first store."""
        vectors = self.config.num_columns // 8
        places = [(tid + first, Int32(tid + first < vectors)) for first in range(0, vectors, THREADS)]
        words = [load_global_vector_if(wanted, source + Int64(index) * 16, 4) for index, wanted in places]
        for (index, wanted), word in zip(places, words, strict=True):
            store_global_vector_if(wanted, target + Int64(index) * 16, *word)

    def expand(self, codes, scales, target, tid):
        """Expand a row of codes."""
        blocks = self.config.num_columns // 16
        places = [(tid + first, Int32(tid + first < blocks)) for first in range(0, blocks, THREADS)]
        words = [load_global_vector_if(wanted, codes + Int64(index) * 8, 2) for index, wanted in places]
        bytes_of = [load_global_if(wanted, scales + Int64(index), 8) for index, wanted in places]
        for (index, wanted), word, byte in zip(places, words, bytes_of, strict=True):
            scale = block_scales(byte)[0]
            pairs = [
                multiply_bf16x2(plain_pair(word[code // 4] >> (8 * (code % 4)), Uint32), scale) for code in range(8)
            ]
            store_global_vector_if(wanted, target + Int64(index) * 32, *pairs[:4])
            store_global_vector_if(wanted, target + Int64(index) * 32 + 16, *pairs[4:])
