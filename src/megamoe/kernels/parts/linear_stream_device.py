# SPDX-License-Identifier: Apache-2.0
"""y = x w^T for few tokens: a weight streamed once, tokens in registers (parts/linear_stream.py)."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_SCALE_BYTES
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.linear_stream import BLOCKS_PER_MULTIPROCESSOR, RING_BARRIER_BYTES, Config, LinearPlan
from megamoe.kernels.parts.memory_device import (
    address_in_block,
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_float,
    load_shared_float,
    send_float,
    wait_barrier,
)
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_device import Ring, StreamThread, nvfp4_tokens, plain_tokens

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}


def matrix(dtype, num_rows, num_columns: int):
    """Return a contiguous [num_rows, num_columns] argument, 16-byte aligned."""
    return make_fake_tensor(dtype, (num_rows, num_columns), (num_columns, 1), assumed_align=16)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16)
    num_columns = config.num_columns
    weight = (
        matrix(Uint8, num_rows, num_columns // 2),
        matrix(Uint8, num_rows, num_columns // 16),
        make_fake_tensor(Float32, (1,), (1,)),
    )
    out = rows_of(OUT_DTYPES[config.out], num_tokens, num_rows)
    last = (out, Int32(0), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))
    if config.adds:
        last = (rows_of(Float32, num_tokens, num_rows), *last)
    linear = LinearStream(config)
    if config.x == "bf16":
        launcher = linear.weight_only_more if config.adds else linear.weight_only
        return launcher, (matrix(BFloat16, num_tokens, num_columns), *weight, *last)
    x = (
        matrix(Uint8, num_tokens, num_columns // 2),
        matrix(Uint8, num_tokens, num_columns // 16),
        make_fake_tensor(Float32, (num_tokens,), (1,)),
    )
    return linear.both_nvfp4_more if config.adds else linear.both_nvfp4, (*x, *weight, *last)


def rows_of(dtype, num_rows, num_columns):
    """Return a contiguous [num_rows, num_columns] argument with symbolic columns, a multiple of 16."""
    return make_fake_tensor(dtype, (num_rows, num_columns), (cute.sym_int64(divisibility=16), 1), assumed_align=16)


class SegmentThread(StreamThread):
    """A thread of a block of a cluster: its warp has one segment of every rank of the block.

    Attributes:
        rank: the block's place in the cluster.
        first_ranks: the block's ranks.
    """

    def __init__(self, plan: LinearPlan, rank):
        super().__init__(plan)
        self.rank = rank
        self.ranks = [rank * plan.ranks_per_block + index for index in range(plan.ranks_per_block)]
        self.own_chunks = [
            (one * plan.used_warps + self.warp) * plan.segment_chunks for one in self.ranks
        ]
        self.first_chunks = self.own_chunks
        self.overlapping = plan.ranks * plan.used_warps * plan.segment_chunks > plan.chunks
        if self.overlapping:
            last = plan.chunks - plan.segment_chunks
            self.first_chunks = [cutlass.min(own, last) for own in self.own_chunks]

    def issue_segment(self, wanted, slot, codes, scales, row_chunk, index: int):
        """Fill a slot with a segment of the row tile that starts at a chunk."""
        plan = self.plan
        code_bytes, scale_bytes = plan.segment_chunks * TILE_CODE_BYTES, plan.segment_chunks * TILE_SCALE_BYTES
        wanted = wanted & self.is_issuer
        chunk = row_chunk + self.first_chunks[index]
        barrier, target = self.barriers + slot * 8, self.ring + slot * plan.slot_bytes
        expect_bytes_if(wanted, barrier, Int32(code_bytes + scale_bytes))
        bulk_copy_if(wanted, target, codes + chunk * TILE_CODE_BYTES, Int32(code_bytes), barrier)
        bulk_copy_if(wanted, target + code_bytes, scales + chunk * TILE_SCALE_BYTES, Int32(scale_bytes), barrier)

    def _raw_tokens(self, load_raw, num_tokens, tile: int, chunk: int):
        index, place = divmod(chunk, self.plan.segment_chunks)
        wanted = tile * TOKENS_PER_TILE + self.row < num_tokens
        chunk = self.first_chunks[index] + place
        if self.overlapping:
            wanted = wanted & (chunk >= self.own_chunks[index])
        return load_raw(tile, Int32(wanted), chunk)

    @cute.jit
    def init_exchange(self):
        """Make the mbarriers of sums from the cluster ready: each waits for the sums of one turn (see `send`)."""
        if self.tid == 0:
            for turn in cutlass.range_constexpr(2):
                init_barrier(self._exchange_barrier(Int32(turn)), Int32(1))
        for turn in cutlass.range_constexpr(2):
            self.expect_sums(Int32(turn))

    def outputs(self, count: int):
        """Return which of `count` outputs this thread has to add, some of them perhaps past the last one."""
        return [self.tid + offset for offset in range(0, count, self.plan.threads)]

    def block_sum(self, unit, tile, token, row):
        """Return the block's sum for one token and row of one of a unit's row tiles."""
        first = tile * self.plan.ranks_per_block
        total = self.sum_partials(unit, first, token, row)
        if self.plan.ranks_per_block == 2:
            total = total + self.sum_partials(unit, first + 1, token, row)
        return total

    def _exchange(self, turn, rank, output):
        """Return where the sum of a block of the cluster goes, in the block that finishes a row tile."""
        plan = self.plan
        place = ((turn & 1) * plan.cluster + rank) * plan.tile_outputs + output
        return self.shared + plan.exchange_offset + place * 4

    def _exchange_barrier(self, turn):
        return self.shared + RING_BARRIER_BYTES + (turn & 1) * 8

    def expect_sums(self, turn):
        """Announce the sums of a turn."""
        num_bytes = self.plan.cluster * self.plan.tile_outputs * 4
        expect_bytes_if(self.tid == 0, self._exchange_barrier(turn), Int32(num_bytes))

    def wait_sums(self, turn):
        """Wait until the sums of a turn are there."""
        wait_barrier(self._exchange_barrier(turn), (turn >> 1) & 1)

    def send(self, turn, target, output, value):
        """Send the block's sum to the block that finishes the row tile."""
        address = address_in_block(self._exchange(turn, self.rank, output), target)
        send_float(address, value, address_in_block(self._exchange_barrier(turn), target))

    def cluster_sum(self, turn, output):
        """Return the sum over the cluster's blocks."""
        sums = [load_shared_float(self._exchange(turn, rank, output)) for rank in range(self.plan.cluster)]
        while len(sums) > 1:
            sums = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]


class LinearStream:
    """The streaming linear."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_blocks: Int32, num_passes: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, None, out, num_blocks, num_passes, stream)

    @cute.jit
    def weight_only_more(self, x, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, num_passes: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, earlier, out, num_blocks, num_passes, stream)

    @cute.jit
    def both_nvfp4(
        self, x_codes, x_scales, x_tensor_scale, codes, scales, tensor_scale, out, num_blocks: Int32, num_passes: Int32, stream
    ):
        x = (x_codes, x_scales, x_tensor_scale)
        self.launch(x, codes, scales, tensor_scale, None, out, num_blocks, num_passes, stream)

    @cute.jit
    def both_nvfp4_more(
        self, x_codes, x_scales, x_tensor_scale, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, num_passes: Int32, stream
    ):
        x = (x_codes, x_scales, x_tensor_scale)
        self.launch(x, codes, scales, tensor_scale, earlier, out, num_blocks, num_passes, stream)

    def launch(self, x, codes, scales, tensor_scale, earlier, out, num_blocks, num_passes, stream):
        """Launch the kernel; it may start before the kernel ahead of it has finished (see the wait inside)."""
        self.kernel(x, codes, scales, tensor_scale, earlier, out, num_blocks, num_passes).launch(
            grid=(num_blocks, 1, 1),
            block=(self.plan.threads, 1, 1),
            cluster=(self.plan.cluster, 1, 1),
            smem=self.plan.shared_bytes,
            stream=stream,
            use_pdl=self.config.overlaps,
            min_blocks_per_mp=BLOCKS_PER_MULTIPROCESSOR,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, x, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, num_passes: Int32):
        plan, config = self.plan, self.config
        self.num_tokens, num_rows = out.shape
        self.num_row_tiles = num_rows // 16
        num_units = plan.num_units(self.num_row_tiles)
        block, _, _ = cute.arch.block_idx()
        cluster, num_clusters = block // plan.cluster, num_blocks // plan.cluster
        self.first_token = Int32(0)
        if cutlass.const_expr(not config.one_pass):
            of_pass = cluster % num_passes
            self.first_token = of_pass * config.tokens_per_pass
            cluster, num_clusters = cluster // num_passes, num_clusters // num_passes
        begin, end = cluster * num_units // num_clusters, (cluster + 1) * num_units // num_clusters

        self.thread = SegmentThread(plan, block % plan.cluster)
        self.codes, self.scales = codes.iterator.toint(), scales.iterator.toint()
        if cutlass.const_expr(plan.cluster > 1):
            self.thread.init_exchange()
        self.thread.init_ring()
        if cutlass.const_expr(plan.cluster > 1):
            cute.arch.cluster_arrive_relaxed()  # this block is there: others may write to its shared memory
        # The weights do not depend on the kernel before this one, the tokens do.
        early = min(config.early_slots, plan.num_slots)
        self.fill(begin, end, 0, early)
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(not config.late_trigger):
            cute.arch.griddepcontrol_launch_dependents()
        self.request_tokens(x)
        self.fill(begin, end, early, plan.num_slots)
        self.arrange_tokens(x)
        scale = load_global_float(tensor_scale.iterator.toint())
        # From here on the next launch fills its rings; before, its weights would delay these tokens.
        if cutlass.const_expr(config.late_trigger):
            cute.arch.griddepcontrol_launch_dependents()

        ring_slot, ring_parity = Int32(0), Int32(0)
        for unit in cutlass.range(begin, end, unroll=1):
            ring_slot, ring_parity = self.stream_unit(ring_slot, ring_parity, unit, end)
            self.thread.after_partials()
            if cutlass.const_expr(plan.cluster > 1):
                self.exchange(x, scale, earlier, out, unit, begin, end)
            else:
                self.finish(x, scale, earlier, out, unit)
        if cutlass.const_expr(plan.cluster > 1):
            self.finish_turn(x, scale, earlier, out, (end - begin - 1) // plan.cluster, begin, end)

    def fill(self, begin, end, first_slot: int, last_slot: int):
        """Fill slots of the empty ring."""
        per_unit = self.plan.streams
        for index in range(first_slot, last_slot):
            self.issue(begin + index // per_unit, end, Int32(index), index % per_unit)

    def row_tile(self, unit, index):
        """Return a row tile of a unit; the last unit repeats the last one."""
        if self.plan.tiles_per_unit == 1:
            return unit
        return cutlass.min(unit * self.plan.tiles_per_unit + index, self.num_row_tiles - 1)

    def issue(self, unit, end, slot, position: int):
        """Fill a ring slot with a segment of a unit, if the block has that unit."""
        tile, index = divmod(position, self.plan.ranks_per_block)
        chunk = Int64(self.row_tile(unit, tile)) * (self.config.num_columns // 64) + self.config.first_column // 64
        self.thread.issue_segment(unit < end, slot, self.codes, self.scales, chunk, index)

    def token_access(self, x):
        """Return load_raw and arrange for the block's tokens."""
        config = self.config
        rows = [self.first_token + tile * TOKENS_PER_TILE + self.thread.row for tile in range(self.plan.num_tiles)]
        arguments = (config.num_columns, config.first_column // 64, self.thread.column, rows)
        if config.x == "bf16":
            return plain_tokens(x[0].iterator.toint(), *arguments)
        return nvfp4_tokens(x[0].iterator.toint(), x[1].iterator.toint(), *arguments)

    def request_tokens(self, x):
        """Start loading the tokens."""
        load_raw, _ = self.token_access(x)
        self.thread.request_tokens(load_raw, self.num_tokens - self.first_token)

    def arrange_tokens(self, x):
        """Have the tokens in place."""
        load_raw, arrange = self.token_access(x)
        self.thread.arrange_tokens(load_raw, arrange, self.num_tokens - self.first_token)

    def stream_unit(self, slot, parity, unit, end):
        """Stream a unit, keep the ring full, leave the partial sums; return the ring's new place."""
        plan = self.plan
        ring = Ring(plan, slot, parity)
        for position in range(plan.streams):
            accumulators = self.thread.zero_accumulators(plan.num_tiles)
            accumulators = self.thread.consume(ring, accumulators, position % plan.ranks_per_block)
            cute.arch.sync_warp()
            ahead = position + plan.num_slots
            self.issue(unit + ahead // plan.streams, end, ring.slot, ahead % plan.streams)
            ring.advance()
            self.thread.store_partials(unit, position, accumulators)
        return ring.slot, ring.parity

    @cute.jit
    def finish(self, x, scale: Float32, earlier, out: cute.Tensor, unit: Int32):
        """Add up the warps' sums and store the outputs of a unit."""
        plan = self.plan
        for output in self.thread.outputs(plan.outputs_per_unit):
            if output < plan.outputs_per_unit:
                tile, place = output // plan.tile_outputs, output % plan.tile_outputs
                value = self.thread.block_sum(unit, tile, place // 16, place % 16)
                self.store(x, scale, earlier, out, self.row_tile(unit, tile), place, value)

    @cute.jit
    def exchange(self, x, scale: Float32, earlier, out: cute.Tensor, unit: Int32, begin: Int32, end: Int32):
        """Send the block's sums of a row tile to the block whose turn it is, and finish the row tile before.

        A turn is as many row tiles as the cluster has blocks, one for each block to finish. There is room for the sums
        of two turns. A block finishes its row tile of a turn before it sends sums of the next one, so who has all sums
        of a turn knows that the ones of the turn before have been read everywhere and may be overwritten.
        """
        plan = self.plan
        step = unit - begin
        turn, target = step // plan.cluster, step % plan.cluster
        if step == 0:
            cute.arch.cluster_wait()  # all blocks are there
        if (target == 0) & (step > 0):
            self.finish_turn(x, scale, earlier, out, turn - 1, begin, end)
            self.thread.expect_sums(turn + 1)
        for output in self.thread.outputs(plan.tile_outputs):
            if output < plan.tile_outputs:
                self.thread.send(turn, target, output, self.thread.block_sum(unit, 0, output // 16, output % 16))

    @cute.jit
    def finish_turn(
        self, x, scale: Float32, earlier, out: cute.Tensor, turn: Int32, begin: Int32, end: Int32
    ):
        """Add up the blocks' sums for the block's row tile of a turn and store its outputs."""
        plan = self.plan
        unit = begin + turn * plan.cluster + self.thread.rank
        if unit < end:
            self.thread.wait_sums(turn)
            for output in self.thread.outputs(plan.tile_outputs):
                if output < plan.tile_outputs:
                    self.store(x, scale, earlier, out, unit, output, self.thread.cluster_sum(turn, output))

    @cute.jit
    def store(
        self, x, scale: Float32, earlier, out: cute.Tensor, row_tile: Int32, place: Int32, value: Float32
    ):
        """Store an output of a row tile."""
        token, row = self.first_token + place // 16, row_tile * 16 + place % 16
        if token < self.num_tokens:
            value = value * UNDO * scale
            if cutlass.const_expr(self.config.x == "nvfp4"):
                value = value * UNDO * x[2][token]
            if cutlass.const_expr(self.config.adds):
                value = earlier[token, row] + value
            out[token, row] = value.to(out.element_type)
