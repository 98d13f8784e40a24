# SPDX-License-Identifier: Apache-2.0
"""Device half of embed_streams."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.parts.rows_device import DTYPES, current_stream, overlap_launches, symbolic_rows
from megamoe.kernels.rows.embed_streams_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    table = symbolic_rows(DTYPES[config.table], cute.sym_int32(), config.width)
    token_ids = make_fake_tensor(Int64, (cute.sym_int32(),), (1,))
    y = symbolic_rows(DTYPES[config.out], cute.sym_int32(), config.width)
    return EmbedStreams(config), (table, token_ids, y, current_stream())


class EmbedStreams:
    """y[t * X + j] = table[token_ids[t]], zeros where that is -1."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(self, table: cute.Tensor, token_ids: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(table, token_ids, y).launch(
            grid=(token_ids.shape[0], 1, 1), block=(self.config.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, table: cute.Tensor, token_ids: cute.Tensor, y: cute.Tensor):
        config = self.config
        token, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        row = Int32(token_ids[token])
        is_somebody = row >= 0
        source = cute.zipped_divide(table[(cutlass.max(row, 0), None)], (VECTOR,))
        num_vectors = config.width // VECTOR
        for first in cutlass.range_constexpr(0, num_vectors, config.threads):
            vector = first + thread
            if vector < num_vectors:
                values = cute.make_rmem_tensor(cute.make_layout(VECTOR), table.element_type)
                values.fill(0)
                if is_somebody:
                    cute.autovec_copy(source[(None,), vector], values)
                rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
                rounded.store(values.load().to(y.element_type))
                for stream in cutlass.range_constexpr(config.streams):
                    target = cute.zipped_divide(y[(token * config.streams + stream, None)], (VECTOR,))
                    cute.autovec_copy(rounded, target[(None,), vector])
