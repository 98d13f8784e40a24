# SPDX-License-Identifier: Apache-2.0
"""Device half of sum_slots."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.experts.sum_slots_config import THREADS, VECTOR, Config
from megamoe.kernels.parts.memory_device import load_global_vector_if
from megamoe.kernels.parts.mma_device import bf16_pair
from megamoe.kernels.parts.ptx_device import from_bits

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
    rest = (make_fake_tensor(Int64, (num_pairs,), (1,)), out, Int32(0), stream)
    if config.shared is None:
        return SumSlots(config).plain, (outputs, *rest)
    shared = rows(DTYPES[config.shared], num_tokens, config.width)
    return SumSlots(config).with_shared, (outputs, shared, *rest)


class SumSlots:
    """One thread adds eight columns of one token."""

    def __init__(self, config: Config):
        self.config = config
        self.blocks = -(-config.width // (THREADS * VECTOR))

    @cute.jit
    def plain(self, outputs: cute.Tensor, ids: cute.Tensor, out: cute.Tensor, num_experts: Int32, stream):
        self.kernel(outputs, None, ids, out, num_experts).launch(
            grid=(self.blocks, out.shape[0], 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def with_shared(
        self, outputs: cute.Tensor, shared: cute.Tensor, ids: cute.Tensor, out: cute.Tensor, num_experts: Int32, stream
    ):
        self.kernel(outputs, shared, ids, out, num_experts).launch(
            grid=(self.blocks, out.shape[0], 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, outputs: cute.Tensor, shared, ids: cute.Tensor, out: cute.Tensor, num_experts: Int32):
        tid, _, _ = cute.arch.thread_idx()
        part, token, _ = cute.arch.block_idx()
        # The ids were there before sort_pairs, which two kernels before this one have waited for.
        present, somebody = [], Boolean(False)
        for slot in cutlass.range_constexpr(self.config.num_slots):
            expert = ids[token * self.config.num_slots + slot]
            present.append((expert >= Int64(0)) & (expert < Int64(num_experts)))
            somebody = somebody | (expert != Int64(-1))
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        vector = part * THREADS + tid
        if vector < self.config.width // VECTOR:
            # All loads are on their way before the first sum: behind branches they would come one after the other.
            num_slots = self.config.num_slots
            words = [self.load_if(present[s], outputs, token * num_slots + s, vector) for s in range(num_slots)]
            if cutlass.const_expr(shared is not None):
                words.append(self.load_if(somebody, shared, token, vector))
            dtypes = [BFloat16] * num_slots + ([] if shared is None else [shared.element_type])
            terms = [self.values(loaded, dtype) for loaded, dtype in zip(words, dtypes, strict=True)]
            total = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            for index in cutlass.range_constexpr(VECTOR):
                added = terms[0][index]
                for term in terms[1:]:
                    added = added + term[index]
                total[index] = added
            rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), out.element_type)
            rounded.store(total.load().to(out.element_type))
            cute.autovec_copy(rounded, cute.zipped_divide(out[(token, None)], (VECTOR,))[(None,), vector])

    def load_if(self, wanted, matrix, row, vector):
        """Return the words of eight values, or zeros without reading any."""
        vector_bytes = VECTOR * matrix.element_type.width // 8
        address = matrix[(row, None)].iterator.toint() + Int64(vector) * vector_bytes
        return [
            word
            for first in range(0, vector_bytes, 16)
            for word in load_global_vector_if(Int32(wanted), address + first, 4)
        ]

    def values(self, words, dtype):
        """Return the values in some words as fp32."""
        if dtype is BFloat16:
            return [value for word in words for value in bf16_pair(word)]
        return [from_bits(word) for word in words]
