# SPDX-License-Identifier: Apache-2.0
"""Device half of embed_streams."""

import cutlass
import cutlass.cute as cute
from cutlass import Int64

from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    copy_if,
    current_stream,
    num_blocks,
    overlap_launches,
    store_if,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.embed_streams_config import Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    table = symbolic_rows(DTYPES[config.table], cute.sym_int32(), config.width)
    token_ids = symbolic_vector(Int64, num_tokens)
    y = symbolic_rows(DTYPES[config.out], cute.sym_int32(), config.width)
    return EmbedStreams(config), (table, token_ids, y, current_stream())


class EmbedStreams:
    """y[t, j] = table[token_ids[t]], zeros where there is no such row."""

    def __init__(self, config: Config):
        self.streams = config.streams
        self.tile = row_tile(config.width)

    @cute.jit
    def __call__(self, table: cute.Tensor, token_ids: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(table, token_ids, y).launch(
            grid=(num_blocks(self.tile, token_ids.shape[0]), 1, 1),
            block=(self.tile.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, table: cute.Tensor, token_ids: cute.Tensor, y: cute.Tensor):
        tile, streams = self.tile, self.streams
        overlap_launches()
        thread = RowThread(tile, token_ids.shape[0])
        token_id = token_ids[thread.row]
        known = (token_id >= 0) & (token_id < Int64(table.shape[0]))
        source = cute.zipped_divide(table[(cutlass.select_(known, token_id, Int64(0)), None)], (VECTOR,))
        registers = cute.make_rmem_tensor(cute.make_layout((VECTOR, tile.vectors)), table.element_type)
        for index in cutlass.range_constexpr(tile.vectors):
            wanted = both(known, thread.has(index))
            copy_if(wanted, source[(None,), thread.vector(index)], registers[None, index])
        targets = [cute.zipped_divide(y[(thread.row * streams + j, None)], (VECTOR,)) for j in range(streams)]
        rounded = cute.make_rmem_tensor(cute.make_layout((VECTOR, tile.vectors)), y.element_type)
        rounded.store(registers.load().to(y.element_type))
        for j in cutlass.range_constexpr(streams):
            for index in cutlass.range_constexpr(tile.vectors):
                wanted = both(thread.live, thread.has(index))
                store_if(wanted, rounded[None, index], targets[j][(None,), thread.vector(index)])
