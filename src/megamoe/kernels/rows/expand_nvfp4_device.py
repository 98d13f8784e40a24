# SPDX-License-Identifier: Apache-2.0
"""Device half of expand_nvfp4."""

import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.parts.fragment import plain_pair
from megamoe.kernels.parts.fragment_device import block_scales, multiply_bf16x2
from megamoe.kernels.parts.memory_device import load_global_if, load_global_vector, store_global_vector
from megamoe.kernels.rows.expand_nvfp4_config import THREADS, Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_code_bytes, num_blocks, num_values = (cute.sym_int64() for _ in range(3))
    return expand, (
        make_fake_tensor(Uint8, (num_code_bytes,), (1,), assumed_align=16),
        make_fake_tensor(Uint8, (num_blocks,), (1,), assumed_align=16),
        make_fake_tensor(BFloat16, (num_values,), (1,), assumed_align=16),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


@cute.jit
def expand(codes: cute.Tensor, scales: cute.Tensor, x: cute.Tensor, num_blocks: Int32, stream):
    expand_kernel(codes, scales, x, num_blocks).launch(
        grid=((num_blocks + (THREADS - 1)) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
    )


@cute.kernel
def expand_kernel(codes: cute.Tensor, scales: cute.Tensor, x: cute.Tensor, num_blocks: Int32):
    """Let each thread expand one block of 16."""
    tid, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()
    block = bidx * THREADS + tid
    if block < num_blocks:
        words = load_global_vector(codes.iterator.toint() + Int64(block) * 8, 2)
        scale = block_scales(load_global_if(Int32(1), scales.iterator.toint() + Int64(block), 8))[0]
        pairs = [
            multiply_bf16x2(plain_pair(words[index // 4] >> (8 * (index % 4)), Uint32), scale) for index in range(8)
        ]
        address = x.iterator.toint() + Int64(block) * 32
        store_global_vector(address, *pairs[:4])
        store_global_vector(address + 16, *pairs[4:])
