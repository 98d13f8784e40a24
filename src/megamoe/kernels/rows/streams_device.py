# SPDX-License-Identifier: Apache-2.0
"""Device half of mean_of_streams and add_to_streams."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from megamoe.kernels.parts.ptx_device import add, divide
from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.parts.rows_device import DTYPES, current_stream, overlap_launches, symbolic_rows
from megamoe.kernels.rows.streams_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    streams = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    row = symbolic_rows(DTYPES[config.other], cute.sym_int32(), config.width)
    if config.op == "mean":
        return Streams(config).mean, (streams, row, current_stream())
    y = symbolic_rows(DTYPES[config.x], cute.sym_int32(), config.width)
    return Streams(config).add, (streams, row, y, current_stream())


class Streams:
    """Rows t * X + j are the streams of token t."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def mean(self, x: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, None, y).launch(
            grid=(y.shape[0], 1, 1), block=(self.config.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def add(self, x: cute.Tensor, e: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, e, y).launch(
            grid=(e.shape[0], 1, 1), block=(self.config.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, e, y: cute.Tensor):
        config = self.config
        token, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        num_vectors = config.width // VECTOR
        for first in cutlass.range_constexpr(0, num_vectors, config.threads):
            vector = first + thread
            if vector < num_vectors:
                streams = [self.values(x, token * config.streams + j, vector) for j in range(config.streams)]
                if cutlass.const_expr(e is None):
                    total = streams[0]
                    for one in streams[1:]:
                        total = [add(a, b) for a, b in zip(total, one, strict=True)]
                    mean = [divide(value, Float32(config.streams)) for value in total]
                    self.store(y, token, vector, mean)
                else:
                    row = self.values(e, token, vector)
                    for j in cutlass.range_constexpr(config.streams):
                        total = [add(a, b) for a, b in zip(row, streams[j], strict=True)]
                        self.store(y, token * config.streams + j, vector, total)

    def values(self, matrix, row, vector):
        """Return 8 fp32 values of a row."""
        registers = cute.make_rmem_tensor(cute.make_layout(VECTOR), matrix.element_type)
        cute.autovec_copy(cute.zipped_divide(matrix[(row, None)], (VECTOR,))[(None,), vector], registers)
        values = registers.load().to(Float32)
        return [values[element] for element in range(VECTOR)]

    def store(self, matrix, row, vector, values):
        """Round 8 fp32 values to the dtype of a row and store them."""
        wide = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        for element in range(VECTOR):
            wide[element] = values[element]
        registers = cute.make_rmem_tensor(cute.make_layout(VECTOR), matrix.element_type)
        registers.store(wide.load().to(matrix.element_type))
        cute.autovec_copy(registers, cute.zipped_divide(matrix[(row, None)], (VECTOR,))[(None,), vector])
