# SPDX-License-Identifier: Apache-2.0
"""Device half of expert_stream."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_SCALE_BYTES
from megamoe.kernels.experts.expert_stream_config import (
    BLOCK_UNITS,
    QUEUE_HEAD,
    QUEUE_TURNS,
    Config,
    block_stage_bytes,
    fragment_column,
)
from megamoe.kernels.experts.sort_pairs_config import NUM_COUNTERS, PASS_FIELDS, SHARED_EXPERT
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.memory_device import (
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_int,
    publish_barriers,
    wait_barrier,
)
from megamoe.kernels.parts.weight_stream import THREADS, TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_device import Ring, StreamThread, nvfp4_tokens, plain_tokens

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
LOG2_E = 1.4426950408889634


def matrix(dtype, num_rows, num_columns: int):
    """Return a contiguous [num_rows, num_columns] argument, 16-byte aligned, with 64-bit offsets."""
    stride = cute.sym_int64(divisibility=math.gcd(num_columns, 16))
    return make_fake_tensor(dtype, (num_rows, num_columns), (stride, 1), assumed_align=16)


def vector(dtype, size):
    """Return a [size] argument."""
    return make_fake_tensor(dtype, (size,), (1,))


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_x, num_pairs, bound, num_routed = cute.sym_int32(), cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    columns = config.num_columns

    def weight():
        num_all_rows, num_experts = cute.sym_int32(), cute.sym_int32()
        return (
            matrix(Uint8, num_all_rows, columns // 2),
            matrix(Uint8, num_all_rows, columns // 16),
            vector(Float32, num_experts),
        )

    pairs = (
        vector(Int32, num_pairs),
        make_fake_tensor(Int32, (bound, PASS_FIELDS), (PASS_FIELDS, 1), assumed_align=16),
        vector(Int32, NUM_COUNTERS),
    )
    out = matrix(OUT_DTYPES[config.out], num_pairs, config.num_rows)
    if config.x == "bf16":
        x = (matrix(BFloat16, num_x, columns),)
    else:
        x = (matrix(Uint8, num_x, columns // 2), matrix(Uint8, num_x, columns // 16), vector(Float32, num_x))
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    experts = ExpertStream(config)
    if config.step == "down":
        launcher = experts.down if config.x == "bf16" else experts.down_nvfp4
        return launcher, (*x, *weight(), *weight(), *pairs, out, Int32(0), stream)
    launcher = experts.gate_up if config.x == "bf16" else experts.gate_up_nvfp4
    weights = (part for _ in range(4) for part in weight())
    route_weights = vector(Float32, num_routed)
    return launcher, (*x, *weights, *pairs, route_weights, out, Float32(0.0), Int32(0), stream)


def minimum(a, b):
    """Return the smaller, or NaN if either is."""
    return inline_ptx("min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def maximum(a, b):
    """Return the larger, or NaN if either is."""
    return inline_ptx("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def load_shared_int(address):
    """Return an int32 of shared memory."""
    return inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def store_shared_int(address, value):
    """Store an int32 to shared memory."""
    inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, value])


def add_global_int(address, value):
    """Add to an int32 of global memory and return what it was."""
    return inline_ptx(
        "atom.global.add.s32 {$w0}, [{$r0}], {$r1};", write_only_types=[Int32], read_only_args=[address, value]
    )


def in_order(raw):
    """Arrange h, which gate_up has stored in the order of fragments (expert_stream.py, fragment_column)."""
    return raw


def select_address(condition, a, b):
    """Return address a where the condition holds, else b."""
    return inline_ptx(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b64 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[Int64],
        read_only_args=[Int32(condition), a, b],
    )


class BlockThread(StreamThread):
    """The same where the block has one ring for all warps, of two units: thread 0 asks for a unit with a few large
    copies, when all warps have left the unit two turns before. Refilling a ring a warp takes a fifth of all
    instructions, so this is used where the shared memory suffices.
    """

    def init_ring(self):
        """Make the block's mbarriers ready, one for each stage of two units."""
        self._init_block()
        publish_barriers()
        cute.arch.sync_threads()

    @cute.jit
    def _init_block(self):
        if self.tid == 0:
            for slot in cutlass.range_constexpr(BLOCK_UNITS * self.plan.streams):
                init_barrier(self.shared + slot * 8, Int32(1))

    def issue_block(self, wanted, slot, codes, scales):
        """Fill a slot with a stage: row_groups row tiles from an address on."""
        num_chunks = self.plan.row_groups * self.plan.chunks
        code_bytes, scale_bytes = num_chunks * TILE_CODE_BYTES, num_chunks * TILE_SCALE_BYTES
        barrier, target = self.shared + slot * 8, self.stage_address(slot)
        expect_bytes_if(wanted, barrier, Int32(code_bytes + scale_bytes))
        bulk_copy_if(wanted, target, codes, Int32(code_bytes), barrier)
        bulk_copy_if(wanted, target + code_bytes, scales, Int32(scale_bytes), barrier)

    def stage_address(self, slot):
        """Return where a slot is."""
        return self.shared + self.plan.ring_offset + slot * block_stage_bytes(self.plan)

    def arrived(self, ring: Ring, num_chunks: int):
        """Wait for the stage that is to be read next; return where the warp's codes and scales are."""
        wait_barrier(self.shared + ring.slot * 8, ring.parity)
        codes = self.stage_address(ring.slot)
        scales = codes + self.plan.row_groups * self.plan.chunks * TILE_CODE_BYTES
        tile = self.row_group * self.plan.chunks + self.first_chunk
        return codes + tile * TILE_CODE_BYTES, scales + tile * TILE_SCALE_BYTES


class ExpertStream:
    """One of the two products of the routed experts."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan

    # Weights are codes, scales and tensor scales of w1, w3 and w2; v1, v3 and v2 are the shared expert's.

    @cute.jit
    def gate_up(
        self,
        x,
        c1,
        s1,
        t1,
        c3,
        s3,
        t3,
        v1,
        vs1,
        vt1,
        v3,
        vs3,
        vt3,
        order,
        passes,
        num_passes,
        route,
        out,
        limit: Float32,
        blocks: Int32,
        stream,
    ):
        weights, shared = ((c1, s1, t1), (c3, s3, t3)), ((v1, vs1, vt1), (v3, vs3, vt3))
        self.launch((x,), weights, shared, order, passes, num_passes, route, out, limit, blocks, stream)

    @cute.jit
    def gate_up_nvfp4(
        self,
        x,
        xs,
        xt,
        c1,
        s1,
        t1,
        c3,
        s3,
        t3,
        v1,
        vs1,
        vt1,
        v3,
        vs3,
        vt3,
        order,
        passes,
        num_passes,
        route,
        out,
        limit: Float32,
        blocks: Int32,
        stream,
    ):
        weights, shared = ((c1, s1, t1), (c3, s3, t3)), ((v1, vs1, vt1), (v3, vs3, vt3))
        self.launch((x, xs, xt), weights, shared, order, passes, num_passes, route, out, limit, blocks, stream)

    @cute.jit
    def down(self, x, c2, s2, t2, v2, vs2, vt2, order, passes, num_passes, out, blocks: Int32, stream):
        weights, shared = ((c2, s2, t2),), ((v2, vs2, vt2),)
        self.launch((x,), weights, shared, order, passes, num_passes, None, out, Float32(0.0), blocks, stream)

    @cute.jit
    def down_nvfp4(self, x, xs, xt, c2, s2, t2, v2, vs2, vt2, order, passes, num_passes, out, blocks: Int32, stream):
        weights, shared = ((c2, s2, t2),), ((v2, vs2, vt2),)
        self.launch((x, xs, xt), weights, shared, order, passes, num_passes, None, out, Float32(0.0), blocks, stream)

    def launch(self, x, weights, shared, order, passes, num_passes, route, out, limit, blocks, stream):
        """Launch the kernel; `down` may start loading weights while `gate_up` is still running."""
        self.kernel(x, weights, shared, order, passes, num_passes, route, out, limit, blocks).launch(
            grid=(blocks, 1, 1),
            block=(THREADS, 1, 1),
            smem=self.config.shared_bytes,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x, weights, shared, order, passes, num_passes, route, out, limit: Float32, num_blocks: Int32):
        plan, config = self.plan, self.config
        self.thread = BlockThread(plan) if config.by_block else StreamThread(plan)
        self.thread.init_ring()
        self.code_bases = [[weight[0].iterator.toint() for weight in group] for group in (weights, shared)]
        self.scale_bases = [[weight[1].iterator.toint() for weight in group] for group in (weights, shared)]
        self.pass_base = passes.iterator.toint()
        if cutlass.const_expr(config.step == "gate_up"):
            cute.arch.griddepcontrol_wait()  # the passes come from the kernel before this one
        # For down they come from the one before that, which gate_up has waited for before it let this one start.
        self.num_groups = plan.num_units(config.num_rows // 16)
        self.num_units = load_global_int(num_passes.iterator.toint()) * self.num_groups
        self.counter = num_passes.iterator.toint() + (4 if config.step == "gate_up" else 8)
        self.pool = Int32(Int64(self.num_units) * (100 - config.pool) // 100)  # later ones go to whoever is free
        self.queue = self.thread.shared + config.queue_offset
        block, _, _ = cute.arch.block_idx()
        begin = Int32(Int64(block) * self.pool // num_blocks)
        end = Int32(Int64(block + 1) * self.pool // num_blocks)

        self.start_queue(begin, end)
        cute.arch.sync_threads()
        unit = self.queued(Int32(0))
        here = cutlass.max(unit, 0) // self.num_groups
        known_pass, known_expert = self.fill(0, config.early, Int32(-1), Int32(0))
        expert, first, count = self.load_pass(here)
        if cutlass.const_expr(config.step == "down"):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        # Tokens are asked for before the ring is full: behind it they would come microseconds later.
        self.request_tokens(x, order, route, expert, first, count)
        known_pass, known_expert = self.fill(config.early, config.depth, known_pass, known_expert)
        self.arrange_tokens(x, order, route, expert, first, count)

        turn, ring_slot, ring_parity = Int32(0), Int32(0), Int32(0)
        while unit >= 0:
            if self.thread.warp < plan.used_warps:
                if cutlass.const_expr(config.by_block):
                    self.stream_arrived(turn)
                else:
                    ring_slot, ring_parity, known_pass, known_expert = self.stream_unit(
                        ring_slot, ring_parity, turn, known_pass, known_expert
                    )
            self.extend_queue(turn + (config.ahead + 1))
            following = self.queued(turn + 1)
            next_pass = cutlass.max(following, 0) // self.num_groups
            moves = (following >= 0) & (next_pass != here)
            next_expert, next_first, next_count = expert, first, count
            if moves:  # the tokens of another pass come while the sums of this one are added
                next_expert, next_first, next_count = self.load_pass(next_pass)
                self.request_tokens(x, order, route, next_expert, next_first, next_count)
            self.thread.after_partials()
            if cutlass.const_expr(config.by_block):
                known_pass, known_expert = self.refill(turn + BLOCK_UNITS, known_pass, known_expert)
            group = unit - here * self.num_groups
            self.finish(x, weights, shared, order, route, out, limit, expert, first, count, turn, group)
            if moves:
                here, expert, first, count = next_pass, next_expert, next_first, next_count
                self.arrange_tokens(x, order, route, expert, first, count)
            turn, unit = turn + 1, following

    def fill(self, first: int, last: int, known_pass, known_expert):
        """Fill slots (or, where the block fills its ring, units) of the empty ring."""
        for index in range(first, last):
            if self.config.by_block:
                known_pass, known_expert = self.refill(Int32(index), known_pass, known_expert)
            else:
                unit = self.queued(Int32(index // self.plan.per_unit))
                known_pass, known_expert = self.issue(
                    unit, Int32(index), index % self.plan.per_unit, known_pass, known_expert
                )
        return known_pass, known_expert

    @cute.jit
    def refill(self, turn: Int32, known_pass: Int32, known_expert: Int32):
        """Ask for the unit of a turn, into the half of the ring that all warps have left."""
        unit = self.queued(turn)
        if self.thread.tid == 0:
            known_pass, known_expert = self.expert_ahead(unit, known_pass, known_expert)
            for stream in cutlass.range_constexpr(self.plan.streams):
                self.issue_stage(unit, turn, stream, known_pass, known_expert)
        return known_pass, known_expert

    def issue_stage(self, unit, turn, stream: int, known_pass, known_expert):
        """Ask for a stage of a unit."""
        plan = self.plan
        row_tile = cutlass.max(known_expert, 0) * (self.config.num_rows // 16)
        row_tile = row_tile + (unit - known_pass * self.num_groups) * plan.tiles_per_unit
        weight, index = (stream, 0) if plan.num_weights == 2 else (0, stream * plan.row_groups)
        chunk = Int64(row_tile + index) * plan.chunks
        codes = self.base(self.code_bases, weight, known_expert) + chunk * TILE_CODE_BYTES
        scales = self.base(self.scale_bases, weight, known_expert) + chunk * TILE_SCALE_BYTES
        self.thread.issue_block(unit >= 0, (turn & (BLOCK_UNITS - 1)) * plan.streams + stream, codes, scales)

    @cute.jit
    def load_pass(self, index: Int32):
        """Return a pass's expert, first sorted position and number of pairs."""
        address = self.pass_base + Int64(index) * (PASS_FIELDS * 4)
        return load_global_int(address), load_global_int(address + 4), load_global_int(address + 8)

    # The queue: which units the block has in this and the coming turns, in shared memory; thread 0 extends it. First
    # come the units of a contiguous run of the block's own, then chunks from the pool, which all blocks take from as
    # they become free: multiprocessors do not get the same bandwidth. Who computes a unit changes no bit of it.

    @cute.jit
    def start_queue(self, begin: Int32, end: Int32):
        """Fill the queue for the first turns."""
        if self.thread.tid == 0:
            store_shared_int(self.queue, begin)
            store_shared_int(self.queue + 4, end)
            for index in cutlass.range(self.config.ahead + 1, unroll=1):
                self.enqueue(index)

    @cute.jit
    def extend_queue(self, turn: Int32):
        """Choose the unit of a coming turn."""
        if self.thread.tid == 0:
            self.enqueue(turn)

    @cute.jit
    def enqueue(self, turn: Int32):
        """Put the next unit of the run or of the chunk, or a new chunk's first, or -1, into a turn's place."""
        unit, end = load_shared_int(self.queue), load_shared_int(self.queue + 4)
        if (unit == end) & (end < self.num_units):
            index = add_global_int(self.counter, Int32(1))
            large = (self.num_units - self.pool) // (2 * self.config.chunk)
            if index < large:
                unit = self.pool + index * self.config.chunk
                end = unit + self.config.chunk
            else:
                unit = cutlass.min(self.pool + large * (self.config.chunk - 1) + index, self.num_units)
                end = cutlass.min(unit + 1, self.num_units)
        chosen = Int32(-1)
        if unit < end:
            chosen = unit
            unit = unit + 1
        store_shared_int(self.queue, unit)
        store_shared_int(self.queue + 4, end)
        store_shared_int(self.queue + QUEUE_HEAD + (turn & (QUEUE_TURNS - 1)) * 4, chosen)

    def queued(self, turn):
        """Return the unit of a turn, -1 for none."""
        return load_shared_int(self.queue + QUEUE_HEAD + (turn & (QUEUE_TURNS - 1)) * 4)

    @cute.jit
    def expert_ahead(self, unit: Int32, known_pass: Int32, known_expert: Int32):
        """Return the pass of a unit and its expert; the table is read only where the pass changes."""
        this_pass = unit // self.num_groups
        if (this_pass != known_pass) & (unit >= 0):
            known_pass = this_pass
            known_expert = load_global_int(self.pass_base + Int64(this_pass) * (PASS_FIELDS * 4))
        return known_pass, known_expert

    def issue(self, unit, slot, position: int, known_pass, known_expert):
        """Fill a ring slot with a stage of a unit, if there is one; return the unit's pass and expert."""
        stages = len(self.plan.stage_chunks)
        known_pass, known_expert = self.expert_ahead(unit, known_pass, known_expert)
        num_row_tiles = self.config.num_rows // 16
        weight, index = (position // stages, 0) if self.plan.num_weights == 2 else (0, position // stages)
        index = index * self.plan.row_groups + self.thread.row_group
        row_tile = self.row_tile(unit - known_pass * self.num_groups, index)
        chunk = (Int64(cutlass.max(known_expert, 0)) * num_row_tiles + row_tile) * self.plan.chunks
        code_address, scale_address = self.thread.slice_addresses(
            self.base(self.code_bases, weight, known_expert), self.base(self.scale_bases, weight, known_expert), chunk
        )
        self.thread.issue(unit >= 0, slot, code_address, scale_address, position % stages)
        return known_pass, known_expert

    def base(self, bases, weight: int, expert):
        """Return where the routed experts' weight starts, or the shared one's."""
        return select_address(expert == SHARED_EXPERT, bases[1][weight], bases[0][weight])

    def row_tile(self, group, index):
        """Return a row tile of a unit; the last unit of an expert repeats the last one."""
        if self.plan.tiles_per_unit == 1:
            return group
        return cutlass.min(group * self.plan.tiles_per_unit + index, self.config.num_rows // 16 - 1)

    def token_access(self, x, order, route, expert, first, count):
        """Return load_raw and arrange for a pass's tokens."""
        order_base = order.iterator.toint()

        def row_of(index):
            position = first + cutlass.min(index, count - 1)
            if self.config.step == "down":  # h is stored by sorted position
                return position
            pair = load_global_int(order_base + Int64(position) * 4)
            return self.token_of(cutlass.max(pair, 0), route, expert)  # no pair where there is no work at all

        rows = [row_of(tile * TOKENS_PER_TILE + self.thread.row) for tile in range(self.plan.num_tiles)]
        arguments = (self.config.num_columns, 0, self.thread.column, rows)
        if self.config.x == "bf16":
            load_raw, arrange = plain_tokens(x[0].iterator.toint(), *arguments)
            return load_raw, arrange if self.config.step == "gate_up" else in_order
        return nvfp4_tokens(x[0].iterator.toint(), x[1].iterator.toint(), *arguments)

    def arrange(self):
        """Return how loaded registers become fragments."""
        if self.config.x == "bf16":
            return plain_tokens(0, 0, 0, self.thread.column, ())[1] if self.config.step == "gate_up" else in_order
        return nvfp4_tokens(0, 0, 0, 0, self.thread.column, ())[1]

    def request_tokens(self, x, order, route, expert, first, count):
        """Start loading this thread's part of a pass's tokens."""
        load_raw, _ = self.token_access(x, order, route, expert, first, count)
        self.thread.request_tokens(load_raw, count)

    def arrange_tokens(self, x, order, route, expert, first, count):
        """Have this thread's part of a pass's tokens in place."""
        if self.plan.shared_tiles:
            load_raw, arrange = self.token_access(x, order, route, expert, first, count)
        else:
            load_raw, arrange = None, self.arrange()
        self.thread.arrange_tokens(load_raw, arrange, count)

    @cute.jit
    def token_of(self, pair: Int32, route: cute.Tensor, expert: Int32) -> Int32:
        """Return the token of a pair; the shared expert's pairs follow all others."""
        token = pair // self.config.num_slots
        if expert == SHARED_EXPERT:
            token = pair - route.shape[0]
        return token

    def stream_arrived(self, turn):
        """Stream a unit that the block has asked for, leave the partial sums."""
        plan = self.plan
        ring = Ring(plan, (turn & (BLOCK_UNITS - 1)) * plan.streams, (turn // BLOCK_UNITS) & 1)
        for stream in range(plan.streams):
            accumulators = self.thread.consume(ring, self.thread.zero_accumulators(plan.num_tiles), 0)
            ring.slot = ring.slot + 1
            if stream == 0:
                self.thread.before_partials()
            self.thread.store_partials(turn, stream, accumulators)

    def stream_unit(self, slot, parity, turn, known_pass, known_expert):
        """Stream a unit, keep the warp's ring full, leave the partial sums; return the ring's new place."""
        plan = self.plan
        ring, stages, units = Ring(plan, slot, parity), len(plan.stage_chunks), {}
        for stream in range(plan.streams):
            accumulators = self.thread.zero_accumulators(plan.num_tiles)
            for stage in range(stages):
                accumulators = self.thread.consume(ring, accumulators, stage)
                cute.arch.sync_warp()
                position = stream * stages + stage + plan.num_slots
                ahead = position // plan.per_unit
                if ahead not in units:
                    units[ahead] = self.queued(turn + ahead)
                known_pass, known_expert = self.issue(
                    units[ahead], ring.slot, position % plan.per_unit, known_pass, known_expert
                )
                ring.advance()
            if stream == 0:
                self.thread.before_partials()
            self.thread.store_partials(turn, stream, accumulators)
        return ring.slot, ring.parity, known_pass, known_expert

    @cute.jit
    def finish(
        self,
        x,
        weights,
        shared,
        order: cute.Tensor,
        route,
        out: cute.Tensor,
        limit: Float32,
        expert: Int32,
        first: Int32,
        count: Int32,
        turn: Int32,
        group: Int32,
    ):
        """Add up the warps' sums and store the outputs of a unit."""
        for round in cutlass.range(-(-self.plan.outputs_per_unit // THREADS), unroll=1):
            output = self.thread.output(turn) + round * THREADS
            self.finish_output(x, weights, shared, order, route, out, limit, expert, first, count, turn, group, output)

    @cute.jit
    def finish_output(
        self,
        x,
        weights,
        shared,
        order: cute.Tensor,
        route,
        out: cute.Tensor,
        limit: Float32,
        expert: Int32,
        first: Int32,
        count: Int32,
        turn: Int32,
        group: Int32,
        output: Int32,
    ):
        """Add up the sums of one output and store it."""
        per_tile = self.plan.num_tiles * TOKENS_PER_TILE * 16
        stream, local = output // per_tile, output // 16 % (self.plan.num_tiles * TOKENS_PER_TILE)
        if (output < self.plan.outputs_per_unit) & (local < count):
            row = self.row_tile(group, stream) * 16 + output % 16
            position = first + local
            pair, is_shared = order[position], expert == SHARED_EXPERT
            factor = Float32(UNDO)
            if cutlass.const_expr(self.config.x == "nvfp4" and self.config.step == "gate_up"):
                factor = factor * UNDO * x[2][self.token_of(pair, route, expert)]
            if cutlass.const_expr(self.config.x == "nvfp4" and self.config.step == "down"):
                factor = factor * UNDO * x[2][position]
            scales = [self.tensor_scale(weights[i][2], shared[i][2], expert) for i in range(self.plan.num_weights)]
            value = self.thread.sum_partials(turn, stream, local, output % 16) * factor * scales[0]
            target = pair
            if cutlass.const_expr(self.config.step == "gate_up"):
                up = self.thread.sum_partials(turn, 1, local, output % 16) * factor * scales[1]
                route_weight = Float32(1.0)
                if is_shared:
                    value, up = value.to(BFloat16).to(Float32), up.to(BFloat16).to(Float32)
                else:
                    route_weight = route[pair]
                gate = minimum(value, limit)
                up = maximum(minimum(up, limit), -limit)
                value = gate / (1.0 + cute.math.exp2(-gate * LOG2_E)) * up * route_weight
                if is_shared:
                    value = value.to(BFloat16).to(Float32)
                target = position
                if cutlass.const_expr(self.config.out == "bf16"):  # for down as it is, not for the quantizer
                    row = fragment_column(row)
            out[target, row] = value.to(out.element_type)

    @cute.jit
    def tensor_scale(self, routed: cute.Tensor, shared: cute.Tensor, expert: Int32) -> Float32:
        """Return the tensor scale of an expert."""
        scale = shared[0]
        if expert != SHARED_EXPERT:
            scale = routed[expert]
        return scale
