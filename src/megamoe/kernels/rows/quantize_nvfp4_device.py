# SPDX-License-Identifier: Apache-2.0
"""Device half of quantize_nvfp4."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.nvfp4_device import BLOCK, block_amax, row_tensor_scale, store_nvfp4
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    current_stream,
    num_blocks,
    overlap_launches,
    store_scalar_if,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.quantize_nvfp4_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    x = symbolic_rows(DTYPES[config.x], num_rows, config.width)
    tensor_scale = symbolic_vector(Float32, num_rows if config.dynamic else 1)
    codes = symbolic_rows(Int32, num_rows, config.width // VECTOR, 8)
    if config.tiled:
        scales = make_fake_tensor(Uint8, (cute.sym_int64(),), (1,))
    else:
        scales = symbolic_rows(Uint8, num_rows, config.width // 16, 1)
    return QuantizeNvFp4(config), (x, tensor_scale, codes, scales, current_stream())


class QuantizeNvFp4:
    """codes, scales = e2m1(x / (g * b)), b = e4m3(amax_16 / (6 g)), g given or max(amax, 1e-12) / 2688."""

    def __init__(self, config: Config):
        self.config = config
        self.tile = row_tile(config.width, 1, BLOCK)

    @cute.jit
    def __call__(self, x: cute.Tensor, tensor_scale: cute.Tensor, codes: cute.Tensor, scales: cute.Tensor, stream):
        self.kernel(x, tensor_scale, codes, scales).launch(
            grid=(num_blocks(self.tile, x.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, tensor_scale: cute.Tensor, codes: cute.Tensor, scales: cute.Tensor):
        tile = self.tile
        scratch = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(tile.warps))
        overlap_launches()
        thread = RowThread(tile, x.shape[0])
        if cutlass.const_expr(not self.config.dynamic):
            given = tensor_scale[0]  # before the row: two latencies at once
        registers = thread.load(x)
        amaxes = [block_amax(registers, index) for index in range(tile.vectors)]
        if cutlass.const_expr(self.config.dynamic):
            scale = row_tensor_scale(thread, amaxes, scratch)
            store_scalar_if(thread.live, thread.lane, scale, tensor_scale, thread.row)
        else:
            scale = given
        store_nvfp4(thread, registers, amaxes, scale, codes, scales, self.config.tiled)
