# SPDX-License-Identifier: Apache-2.0
"""Device half of attention in tiles on wgmma.

Rows, weights and the end are those of attention_tiles_device.py. The eight multiplying warps are two warpgroups: each
computes the scores of all heads with 32 of a tile's items, and sums the values of 256 columns, so that a thread's sums
belong to the two heads whose weights it computes. The scores of the next tile are queued behind the values of this
one, and fetching warps refill a tile while the next one is weighed and added.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.kernels.attention import attention_tiles_device
from megamoe.kernels.attention.attention_device import LOWEST
from megamoe.kernels.attention.attention_tiles_config import TILE_ITEMS
from megamoe.kernels.attention.attention_tiles_device import AttentionTiles, everyone
from megamoe.kernels.attention.attention_tiles_sm90_config import Config
from megamoe.kernels.parts.memory_device import arrive_if, wait_barrier

GROUP_ITEMS = 32  # whose scores a warpgroup computes
GROUP_COLUMNS = 256  # that a warpgroup sums


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    _, arguments = attention_tiles_device.program(config)
    return AttentionTilesSm90(config), arguments


class AttentionTilesSm90(AttentionTiles):
    """See ops/sparse_attention.py."""

    def __init__(self, config: Config):
        self.config = config
        self.registers = (72, 184)
        self.warp_tiles, self.warp_blocks = 1, GROUP_COLUMNS // 64

    def place_of_sums(self, warp):
        """Return the first head and the first column block of the sums that a warp has."""
        return warp % 4 * 16, warp // 4 * self.warp_blocks

    def publish(self):
        """Make what this thread has stored to shared memory visible to wgmma."""
        cute.arch.fence_proxy("async.shared", space="cta")

    def operand(self, offset: int, layout):
        """Return a part of shared memory as an operand of wgmma."""
        pointer = cute.recast_ptr(self.memory.iterator + offset, layout.inner, dtype=Float16)
        return cute.make_tensor(pointer, layout.outer)

    @cute.jit
    def multiply(
        self,
        q,
        sink,
        positions,
        inv_freq,
        out,
        stats,
        token: Int32,
        head_block: Int32,
        split: Int32,
        first: Int32,
        last: Int32,
        scale: Float32,
        thread: Int32,
        warp: Int32,
    ):
        """Scores, weights and sums of all tiles; then the result, or the share of it."""
        config = self.config
        lane, key_group = thread % 32, warp // 4
        row = warp % 4 * 16 + lane // 4  # of this thread's scores and sums; the other one is 8 further
        if first < last:
            self.load_queries(q, token, head_block, thread)
        self.publish()
        everyone()

        major = warpgroup.OperandMajorMode
        score_mma = hopper_helpers.make_trivial_tiled_mma(
            Float16, Float16, major.K, major.K, Float32, (1, 1, 1), (config.rows, GROUP_ITEMS)
        )
        value_mma = hopper_helpers.make_trivial_tiled_mma(
            Float16, Float16, major.K, major.MN, Float32, (1, 1, 1), (config.rows, GROUP_COLUMNS // 2)
        )
        by_columns, by_items = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        whole = (config.rows, TILE_ITEMS, config.width)
        queries = self.operand(0, hopper_helpers.make_smem_layout_a(by_columns, whole, Float16, 2))
        keys = self.operand(config.query_bytes, hopper_helpers.make_smem_layout_b(by_columns, whole, Float16, 2))
        values = self.operand(
            config.query_bytes,
            hopper_helpers.make_smem_layout_b(by_items, (config.rows, config.width, TILE_ITEMS), Float16, 2),
        )
        weights = self.operand(
            config.query_bytes + 2 * config.tile_bytes,
            hopper_helpers.make_smem_layout_a(by_columns, (config.rows, 1, TILE_ITEMS), Float16, 2),
        )
        keys = cute.local_tile(keys, (GROUP_ITEMS, config.width), (key_group, 0, None))
        values = cute.local_tile(values, (GROUP_COLUMNS, TILE_ITEMS), (key_group, 0, None))
        of_scores, of_values = score_mma.get_slice(thread % 128), value_mma.get_slice(thread % 128)
        queries = score_mma.make_fragment_A(of_scores.partition_A(queries))
        keys = score_mma.make_fragment_B(of_scores.partition_B(keys))
        weights = value_mma.make_fragment_A(of_values.partition_A(weights))
        values = value_mma.make_fragment_B(of_values.partition_B(values))
        scores = cute.make_rmem_tensor(score_mma.partition_shape_C((config.rows, GROUP_ITEMS)), Float32)
        sums = cute.make_rmem_tensor(value_mma.partition_shape_C((config.rows, GROUP_COLUMNS)), Float32)
        score_mma.set(warpgroup.Field.ACCUMULATE, True)
        value_mma.set(warpgroup.Field.ACCUMULATE, True)
        sums.fill(0.0)
        by_place = cute.make_tensor(sums.iterator, cute.make_layout((1, GROUP_COLUMNS // 8, 4), stride=(0, 4, 1)))
        scores_by_place = cute.make_tensor(scores.iterator, cute.make_layout((GROUP_ITEMS // 8, 4), stride=(4, 1)))
        power = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        power.fill(LOWEST)
        total.fill(0.0)
        if first < last:
            wait_barrier(self.full, Int32(0))
            self.start_scores(score_mma, scores, queries, keys, Int32(0), Int32(0))
            warpgroup.wait_group(0)
            for tile in cutlass.range(first, last - 1, unroll=1):
                index = tile - first
                buffer, following, zero = index % 2, (index + 1) % 2, index >> 24
                logits = self.logits(scores_by_place, scale, buffer, key_group, lane)
                factors = self.weigh(logits, power, total, row, key_group, lane)
                self.start_values(value_mma, sums, by_place, weights, values, buffer, factors, zero)
                wait_barrier(self.full + following * 8, (index + 1) // 2 % 2)
                self.start_scores(score_mma, scores, queries, keys, following, zero)
                warpgroup.wait_group(1)  # the values are added; the scores of the next tile are under way
                arrive_if(lane == 0, self.empty + buffer * 8)
                warpgroup.wait_group(0)
            buffer = (last - 1 - first) % 2
            logits = self.logits(scores_by_place, scale, buffer, key_group, lane)
            factors = self.weigh(logits, power, total, row, key_group, lane)
            self.start_values(value_mma, sums, by_place, weights, values, buffer, factors, Int32(0))
            warpgroup.wait_group(0)
        self.end(
            by_place,
            power,
            total,
            row,
            key_group,
            sink,
            positions,
            inv_freq,
            out,
            stats,
            token,
            head_block,
            split,
            first,
            last,
            thread,
            warp,
        )

    def start_scores(self, mma, scores, queries, keys, buffer, zero):
        """Start the products of all heads with this warpgroup's items of a tile.

        Args:
            mma, scores, queries, keys: the product, its result and its operands.
            buffer: which of the two tiles.
            zero: 0, of which the compiler does not know that it is the same for all tiles; else it would keep the
                descriptors of all steps in registers, of which there are none left.
        """
        scores.fill(0.0)
        warpgroup.fence()
        for step in range(self.config.width // 16):
            cute.gemm(mma, scores, queries[None, None, step, zero], keys[None, None, step, buffer], scores)
        warpgroup.commit_group()

    def start_values(self, mma, sums, by_place, weights, values, buffer, factors, zero):
        """Start adding the values of this warpgroup's columns."""
        for half in range(2):
            rescale_half(by_place, half, factors[half])
        warpgroup.fence()
        for step in range(TILE_ITEMS // 16):
            cute.gemm(mma, sums, weights[None, None, step, zero], values[None, None, step, buffer], sums)
        warpgroup.commit_group()


@cute.jit
def rescale_half(sums: cute.Tensor, half: cutlass.Constexpr, factor: Float32):
    """Multiply the sums of a head by a power of two, unless it is 1."""
    if factor != 1.0:
        for columns in cutlass.range_constexpr(GROUP_COLUMNS // 8):
            for one in cutlass.range_constexpr(2):
                sums[0, columns, 2 * half + one] = sums[0, columns, 2 * half + one] * factor
