# SPDX-License-Identifier: Apache-2.0
"""y = x w^T for few tokens: a weight streamed once, tokens in registers (linear/linear_stream.py)."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_SCALE_BYTES
from megamoe.kernels.linear.linear_stream_config import (
    FEW_TOKENS,
    FRAGMENT_BYTES,
    RING_BARRIER_BYTES,
    Config,
    LinearPlan,
    is_long,
)
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.memory_device import (
    address_in_block,
    arrive_if,
    expect_bytes_if,
    fill_slot,
    init_barrier,
    load_global_float,
    load_global_vector_if,
    load_shared_float,
    load_shared_vector_if,
    send_float,
    store_shared_floats,
    store_shared_if,
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
        make_fake_tensor(Float32, (num_rows if config.row_scales else 1,), (1,)),
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
    """A thread of a block of a cluster: its warp has a segment of some or all ranks of the block.

    Attributes:
        block: the block's place in the cluster.
        rank_warp: the warp's place in its ranks.
        ranks: of the warp's segments, counted from the block's first.
        own: first chunk and the one after the last of each segment.
        first_chunks: what is streamed for each segment starts here.
    """

    def __init__(self, plan: LinearPlan, block):
        super().__init__(plan)
        self.block = block
        self.ranks, self.rank_warp = list(range(plan.segments)), self.warp
        if plan.groups > 1:
            group = self.warp // plan.rank_warps
            self.ranks, self.rank_warp = [group], self.warp - group * plan.rank_warps
        if plan.uneven and plan.segments == 2:  # the long one first
            later = self.warp + self.warp // 4 & 1
            self.ranks = [later, 1 - later]
        self.own = [self._own_chunks(block * plan.ranks_per_block + rank) for rank in self.ranks]
        self.first_chunks = [first for first, _ in self.own]
        # Segments that may reach over their end: their tokens are zero there.
        self.overlapping = plan.uneven and plan.segments == 1
        if plan.ranks * plan.rank_warps * plan.segment_chunks > plan.chunks and not plan.uneven:
            self.overlapping = True
        if self.overlapping:
            last = plan.chunks - plan.segment_chunks
            self.first_chunks = [cutlass.min(first, last) for first, _ in self.own]

    def _own_chunks(self, rank):
        """Return the first chunk of a segment of a rank and the one after its last."""
        plan = self.plan
        if not plan.uneven:
            first = (rank * plan.rank_warps + self.rank_warp) * plan.segment_chunks
            return first, first + plan.segment_chunks
        counts = [
            sum(sum(is_long(parity, before) for before in range(warp)) << 4 * warp for warp in range(plan.rank_warps))
            for parity in range(2)
        ]
        odd = rank & 1
        table = Uint32(counts[0]) + Uint32(odd) * Uint32((counts[1] - counts[0]) & 0xFFFFFFFF)
        first = rank * (plan.chunks // plan.ranks) + self.rank_warp * (plan.segment_chunks - 1)
        first = first + (Int32(table >> (self.rank_warp * 4)) & 15)
        is_short = odd + self.rank_warp + self.rank_warp // 4 & 1
        return first, first + plan.segment_chunks - is_short

    def _wanted(self, index: int, chunk):
        """Return whether a chunk is the segment's own."""
        first, end = self.own[index]
        return (chunk >= first) & (chunk < end)

    def issue_segment(self, wanted, slot, codes, scales, row_chunk, index: int):
        """Fill a slot with a segment of the row tile that starts at a chunk."""
        plan = self.plan
        num_chunks = plan.stage_chunks[index]
        code_bytes, scale_bytes = num_chunks * TILE_CODE_BYTES, num_chunks * TILE_SCALE_BYTES
        chunk = row_chunk + self.first_chunks[index]
        barrier, target = self.barriers + slot * 8, self.ring + slot * plan.slot_bytes
        code_address, scale_address = codes + chunk * TILE_CODE_BYTES, scales + chunk * TILE_SCALE_BYTES
        fill_slot(wanted, barrier, target, code_address, code_bytes, scale_address, scale_bytes)

    def _raw_tokens(self, load_raw, num_tokens, tile: int, chunk: int):
        index, place = divmod(chunk, self.plan.segment_chunks)  # the long one is first
        wanted = tile * TOKENS_PER_TILE + self.row < num_tokens
        chunk = self.first_chunks[index] + place
        if self.overlapping:
            wanted = wanted & self._wanted(index, chunk)
        return load_raw(tile, Int32(wanted), chunk)

    def request_few(self, x, num_columns: int, first_chunk: int, num_tokens):
        """Start loading the warp's segments of up to FEW_TOKENS bf16 tokens, 16 bytes a lane; return what comes.

        Args:
            x: address of [rows, K] bf16.
            num_columns, first_chunk: K, and where the columns that are multiplied start.
            num_tokens: how many there are.
        """
        raw, chunk = [], self.lane // 8
        for index in range(self.plan.segments):
            wanted = self.lane < self.plan.stage_chunks[index] * 8
            if self.overlapping:
                wanted = wanted & self._wanted(index, self.first_chunks[index] + chunk)
            first = Int64(first_chunk + self.first_chunks[index]) * 128 + self.lane * 16
            for token in range(FEW_TOKENS):
                address = x + token * (num_columns * 2) + first
                raw.append(load_global_vector_if(Int32(wanted & (token < num_tokens)), address, 4))
        return raw

    def arrange_few(self, raw):
        """Have the tokens in place: through shared memory, with a tenth of the work of a transposition in registers.

        What the lane holds are words 4 p .. 4 p + 3 of a chunk's 32; lane t wants words t, t + 4, ... The room is
        the warp's own for partial sums.
        """
        plan = self.plan
        chunk, half, piece = self.lane // 8, self.lane // 4 & 1, self.lane & 3

        def room(index, token):
            return (
                self.shared
                + plan.partial_offset
                + token * plan.partial_bytes
                + self._fragment(0, self.ranks[index], self.rank_warp)
            )

        for index in range(plan.segments):
            for token in range(FEW_TOKENS):
                base = room(index, token) + chunk * 128 + half * 16 + piece * 4
                for word in range(4):  # turned by the chunk, so that four chunks hit different banks
                    wanted = self.lane < plan.stage_chunks[index] * 8
                    store_shared_if(wanted, base + (word + chunk & 3) * 32, raw[index * FEW_TOKENS + token][word])
        cute.arch.sync_warp()
        for index in range(plan.segments):
            base = room(index, 0) + self.row * plan.partial_bytes
            for place in range(plan.stage_chunks[index]):
                address = base + place * 128 + (self.column + place & 3) * 32
                for half in range(2):
                    words = load_shared_vector_if(self.row < FEW_TOKENS, address + half * 16)
                    for word in range(4):
                        self.tokens[half * 4 + word, index * plan.segment_chunks + place, 0] = words[word]
        cute.arch.sync_warp()

    def outputs(self, count: int):
        """Return which of `count` sums this thread has to make, some of them perhaps past the last one."""
        return [self.tid + offset for offset in range(0, count, self.plan.threads)]

    def _fragment(self, tile, rank, warp):
        """Return where a warp's sums of a rank of one of a unit's row tiles are, from the start of the buffer."""
        plan = self.plan
        return ((tile * plan.ranks_per_block + rank) * plan.rank_warps + warp) * (plan.num_tiles * FRAGMENT_BYTES)

    def store_sums(self, step, tile: int, index: int, sums):
        """Store the warp's sums of a segment as they are: four floats a lane, turned so that banks differ.

        The lane's floats are rows g, g + 8 of tokens 2 t, 2 t + 1. Reading one token goes over g, writing over t too.
        """
        place = self.column * 8 + (self.row + self.column * 2 & 7)
        base = self._partials(step) + self._fragment(tile, self.ranks[index], self.rank_warp) + place * 16
        for token_tile, values in enumerate(sums):
            store_shared_floats(base + token_tile * FRAGMENT_BYTES, *values)

    @cute.jit
    def init_sums(self):
        """Make the mbarriers ready by which a block's warps say that their sums of a unit are there."""
        if self.tid == 0:
            for step in cutlass.range_constexpr(2):
                init_barrier(self._sums_barrier(Int32(step)), Int32(self.plan.used_warps))

    def _sums_barrier(self, step):
        return self.shared + RING_BARRIER_BYTES + 16 + (step & 1) * 8

    def publish_sums(self, step, sums):
        """Store the warp's sums of a unit and say that they are there."""
        for position in range(self.plan.streams):
            self.store_sums(step, *divmod(position, self.plan.segments), sums[position])
        cute.arch.sync_warp()
        arrive_if(self.lane == 0, self._sums_barrier(step))

    def wait_sums(self, step):
        """Wait until all warps' sums of a unit are there.

        Warps add the sums of a unit before they publish those of the next. So this also says that nobody needs the
        sums of the unit before, and theirs is the room for those of the next.
        """
        wait_barrier(self._sums_barrier(step), (step >> 1) & 1)

    def rank_sum(self, step, tile, rank, token, row):
        """Return the sum over a rank's warps, in their order, for one token and row of one of a unit's row tiles."""
        column = token % 8 // 2
        place = (column * 8 + (row + column * 2 & 7)) * 16 + (row // 8 * 2 + token % 2) * 4
        address = self._partials(step) + self._fragment(tile, rank, 0) + token // 8 * FRAGMENT_BYTES + place
        total = Float32(0.0)
        for warp in range(self.plan.rank_warps):
            total = total + load_shared_float(address + warp * (self.plan.num_tiles * FRAGMENT_BYTES))
        return total

    @cute.jit
    def init_exchange(self, num_tokens):
        """Make the mbarriers of sums from the cluster ready: each waits for the sums of one turn (see `send`)."""
        if self.tid == 0:
            for turn in cutlass.range_constexpr(2):
                init_barrier(self._exchange_barrier(Int32(turn)), Int32(1))
        for turn in cutlass.range_constexpr(2):
            self.expect_turn(Int32(turn), num_tokens)

    def _exchange(self, turn, rank, place):
        """Return where a rank's sum for a place of a row tile goes, in the block that finishes the row tile."""
        plan = self.plan
        position = ((turn & 1) * plan.ranks + rank) * plan.tile_outputs + place
        return self.shared + plan.exchange_offset + position * 4

    def _exchange_barrier(self, turn):
        return self.shared + RING_BARRIER_BYTES + (turn & 1) * 8

    def expect_turn(self, turn, num_tokens):
        """Announce the sums of a turn."""
        num_bytes = num_tokens * (self.plan.ranks * 16 * 4)
        expect_bytes_if(self.tid == 0, self._exchange_barrier(turn), num_bytes)

    def wait_turn(self, turn):
        """Wait until the sums of a turn are there."""
        wait_barrier(self._exchange_barrier(turn), (turn >> 1) & 1)

    def send(self, turn, target, rank, place, value):
        """Send the sum of a rank of this block to the block that finishes the row tile."""
        rank = self.block * self.plan.ranks_per_block + rank
        address = address_in_block(self._exchange(turn, rank, place), target)
        send_float(address, value, address_in_block(self._exchange_barrier(turn), target))

    def cluster_sum(self, turn, place):
        """Return the sum over all ranks."""
        return in_pairs([load_shared_float(self._exchange(turn, rank, place)) for rank in range(self.plan.ranks)])


def in_pairs(values):
    """Return the sum of 1, 2 or 4 values: the first two plus the last two."""
    while len(values) > 1:
        values = [first + second for first, second in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class LinearStream:
    """The streaming linear."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_blocks: Int32, num_passes: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, None, out, num_blocks, num_passes, stream)

    @cute.jit
    def weight_only_more(
        self, x, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, num_passes: Int32, stream
    ):
        self.launch((x,), codes, scales, tensor_scale, earlier, out, num_blocks, num_passes, stream)

    @cute.jit
    def both_nvfp4(
        self,
        x_codes,
        x_scales,
        x_tensor_scale,
        codes,
        scales,
        tensor_scale,
        out,
        num_blocks: Int32,
        num_passes: Int32,
        stream,
    ):
        x = (x_codes, x_scales, x_tensor_scale)
        self.launch(x, codes, scales, tensor_scale, None, out, num_blocks, num_passes, stream)

    @cute.jit
    def both_nvfp4_more(
        self,
        x_codes,
        x_scales,
        x_tensor_scale,
        codes,
        scales,
        tensor_scale,
        earlier,
        out,
        num_blocks: Int32,
        num_passes: Int32,
        stream,
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
            min_blocks_per_mp=self.plan.blocks_per_multiprocessor,
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
        self.live_tokens = cutlass.min(self.num_tokens - self.first_token, config.tokens_per_pass)
        begin, end = cluster * num_units // num_clusters, (cluster + 1) * num_units // num_clusters

        self.thread = SegmentThread(plan, block % plan.cluster)
        self.codes, self.scales = codes.iterator.toint(), scales.iterator.toint()
        self.tensor_scales = tensor_scale.iterator.toint()
        if cutlass.const_expr(plan.cluster > 1):
            self.thread.init_exchange(self.live_tokens)
        self.thread.init_sums()
        self.thread.init_ring()
        cute.arch.sync_threads()  # every warp arrives at the mbarriers that one has made
        if cutlass.const_expr(plan.cluster > 1):
            cute.arch.cluster_arrive_relaxed()  # this block is there: others may write to its shared memory
        # The weights do not depend on the kernel before this one, the tokens do.
        self.fill(begin, end, 0, plan.early_slots)
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(config.few):
            place = (config.num_columns, config.first_column // 64, self.num_tokens)
            raw = self.thread.request_few(x[0].iterator.toint(), *place)
        else:
            self.request_tokens(x)
        self.fill(begin, end, plan.early_slots, plan.num_slots)
        if cutlass.const_expr(config.few):
            self.thread.arrange_few(raw)
        else:
            self.arrange_tokens(x)
        scale = load_global_float(self.tensor_scales)

        ring_slot, ring_parity = Int32(0), Int32(0)
        for unit in cutlass.range(begin, end, unroll=1):
            # The next launch fills its rings behind this one's last weights: before, it would take their turn.
            if unit == cutlass.max(begin, end - plan.trigger_units):
                cute.arch.griddepcontrol_launch_dependents()
            ring_slot, ring_parity, sums = self.stream_unit(ring_slot, ring_parity, unit, end)
            # A unit's sums are added up after the warp has streamed the next unit: nobody waits for a slower warp.
            step = unit - begin
            if step > 0:
                self.finish_unit(x, scale, earlier, out, step - 1, begin, end)
            self.thread.publish_sums(step, sums)
        self.finish_unit(x, scale, earlier, out, end - begin - 1, begin, end)
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
        tile, index = divmod(position, self.plan.segments)
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
        """Stream a unit and keep the ring full; return the ring's new place and the warp's sums of each segment."""
        plan = self.plan
        ring, sums = Ring(plan, slot, parity), []
        for position in range(plan.streams):
            accumulators = self.thread.zero_accumulators(plan.num_tiles)
            accumulators = self.thread.consume(ring, accumulators, position % plan.segments)
            cute.arch.sync_warp()
            ahead = position + plan.num_slots
            self.issue(unit + ahead // plan.streams, end, ring.slot, ahead % plan.streams)
            ring.advance()
            sums.append([[one + two for one, two in zip(*tile, strict=True)] for tile in accumulators])
        return ring.slot, ring.parity, sums

    @cute.jit
    def finish_unit(self, x, scale: Float32, earlier, out: cute.Tensor, step: Int32, begin: Int32, end: Int32):
        """Add up the warps' sums of a unit; store the outputs, or send the sums to the block that does."""
        self.thread.wait_sums(step)
        if cutlass.const_expr(self.plan.cluster > 1):
            self.exchange(x, scale, earlier, out, step, begin, end)
        else:
            self.finish(x, scale, earlier, out, step, begin)

    @cute.jit
    def finish(self, x, scale: Float32, earlier, out: cute.Tensor, step: Int32, begin: Int32):
        """Add up the warps' sums and store the outputs of a unit."""
        plan = self.plan
        for output in self.thread.outputs(plan.outputs_per_unit):
            tile, place = output // plan.tile_outputs, output % plan.tile_outputs
            if (output < plan.outputs_per_unit) & (place // 16 < self.live_tokens):
                sums = [self.thread.rank_sum(step, tile, rank, place // 16, place % 16) for rank in range(plan.ranks)]
                self.store(x, scale, earlier, out, self.row_tile(begin + step, tile), place, in_pairs(sums))

    @cute.jit
    def exchange(self, x, scale: Float32, earlier, out: cute.Tensor, step: Int32, begin: Int32, end: Int32):
        """Send the block's sums of a row tile to the block whose turn it is, and finish the row tile before.

        A turn is as many row tiles as the cluster has blocks, one for each block to finish. There is room for the sums
        of two turns. A block finishes its row tile of a turn before it sends sums of the next one, so who has all sums
        of a turn knows that the ones of the turn before have been read everywhere and may be overwritten.
        """
        plan = self.plan
        turn, target = step // plan.cluster, step % plan.cluster
        if step == 0:
            cute.arch.cluster_wait()  # all blocks are there
        if (target == 0) & (step > 0):
            self.finish_turn(x, scale, earlier, out, turn - 1, begin, end)
            self.thread.expect_turn(turn + 1, self.live_tokens)
        for output in self.thread.outputs(plan.ranks_per_block * plan.tile_outputs):
            rank, place = output // plan.tile_outputs, output % plan.tile_outputs
            if (rank < plan.ranks_per_block) & (place // 16 < self.live_tokens):
                value = self.thread.rank_sum(step, 0, rank, place // 16, place % 16)
                self.thread.send(turn, target, rank, place, value)

    @cute.jit
    def finish_turn(self, x, scale: Float32, earlier, out: cute.Tensor, turn: Int32, begin: Int32, end: Int32):
        """Add up the blocks' sums for the block's row tile of a turn and store its outputs."""
        plan = self.plan
        unit = begin + turn * plan.cluster + self.thread.block
        if unit < end:
            self.thread.wait_turn(turn)
            for place in self.thread.outputs(plan.tile_outputs):
                if place // 16 < self.live_tokens:
                    self.store(x, scale, earlier, out, unit, place, self.thread.cluster_sum(turn, place))

    @cute.jit
    def store(self, x, scale: Float32, earlier, out: cute.Tensor, row_tile: Int32, place: Int32, value: Float32):
        """Store an output of a row tile."""
        token, row = self.first_token + place // 16, row_tile * 16 + place % 16
        if cutlass.const_expr(self.config.row_scales):
            scale = load_global_float(self.tensor_scales + Int64(row) * 4)
        value = value * UNDO * scale
        if cutlass.const_expr(self.config.x == "nvfp4"):
            value = value * UNDO * x[2][token]
        if cutlass.const_expr(self.config.adds):
            value = earlier[token, row] + value
        out[token, row] = value.to(out.element_type)
