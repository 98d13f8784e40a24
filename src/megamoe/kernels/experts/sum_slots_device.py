# SPDX-License-Identifier: Apache-2.0
"""Device half of sum_slots."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.experts.sum_slots_config import THREADS, VECTOR, Config

DTYPES = {"bf16": BFloat16, "f32": Float32}


def rows(dtype, num_rows, width: int):
    """Return a contiguous [num_rows, width] argument, 16-byte aligned."""
    stride = cute.sym_int64(divisibility=VECTOR)
    return make_fake_tensor(dtype, (num_rows, width), (stride, 1), assumed_align=16)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_pairs, num_tokens = cute.sym_int32(), cute.sym_int32()
    outputs = rows(BFloat16, num_pairs, config.width)
    out = rows(DTYPES[config.out], num_tokens, config.width)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if config.shared is None:
        return SumSlots(config).plain, (outputs, out, stream)
    shared = rows(DTYPES[config.shared], num_tokens, config.width)
    return SumSlots(config).with_shared, (outputs, shared, out, stream)


class SumSlots:
    """One thread adds eight columns of one token."""

    def __init__(self, config: Config):
        self.config = config
        self.blocks = -(-config.width // (THREADS * VECTOR))

    @cute.jit
    def plain(self, outputs: cute.Tensor, out: cute.Tensor, stream):
        self.kernel(outputs, None, out).launch(
            grid=(self.blocks, out.shape[0], 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def with_shared(self, outputs: cute.Tensor, shared: cute.Tensor, out: cute.Tensor, stream):
        self.kernel(outputs, shared, out).launch(
            grid=(self.blocks, out.shape[0], 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, outputs: cute.Tensor, shared, out: cute.Tensor):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        part, token, _ = cute.arch.block_idx()
        vector = part * THREADS + tid
        if vector < self.config.width // VECTOR:
            total = self.load(outputs, token * self.config.num_slots, vector)
            for slot in cutlass.range_constexpr(1, self.config.num_slots):
                total = total + self.load(outputs, token * self.config.num_slots + slot, vector)
            if cutlass.const_expr(shared is not None):
                total = total + self.load(shared, token, vector)
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), out.element_type)
            rounded.store(total.to(out.element_type))
            cute.autovec_copy(rounded, cute.zipped_divide(out[(token, None)], (VECTOR,))[(None,), vector])

    def load(self, matrix, row: Int32, vector: Int32):
        """Return eight values as fp32."""
        registers = cute.make_rmem_tensor(cute.make_layout(VECTOR), matrix.element_type)
        cute.autovec_copy(cute.zipped_divide(matrix[(row, None)], (VECTOR,))[(None,), vector], registers)
        return registers.load().to(Float32)
