# SPDX-License-Identifier: Apache-2.0
"""Device side of kernels that work on rows: a thread's share of a row, and reductions over the row."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.parts.rows import WARP, RowTile

DTYPES = {"bf16": BFloat16, "f32": Float32}


def symbolic_rows(dtype, num_rows, width: int, align_bytes: int = 16):
    """Return a [num_rows, width] argument of any row stride that keeps rows aligned.

    The stride is symbolic for outputs as well: with a static one, offsets would be computed in 32 bits.
    """
    stride = cute.sym_int64(divisibility=max(1, align_bytes * 8 // dtype.width))
    return make_fake_tensor(dtype, (num_rows, width), (stride, 1), assumed_align=align_bytes)


def symbolic_heads(dtype, num_tokens, heads: int, width: int):
    """Return a [num_tokens, heads, width] argument of any strides that keep rows 16-byte aligned."""
    step = 128 // dtype.width
    strides = (cute.sym_int64(divisibility=step), cute.sym_int64(divisibility=step), 1)
    return make_fake_tensor(dtype, (num_tokens, heads, width), strides, assumed_align=16)


def symbolic_vector(dtype, size):
    """Return a [size] argument, 16-byte aligned if its size is static."""
    return make_fake_tensor(dtype, (size,), (1,), assumed_align=16 if isinstance(size, int) and size > 1 else None)


def current_stream():
    """Return the argument that becomes torch's current stream at launch, without being passed."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)


def overlap_launches():
    """Let the next kernel's blocks be placed, then wait until the kernel before this one has finished.

    For launches with use_pdl: the time it takes to start a grid passes while another grid is running. Nothing that a
    kernel may have written is touched before.
    """
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()


class RowThread:
    """This thread's share of one row of a block.

    Attributes:
        row: the row's index; rows past the last one repeat it, and `live` says not to store them.
        lane: position among the row's threads.
    """

    def __init__(self, tile: RowTile, num_rows):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        self.tile = tile
        if cutlass.const_expr(tile.rows == 1):
            self.lane, self.row, self.live = tidx, bidx, True
        else:
            self.lane = tidx % tile.lanes
            row = bidx * tile.rows + tidx // tile.lanes
            self.live = row < num_rows
            self.row = cutlass.min(row, num_rows - 1)

    def vector(self, index: int):
        """Return which vector of the row this thread holds at `index`."""
        return index * self.tile.lanes + self.lane

    def has(self, index: int):
        """Return whether there is a vector at `index`: the constant True where the tile is exact."""
        tile = self.tile
        if index * tile.lanes + tile.lanes <= tile.width // tile.size:
            return True
        return self.vector(index) < tile.width // tile.size

    def load(self, matrix):
        """Return this thread's part of its row of a matrix; see load_row."""
        return self.load_row(matrix[(self.row, None)])

    def load_row(self, row):
        """Return this thread's part of a row as a register tensor [size, vectors]; missing vectors are zero."""
        tile = self.tile
        registers = cute.make_rmem_tensor(cute.make_layout((tile.size, tile.vectors)), row.element_type)
        source = cute.zipped_divide(row, (tile.size,))
        for index in range(tile.vectors):
            copy_if(self.has(index), source[(None,), self.vector(index)], registers[None, index])
        return registers

    def load_shared(self, vector, index: int):
        """Return the fp32 values of a [K] tensor that stand at this thread's vector `index`."""
        size = self.tile.size
        registers = cute.make_rmem_tensor(cute.make_layout(size), vector.element_type)
        copy_if(self.has(index), cute.zipped_divide(vector, (size,))[(None,), self.vector(index)], registers)
        return registers.load().to(Float32)

    def sum(self, value, scratch):
        """Return the sum of `value` over the row's threads, to all of them; `scratch` has a float per warp."""
        return self._reduce(value, lambda a, b: a + b, scratch)

    def max(self, value, scratch):
        """Return the maximum of `value` over the row's threads; NaN wins."""
        return self._reduce(value, lambda a, b: cute.arch.fmax(a, b, nan=True), scratch)

    def _reduce(self, value, combine, scratch):
        tile = self.tile
        value = cute.arch.warp_reduction(value, combine, threads_in_group=min(WARP, tile.lanes))
        if cutlass.const_expr(tile.warps == 1):
            return value
        share_among_warps(value, scratch)
        total = scratch[0]
        for warp in range(1, tile.warps):
            total = combine(total, scratch[warp])
        return total


@cute.jit
def copy_if(wanted, source: cute.Tensor, target: cute.Tensor):
    """Copy a vector, or fill the target with zeros."""
    if cutlass.const_expr(wanted is True):
        cute.autovec_copy(source, target)
    else:
        target.fill(0)
        if wanted:
            cute.autovec_copy(source, target)


@cute.jit
def store_if(wanted, source: cute.Tensor, target: cute.Tensor):
    """Store a vector if `wanted`."""
    if cutlass.const_expr(wanted is True):
        cute.autovec_copy(source, target)
    else:
        if wanted:
            cute.autovec_copy(source, target)


@cute.jit
def store_scalar_if(wanted, lane: Int32, value: Float32, target: cute.Tensor, index: Int32):
    """Let the first of a row's threads store a value if `wanted`."""
    if both(wanted, lane == 0):
        target[index] = value


@cute.jit
def share_among_warps(value: Float32, scratch: cute.Tensor):
    """Put each warp's value into shared memory, visible to the whole block."""
    warp = cute.arch.warp_idx()  # a shuffle of the whole warp: inside the branch, one lane would wait for 31 others
    if cute.arch.lane_idx() == 0:
        scratch[warp] = value
    cute.arch.sync_threads()


def row_rms_factor(thread: RowThread, registers, eps, scratch):
    """Return rsqrt(mean(x^2) + eps) of a row in registers."""
    square_sum = Float32(0.0)
    for index in range(thread.tile.vectors):
        values = registers[None, index].load().to(Float32)
        for element in range(thread.tile.size):
            square_sum = square_sum + values[element] * values[element]
    mean_square = thread.sum(square_sum, scratch) / thread.tile.width
    return cute.math.rsqrt(mean_square + eps)


def both(a, b):
    """Return a and b, where either may be the constant True."""
    if a is True:
        return b
    return a if b is True else a & b


def num_blocks(tile: RowTile, num_rows) -> Int32:
    """Return the grid size for `num_rows` rows."""
    return (num_rows + tile.rows - 1) // tile.rows
