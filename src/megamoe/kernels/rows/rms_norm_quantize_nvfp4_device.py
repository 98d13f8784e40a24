# SPDX-License-Identifier: Apache-2.0
"""Device half of rms_norm_quantize_nvfp4."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8

from megamoe.kernels.parts.nvfp4_device import BLOCK, block_amax, row_tensor_scale, store_nvfp4
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    current_stream,
    num_blocks,
    overlap_launches,
    row_rms_factor,
    store_if,
    store_scalar_if,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.rms_norm_quantize_nvfp4_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows, width = cute.sym_int32(), config.width
    x = symbolic_rows(BFloat16, num_rows, width)
    weight = symbolic_vector(DTYPES[config.weight], width)
    y = symbolic_rows(BFloat16, num_rows, width)
    tensor_scale = symbolic_vector(Float32, num_rows)
    codes = symbolic_rows(Int32, num_rows, width // VECTOR, 8)
    scales = symbolic_rows(Uint8, num_rows, width // 16, 1)
    arguments = (x, weight, y, tensor_scale, codes, scales, Float32(0.0), current_stream())
    return RmsNormQuantizeNvFp4(config), arguments


class RmsNormQuantizeNvFp4:
    """y = rms_norm(x, weight) rounded to bf16; then codes, scales and tensor scale of y."""

    def __init__(self, config: Config):
        self.tile = row_tile(config.width, 1, BLOCK)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        weight: cute.Tensor,
        y: cute.Tensor,
        tensor_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        eps: Float32,
        stream,
    ):
        self.kernel(x, weight, y, tensor_scale, codes, scales, eps).launch(
            grid=(num_blocks(self.tile, x.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        weight: cute.Tensor,
        y: cute.Tensor,
        tensor_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        eps: Float32,
    ):
        tile = self.tile
        shared = cutlass.memory.SmemAllocator()
        sum_scratch = shared.allocate_tensor(Float32, cute.make_layout(tile.warps))
        max_scratch = shared.allocate_tensor(Float32, cute.make_layout(tile.warps))  # the sum may still be being read
        overlap_launches()
        thread = RowThread(tile, x.shape[0])
        registers = thread.load(x)
        factor = row_rms_factor(thread, registers, eps, sum_scratch)
        target = cute.zipped_divide(y[(thread.row, None)], (BLOCK,))
        normed = cute.make_rmem_tensor(cute.make_layout((BLOCK, tile.vectors)), BFloat16)
        for index in cutlass.range_constexpr(tile.vectors):
            result = registers[None, index].load().to(Float32) * factor * thread.load_shared(weight, index)
            normed[None, index].store(result.to(BFloat16))
            store_if(both(thread.live, thread.has(index)), normed[None, index], target[(None,), thread.vector(index)])
        amaxes = [block_amax(normed, index) for index in range(tile.vectors)]
        scale = row_tensor_scale(thread, amaxes, max_scratch)
        store_scalar_if(thread.live, thread.lane, scale, tensor_scale, thread.row)
        store_nvfp4(thread, normed, amaxes, scale, codes, scales)
