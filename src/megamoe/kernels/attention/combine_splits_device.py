# SPDX-License-Identifier: Apache-2.0
"""Device half of the kernel that joins the splits of sparse_attention: a block has one token and one head."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.attention.combine_splits_config import THREADS, Config
from megamoe.kernels.attention.sparse_attention_config import TILE, WIDTH
from megamoe.kernels.attention.sparse_attention_device import HEADROOM, LOG2_E, LOWEST, exp2, rotated_back
from megamoe.kernels.parts.memory_device import load_global_vector_if
from megamoe.kernels.parts.pool_device import store_pair
from megamoe.kernels.parts.ptx_device import from_bits, multiply
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_vector

COLUMNS = WIDTH // THREADS


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    parts, stats = (make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=16) for _ in range(2))
    sink, inv_freq = symbolic_vector(Float32, config.heads), symbolic_vector(Float32, config.rope // 2)
    tokens = [make_fake_tensor(dtype, (num_tokens,), (1,)) for dtype in (Int64, Int32, Int32)]
    out = make_fake_tensor(Uint8, (cute.sym_int32(),), (1,), assumed_align=16)
    sizes = [Int32(0) for _ in range(4)]
    return CombineSplits(config), (parts, stats, sink, inv_freq, *tokens, out, *sizes, current_stream())


class CombineSplits:
    """y = sum over splits / (sums + sink), rotated back; splits in their order."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        parts,
        stats,
        sink,
        inv_freq,
        positions,
        requests,
        num_visible,
        out,
        window_size: Int32,
        num_entries: Int32,
        split_tiles: Int32,
        num_splits: Int32,
        stream,
    ):
        self.kernel(
            parts,
            stats,
            sink,
            inv_freq,
            positions,
            requests,
            num_visible,
            out,
            window_size,
            num_entries,
            split_tiles,
            num_splits,
        ).launch(grid=(positions.shape[0], self.config.heads, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(
        self,
        parts,
        stats,
        sink,
        inv_freq,
        positions,
        requests,
        num_visible,
        out,
        window_size: Int32,
        num_entries: Int32,
        split_tiles: Int32,
        num_splits: Int32,
    ):
        config = self.config
        token, head, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        if cutlass.const_expr(config.entries == "all"):
            num_entries = num_visible[token]
        num_tiles = (window_size + TILE - 1) // TILE + (num_entries + TILE - 1) // TILE
        used = (num_tiles + split_tiles - 1) // split_tiles
        if requests[token] < 0:
            used = Int32(0)
        octave, total = Float32(LOWEST), Float32(0.0)
        sums = cute.make_rmem_tensor(cute.make_layout(COLUMNS), Float32)
        sums.fill(0.0)
        column = thread * COLUMNS
        for split in cutlass.range(used, unroll=4):
            place = (Int64(token) * num_splits + split) * config.heads + head
            address = parts.iterator.toint() + (place * WIDTH + column) * 4
            words = load_global_vector_if(Int32(1), address, 4)
            own, weight = stats[place * 2], stats[place * 2 + 1]
            highest = cutlass.max(octave, own)
            before, share = exp2(octave - highest), exp2(own - highest)
            total = total * before + weight * share
            for element in cutlass.range_constexpr(COLUMNS):
                sums[element] = sums[element] * before + from_bits(words[element]) * share
            octave = highest
        denominator = total + exp2(sink[head] * Float32(LOG2_E) - octave + Float32(HEADROOM))
        inverse = Float32(0.0)
        if (denominator > 0.0) & (used > 0):
            inverse = Float32(1.0) / denominator
        position = Int32(positions[token])
        pairs = []
        for pair in cutlass.range_constexpr(COLUMNS // 2):
            left, right = multiply(sums[2 * pair], inverse), multiply(sums[2 * pair + 1], inverse)
            pairs.append(rotated_back(left, right, column + 2 * pair, position, inv_freq, config.rope))
        target = out.iterator.toint() + ((Int64(token) * config.heads + head) * WIDTH + column) * 2
        store_pair(target, *pairs)
