# SPDX-License-Identifier: Apache-2.0
"""Device half of fp8_expand."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.fp8.fp8_device import e4m3_pairs, load_scale_if, scaled_pairs
from megamoe.kernels.fp8.fp8_expand_config import THREAD_VALUES, THREADS, Config
from megamoe.kernels.fp8.fp8_stream_config import BLOCK, CHUNK
from megamoe.kernels.fp8.fp8_stream_device import symbolic_scales
from megamoe.kernels.parts.memory_device import load_global_if, store_global_vector

BLOCK_THREADS = BLOCK // THREAD_VALUES


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_codes, num_values, num_blocks = (cute.sym_int64() for _ in range(3))
    factors = make_fake_tensor(
        Float32, (num_blocks, cute.sym_int64()), (cute.sym_int64(divisibility=4), 1), assumed_align=16
    )
    return (expand_folded if config.folded else expand_apart), (
        make_fake_tensor(Uint8, (num_codes,), (1,), assumed_align=16),
        *symbolic_scales(cute.sym_int32()),
        make_fake_tensor(BFloat16 if config.folded else Float16, (num_values,), (1,), assumed_align=16),
        *(() if config.folded else (factors,)),
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


@cute.jit
def expand_folded(x, x_scales, scale_size: Int32, values, count: Int32, num_blocks: Int32, stream):
    launch(x, x_scales, scale_size, values, None, count, num_blocks, stream)


@cute.jit
def expand_apart(x, x_scales, scale_size: Int32, values, factors, count: Int32, num_blocks: Int32, stream):
    launch(x, x_scales, scale_size, values, factors, count, num_blocks, stream)


def launch(x, x_scales, scale_size, values, factors, count, num_blocks, stream):
    """Launch a thread for each step of 16 of 64 columns."""
    expand_kernel(x, x_scales, scale_size, values, factors, count, num_blocks).launch(
        grid=((count + (THREADS - 1)) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream
    )


@cute.kernel
def expand_kernel(
    x: cute.Tensor,
    x_scales: cute.Tensor,
    scale_size: Int32,
    values: cute.Tensor,
    factors,
    count: Int32,
    num_blocks: Int32,
):
    tid, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    piece = bidx * THREADS + tid
    if piece < count:
        if cutlass.const_expr(factors is None):
            start, stride = piece // 8 * BLOCK + piece % 8 * 4, 32
        else:
            start, stride = piece // 4 * CHUNK + piece % 4 * 4, 16
        group = piece // BLOCK_THREADS  # [token, block of columns]
        scale = load_scale_if(Int32(1), x_scales.iterator.toint(), Int64(group), scale_size)
        words = [load_global_if(Int32(1), x.iterator.toint() + Int64(start) + stride * part) for part in range(4)]
        if cutlass.const_expr(factors is None):
            pairs = [scaled_pairs(word, scale) for word in words]
        else:
            pairs = [e4m3_pairs(word) for word in words]
        target = values.iterator.toint() + Int64(piece) * (THREAD_VALUES * 2)
        store_global_vector(target, *[pair[0] for pair in pairs])
        store_global_vector(target + 16, *[pair[1] for pair in pairs])
        if cutlass.const_expr(factors is not None):
            if piece % BLOCK_THREADS == 0:
                factors[group % num_blocks, group // num_blocks] = scale
