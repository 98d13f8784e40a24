# SPDX-License-Identifier: Apache-2.0
"""Device half of hyper_connection_pre and hyper_connection_head."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from megamoe.kernels.hyper_connection.hyper_connection_pre_config import (
    SCRATCH_STRIDE,
    STEPS,
    STREAMS,
    TOKENS,
    WARP_CHANNELS,
    Config,
)
from megamoe.kernels.parts.cluster_device import shared_address_of, store_to_block
from megamoe.kernels.parts.memory_device import (
    expect_bytes_if,
    init_barrier,
    load_shared,
    prefetch_if,
    publish_barriers,
    wait_barrier,
)
from megamoe.kernels.parts.mma_device import STEP_VALUES, bf16_pair, mma, split_in_two, zeros
from megamoe.kernels.parts.ptx_device import bf16_word, quick_reciprocal
from megamoe.kernels.parts.rows_device import current_stream, symbolic_rows, symbolic_vector

LOADS = WARP_CHANNELS // STEP_VALUES  # 16-byte loads a lane for the channels of one stream and token
WORDS = 4  # of a 16-byte load
SQUARES = STREAMS  # which row of a tile's sums is sum(x^2); rows of fn from STREAMS on follow it
SHARED_ROWS = STREAMS + 1  # rows that every block of the cluster needs
BARRIERS = 3  # of a group: two for the sums of tiles in turn, one for the sums of the norm


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32()
    x = symbolic_rows(Uint32, num_rows, config.width // 2)
    fn = symbolic_rows(Float32, config.outputs, STREAMS * config.width)
    base = symbolic_vector(Float32, config.outputs)
    u = symbolic_rows(Uint32, num_tokens, config.width // 2)
    numbers = (Int32(0), Float32(0.0), Float32(0.0), current_stream())
    program = HyperConnectionPre(config)
    if not config.sinkhorn_iters:
        return program.head, (x, fn, base, symbolic_vector(Float32, 1), u, *numbers)
    post = symbolic_rows(Float32, num_tokens, STREAMS, 4)
    comb = symbolic_rows(Float32, num_tokens, STREAMS * STREAMS)
    arguments = (x, fn, base, symbolic_vector(Float32, 3))
    if config.norm:
        return program.pre_norm, (*arguments, symbolic_vector(Uint32, config.width // 2), u, post, comb, *numbers)
    return program.pre, (*arguments, u, post, comb, *numbers)


class HyperConnectionPre:
    """m = (x . fn^T) * rsqrt(mean(x^2) + norm_eps); pre, post and C of m; u = sum_j pre_j * x_j, or its norm."""

    def __init__(self, config: Config):
        self.config = config
        self.row_tiles = -(-config.outputs // 8)
        self.group_threads = 32 * config.warps

    @cute.jit
    def pre(self, x, fn, base, scale, u, post, comb, num_clusters: Int32, norm_eps: Float32, hc_eps: Float32, stream):
        self._launch(x, fn, base, scale, None, u, post, comb, num_clusters, norm_eps, hc_eps, stream)

    @cute.jit
    def pre_norm(
        self, x, fn, base, scale, weight, u, post, comb, num_clusters: Int32, norm_eps: Float32, hc_eps: Float32, stream
    ):
        self._launch(x, fn, base, scale, weight, u, post, comb, num_clusters, norm_eps, hc_eps, stream)

    @cute.jit
    def head(self, x, fn, base, scale, u, num_clusters: Int32, norm_eps: Float32, hc_eps: Float32, stream):
        self._launch(x, fn, base, scale, None, u, None, None, num_clusters, norm_eps, hc_eps, stream)

    def _launch(self, x, fn, base, scale, weight, u, post, comb, num_clusters, norm_eps, hc_eps, stream):
        config = self.config
        self.kernel(x, fn, base, scale, weight, u, post, comb, num_clusters, norm_eps, hc_eps).launch(
            grid=(config.cluster, num_clusters, 1),
            block=(self.group_threads * config.groups, 1, 1),
            cluster=(config.cluster, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        fn: cute.Tensor,
        base: cute.Tensor,
        scale: cute.Tensor,
        weight,
        u: cute.Tensor,
        post,
        comb,
        num_clusters: Int32,
        norm_eps: Float32,
        hc_eps: Float32,
    ):
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        self.rank, cluster, _ = cute.arch.block_idx()
        warp, self.lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        self.group, self.warp = warp // config.warps, warp % config.warps
        self.thread = tidx - self.group * self.group_threads
        self.norm_eps, self.hc_eps, self.num_tokens = norm_eps, hc_eps, u.shape[0]
        num_tiles = (u.shape[0] + (TOKENS - 1)) // TOKENS

        shared = cutlass.memory.SmemAllocator()
        barriers = shared.allocate_array(Int64, BARRIERS * config.groups).toint()
        weights = shared.allocate_tensor(Uint32, cute.make_layout(config.weight_words), 128)
        rooms = shared.allocate_tensor(Float32, cute.make_layout((config.room_floats, config.groups)))
        self.numbers = shared.allocate_tensor(Float32, cute.make_layout(32))
        room = rooms[None, self.group].iterator
        self.scratch = cute.make_tensor(room, cute.make_layout(config.scratch_floats))
        self.results = cute.make_tensor(room + config.scratch_floats, cute.make_layout(config.result_floats))
        self.inboxes = room + (config.scratch_floats + config.result_floats)
        self.barriers = barriers + self.group * (8 * BARRIERS)

        if tidx == 0:
            for index in cutlass.range_constexpr(BARRIERS * config.groups):
                init_barrier(barriers + index * 8, Int32(1))
            publish_barriers()
        self._stage_weights(fn, weights, tidx)
        cute.arch.cluster_arrive()
        cute.arch.griddepcontrol_wait()  # the weights do not depend on the kernel before this one, the streams do
        cute.arch.griddepcontrol_launch_dependents()
        stage_numbers(base, scale, self.numbers, tidx, config.outputs, 3 if config.sinkhorn_iters else 1)

        # This lane's share of the streams: tokens lane // 4 of each half of a tile, channels from `channel` on.
        self.channel = (self.rank * config.warps + self.warp) * WARP_CHANNELS + 8 * (self.lane % 4)
        held = cute.make_rmem_tensor(cute.make_layout((WORDS, LOADS, STREAMS, 2)), Uint32)
        first_tile, stride = cluster + num_clusters * self.group, num_clusters * config.groups
        load_tile(x, held, first_tile, num_tiles, self.num_tokens, self.channel, self.lane)
        cute.arch.cluster_wait()  # every block has made its barriers
        cute.arch.sync_threads()  # every thread's weights have come
        turn = Int32(0)
        for tile in cutlass.range(first_tile, num_tiles, stride, unroll=1):
            self._collapse_tile(x, u, weight, post, comb, weights, held, tile, turn, stride, num_tiles)
            turn = turn + 1
        cute.arch.cluster_arrive()
        if cutlass.const_expr(comb is not None):
            cute.arch.sync_threads()  # the logits of every group are there
            self._mix(comb, hc_eps, self.rank, cluster, num_clusters, num_tiles, tidx, u.shape[0])
        cute.arch.cluster_wait()  # no block leaves before the others have stopped writing to it

    def _stage_weights(self, fn, weights, tidx):
        """Bring this block's columns of fn to shared memory, in the order in which lanes read them."""
        config = self.config
        vectors = 8 * STREAMS * config.warps * WARP_CHANNELS // 4  # of eight rows
        threads = self.group_threads * config.groups
        turns = [(first, start) for first in range(0, self.row_tiles, 2) for start in range(0, vectors, threads)]
        loaded = [
            load_weights(fn, 8 * first, start + tidx, vectors, config, first + 1 < self.row_tiles, self.rank)
            for first, start in turns
        ]
        for (first, start), registers in zip(turns, loaded, strict=True):
            store_weights(weights, registers, start + tidx, vectors, config, first, self.row_tiles)

    def _collapse_tile(self, x, u, weight, post, comb, weights, held, tile, turn, stride, num_tiles):
        """Work on the tile in registers, and start loading this group's next one."""
        config = self.config
        barrier, norm_barrier = self.barriers + turn % 2 * 8, self.barriers + 16
        inbox = cute.make_tensor(
            self.inboxes + turn % 2 * config.received_floats, cute.make_layout(config.received_floats)
        )
        expect_bytes_if(self.thread == 0, barrier, Int32(4 * config.received_floats))
        if config.norm:
            expect_bytes_if(self.thread == 0, norm_barrier, Int32(4 * config.cluster * TOKENS))
        self._prefetch(x, tile + stride, num_tiles)
        blocks, squares = self._project(weights, held)
        self._share_in_block(blocks, squares)
        self._push(self.scratch, inbox, barrier, self.rank, self.thread)
        wait_barrier(barrier, turn // 2 % 2)
        self._sum_over_cluster(
            inbox,
            self.results,
            self.numbers,
            post,
            comb,
            tile,
            self.rank,
            self.thread,
            self.num_tokens,
            self.norm_eps,
            self.hc_eps,
        )
        self._group_barrier()
        packed = self._collapsed(held)
        load_tile(x, held, tile + stride, num_tiles, self.num_tokens, self.channel, self.lane)
        if config.norm:
            self._normalize(packed, weight, norm_barrier, turn)
        for half in range(2):
            store_tokens(packed[None, None, half], u, tile * TOKENS + 8 * half + self.lane // 4, self.channel)

    def _group_barrier(self):
        """Wait for the other warps of this group."""
        cute.arch.barrier(barrier_id=self.group + 1, number_of_threads=self.group_threads)

    def _prefetch(self, x, tile, num_tiles):
        """Ask for a later tile to be in L2: one thread a row."""
        num_bytes, rows = 2 * self.config.warps * WARP_CHANNELS, TOKENS * STREAMS
        for start in range(0, rows, self.group_threads):
            row = tile * rows + start + self.thread
            wanted = (start + self.thread < rows) & (tile < num_tiles) & (row < x.shape[0])
            address = x[(cutlass.min(row, x.shape[0] - 1), None)].iterator.toint() + self.rank * num_bytes
            prefetch_if(wanted, address, num_bytes)

    def _project(self, weights, held):
        """Return this warp's sums: 8 x 8 blocks of rows of fn by tokens, and tokens by tokens for sum(x^2).

        The 16 rows of the matrix unit are two blocks of 8 rows of fn, first one part of them, then the other; or both
        parts of the odd block; or 16 tokens.
        """
        pairs, odd, squares = zeros(4, 2), zeros(4, 2), zeros(4, 2)
        address = shared_address_of(weights) + self.warp * (STEPS * self.row_tiles * 512) + self.lane * 16
        for j in range(STREAMS):
            for load in range(LOADS):
                for step in range(2):
                    tokens = [[held[2 * step + pair, load, j, half] for pair in range(2)] for half in range(2)]
                    position = (j * LOADS + load) * 2 + step
                    for which in range(self.row_tiles):
                        a = load_shared(address + (position * self.row_tiles + which) * 512, 4)
                        for half in range(2):
                            accumulate(odd if which == self.row_tiles - 1 else pairs, half, a, tokens[half])
                    a = [tokens[half][pair] for pair in range(2) for half in range(2)]
                    for half in range(2):
                        accumulate(squares, half, a, tokens[half])
        blocks = []
        for half in range(2):
            if self.row_tiles > 1:
                for block in range(2):
                    blocks.append((block, half, [pairs[2 * block + index, half] for index in range(2)]))
            blocks.append((self.row_tiles - 1, half, [odd[index, half] + odd[2 + index, half] for index in range(2)]))
        return blocks, [[squares[2 * half + index, half] for index in range(2)] for half in range(2)]

    def _share_in_block(self, blocks, squares):
        """Leave the sums of pairs of warps in the scratch memory: warp w has w + half added to it."""
        config = self.config
        half, floats = config.scratch_slots, config.slot_floats
        values = self._lane_sums(blocks, squares)
        if config.warps > 1:
            write_sums(values, self.scratch, (self.warp - half) * floats, self.warp >= half, False)
            self._group_barrier()
        if config.warps % 2 == 1:
            write_sums(values, self.scratch, self.warp * floats, self.warp == half - 1, False)
        write_sums(values, self.scratch, self.warp * floats, self.warp < config.warps // 2, True)
        self._group_barrier()

    def _lane_sums(self, blocks, squares):
        """Return (place, value, whether it is wanted) of this lane's sums."""
        values, lane = [], self.lane
        for row_tile, half, pair in blocks:
            row = 8 * row_tile + 1 + lane // 4 if row_tile else lane // 4 + lane // 16  # sum(x^2) stands before row 4
            for index in range(2):
                place = row * SCRATCH_STRIDE + 8 * half + 2 * (lane % 4) + index
                values.append((place, pair[index], True if self.config.outputs > STREAMS else lane < 4 * STREAMS))
        # The diagonal of tokens by tokens: column 2 * (lane % 4) + index is row lane // 4.
        for half in range(2):
            square = select(lane // 4 % 2 == 0, squares[half][0], squares[half][1])
            values.append((SQUARES * SCRATCH_STRIDE + 8 * half + lane // 4, square, lane % 4 == lane // 8))
        return values

    @cute.jit
    def _push(self, scratch: cute.Tensor, inbox: cute.Tensor, barrier: Int32, rank: Int32, thread: Int32):
        """Add up the block's warps and send every sum to the blocks that need it."""
        config = self.config
        address = shared_address_of(inbox)
        total_places = (config.outputs + 1) * TOKENS
        shared_places = SHARED_ROWS * TOKENS
        for start in cutlass.range_constexpr(0, total_places, self.group_threads):
            place = start + thread
            if place < total_places:
                local = place // TOKENS * SCRATCH_STRIDE + place % TOKENS
                total = scratch[local]
                for slot in cutlass.range_constexpr(1, config.scratch_slots):
                    total = total + scratch[slot * config.slot_floats + local]
                if place < shared_places:
                    for peer in cutlass.range_constexpr(config.cluster):
                        target = address + (rank * shared_places + place) * 4
                        store_to_block(Int32(peer), target, total, barrier)
                else:
                    token, row = place % TOKENS, place // TOKENS - SHARED_ROWS
                    mine = row * config.own_tokens + token % config.own_tokens
                    offset = config.cluster * shared_places + rank * config.own_floats + mine
                    store_to_block(token // config.own_tokens, address + offset * 4, total, barrier)

    @cute.jit
    def _sum_over_cluster(
        self,
        inbox: cute.Tensor,
        results: cute.Tensor,
        numbers: cute.Tensor,
        post,
        comb,
        tile: Int32,
        rank: Int32,
        thread: Int32,
        num_tokens: Int32,
        norm_eps: Float32,
        hc_eps: Float32,
    ):
        """Add up the blocks in ascending order: the streams' weights of all tokens, post and C's logits of its own."""
        config = self.config
        shared_places, weights = SHARED_ROWS * TOKENS, STREAMS * TOKENS
        for start in cutlass.range_constexpr(0, weights + config.own_floats, self.group_threads):
            item = start + thread
            if item < weights:
                # pre_j = sigmoid(m_j * scale_0 + base_j) + hc_eps
                norm = self._norm(inbox, item % TOKENS, norm_eps)
                m = self._total(inbox, item, shared_places) * norm
                results[item] = sigmoid(m * numbers[0] + numbers[4 + item // TOKENS]) + hc_eps
            else:
                if cutlass.const_expr(post is not None):
                    mine = item - weights
                    row, local = mine // config.own_tokens, rank * config.own_tokens + mine % config.own_tokens
                    token = tile * TOKENS + local
                    if (item < weights + config.own_floats) & (token < num_tokens):
                        total = self._total(inbox, config.cluster * shared_places + mine, config.own_floats)
                        m = total * self._norm(inbox, local, norm_eps)
                        logit = m * numbers[1 if row < STREAMS else 2] + numbers[4 + STREAMS + row]
                        if row < STREAMS:
                            post[token, row] = 2.0 * sigmoid(logit)
                        else:
                            comb[token, row - STREAMS] = logit

    def _total(self, inbox, place, stride):
        """Return the sum of what all blocks have sent."""
        total = inbox[place]
        for block in range(1, self.config.cluster):
            total = total + inbox[place + block * stride]
        return total

    def _norm(self, inbox, local, norm_eps):
        """Return rsqrt(mean(x^2) + norm_eps) of a token of the tile."""
        square = self._total(inbox, SQUARES * TOKENS + local, SHARED_ROWS * TOKENS)
        return cute.math.rsqrt(square / (STREAMS * self.config.width) + norm_eps)

    def _collapsed(self, held):
        """Return u = sum_j pre_j * x_j, j ascending, of this lane's tokens and channels, as pairs of bf16."""
        packed = cute.make_rmem_tensor(cute.make_layout((WORDS, LOADS, 2)), Uint32)
        for half in range(2):
            pre = [self.results[j * TOKENS + 8 * half + self.lane // 4] for j in range(STREAMS)]
            for load in range(LOADS):
                for word in range(WORDS):
                    pairs = [bf16_pair(held[word, load, j, half]) for j in range(STREAMS)]
                    low, high = pairs[0][0] * pre[0], pairs[0][1] * pre[0]
                    for j in range(1, STREAMS):
                        low, high = low + pairs[j][0] * pre[j], high + pairs[j][1] * pre[j]
                    packed[word, load, half] = bf16_word(low, high)
        return packed

    def _normalize(self, packed, weight, barrier, turn):
        """Make y = weight * u * rsqrt(mean(u^2) + norm_eps) of u, in place; the sum goes over all blocks."""
        lane = self.lane
        for half in range(2):
            square = Float32(0.0)
            for load in range(LOADS):
                for word in range(WORDS):
                    low, high = bf16_pair(packed[word, load, half])
                    square = square + low * low + high * high
            square = square + cute.arch.shuffle_sync_bfly(square, offset=1)
            square = square + cute.arch.shuffle_sync_bfly(square, offset=2)
            write_if(lane % 4 == 0, self.scratch, self.warp * TOKENS + 8 * half + lane // 4, square, False)
        self._group_barrier()
        push_norm(self.scratch, self.results, barrier, self.rank, self.thread, self.config)
        wait_barrier(barrier, turn % 2)
        values = cute.zipped_divide(weight, (WORDS,))
        factors = [self._norm_factor(8 * half + lane // 4) for half in range(2)]
        for load in range(LOADS):
            words = cute.make_rmem_tensor(cute.make_layout(WORDS), Uint32)
            cute.autovec_copy(values[(None,), (self.channel + STEP_VALUES * load) // 8], words)
            for word in range(WORDS):
                pair = bf16_pair(words[word])
                for half in range(2):
                    low, high = bf16_pair(packed[word, load, half])
                    low, high = low * factors[half] * pair[0], high * factors[half] * pair[1]
                    packed[word, load, half] = bf16_word(low, high)

    def _norm_factor(self, local):
        """Return rsqrt(mean(u^2) + norm_eps) of a token of the tile."""
        first = STREAMS * TOKENS + local
        total = self.results[first]
        for block in range(1, self.config.cluster):
            total = total + self.results[first + block * TOKENS]
        return cute.math.rsqrt(total / self.config.width + self.norm_eps)

    @cute.jit
    def _mix(
        self,
        comb: cute.Tensor,
        hc_eps: Float32,
        rank: Int32,
        cluster: Int32,
        num_clusters: Int32,
        num_tiles: Int32,
        tidx: Int32,
        num_tokens: Int32,
    ):
        """C of this block's tokens of all tiles, one thread a token: 39 dependent steps, taken by all at once."""
        config = self.config
        num_mine = (num_tiles - cluster + (num_clusters - 1)) // num_clusters * config.own_tokens
        for mine in cutlass.range(tidx, num_mine, self.group_threads * config.groups, unroll=1):
            tile = cluster + mine // config.own_tokens * num_clusters
            token = tile * TOKENS + rank * config.own_tokens + mine % config.own_tokens
            if token < num_tokens:
                matrix = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS), stride=(STREAMS, 1)), Float32)
                rows = cute.zipped_divide(comb[(token, None)], (STREAMS,))
                for j in cutlass.range_constexpr(STREAMS):
                    cute.autovec_copy(rows[(None,), j], matrix[j, None])
                for j in cutlass.range_constexpr(STREAMS):
                    logits = [matrix[j, k] for k in range(STREAMS)]
                    top = cute.arch.fmax(cute.arch.fmax(logits[0], logits[1]), cute.arch.fmax(logits[2], logits[3]))
                    powers = [cute.math.exp(one - top) for one in logits]
                    factor = quick_reciprocal((powers[0] + powers[1]) + (powers[2] + powers[3]))
                    for k in cutlass.range_constexpr(STREAMS):
                        matrix[j, k] = powers[k] * factor + hc_eps
                divide_columns(matrix, hc_eps)
                for _ in cutlass.range(config.sinkhorn_iters - 1, unroll=1):
                    divide_rows(matrix, hc_eps)
                    divide_columns(matrix, hc_eps)
                for j in cutlass.range_constexpr(STREAMS):
                    cute.autovec_copy(matrix[j, None], rows[(None,), j])


def accumulate(sums, column: int, a, b):
    """sums[., column] += a @ b on the matrix unit."""
    new = mma([sums[index, column] for index in range(4)], a, b)
    for index in range(4):
        sums[index, column] = new[index]


@cute.jit
def load_tile(
    x: cute.Tensor, held: cute.Tensor, tile: Int32, num_tiles: Int32, num_tokens: Int32, channel: Int32, lane: Int32
):
    """Start loading a lane's share of a tile, if there is such a tile; tokens past the end repeat the last one."""
    if tile < num_tiles:
        for which in cutlass.range_constexpr(2):
            token = cutlass.min(tile * TOKENS + 8 * which + lane // 4, num_tokens - 1)
            for j in cutlass.range_constexpr(STREAMS):
                words = cute.zipped_divide(x[(token * STREAMS + j, None)], (WORDS,))
                for load in cutlass.range_constexpr(LOADS):
                    vector = (channel + STEP_VALUES * load) // 8
                    cute.autovec_copy(words[(None,), vector], held[None, load, j, which])


def fragment_place(index, config):
    """Return what a vector of four weights is: row of eight, stream, vector of the block's channels, step and lane."""
    row_vectors = config.warps * WARP_CHANNELS // 4
    within = index % row_vectors
    row, j = index // row_vectors // STREAMS, index // row_vectors % STREAMS
    # Of 64 channels a lane's share is 8 of each 32, four for each of two steps: load, lane % 4, step.
    warp, load, quad, step = within // 16, within // 8 % 2, within // 2 % 4, within % 2
    return row, j, within, warp * STEPS + (j * LOADS + load) * 2 + step, row * 4 + quad


@cute.jit
def load_weights(
    fn: cute.Tensor,
    first_row: cutlass.Constexpr,
    index: Int32,
    vectors: cutlass.Constexpr,
    config: cutlass.Constexpr,
    paired: cutlass.Constexpr,
    rank: Int32,
):
    """Return four weights of a row from first_row on, and of the row eight below if `paired`; zeros past the last."""
    registers = cute.make_rmem_tensor(cute.make_layout((4, 2)), Float32)
    registers.fill(0.0)
    row, j, within, _, _ = fragment_place(index, config)
    if (index < vectors) & (first_row + row < config.outputs):
        column = j * (config.width // 4) + rank * (config.warps * WARP_CHANNELS // 4) + within
        for half in cutlass.range_constexpr(2 if paired else 1):
            source = cute.zipped_divide(fn[(first_row + 8 * half + row, None)], (4,))
            cute.autovec_copy(source[(None,), column], registers[None, half])
    return registers


@cute.jit
def store_weights(
    weights: cute.Tensor,
    registers: cute.Tensor,
    index: Int32,
    vectors: cutlass.Constexpr,
    config: cutlass.Constexpr,
    first: cutlass.Constexpr,
    row_tiles: cutlass.Constexpr,
):
    """Store them as the matrix unit takes them: two parts, or for an odd block of rows both parts in one."""
    if index < vectors:
        _, _, _, position, lane = fragment_place(index, config)
        # [row][columns][part]
        words = [
            [split_in_two(registers[2 * pair, row], registers[2 * pair + 1, row]) for pair in range(2)]
            for row in range(2 if first + 1 < row_tiles else 1)
        ]
        for which in cutlass.range_constexpr(len(words)):
            fragment = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
            for word in cutlass.range_constexpr(4):
                if cutlass.const_expr(len(words) == 2):
                    fragment[word] = words[word % 2][word // 2][which]
                else:
                    fragment[word] = words[0][word // 2][word % 2]
            place = (position * row_tiles + first + which) * 32 + lane
            cute.autovec_copy(fragment, cute.zipped_divide(weights, (4,))[(None,), place])


@cute.jit
def stage_numbers(
    base: cute.Tensor,
    scale: cute.Tensor,
    numbers: cute.Tensor,
    tidx: Int32,
    outputs: cutlass.Constexpr,
    num_scales: cutlass.Constexpr,
):
    """Bring scale, to 0.., and base, to 4.., to shared memory."""
    if tidx < outputs:
        numbers[4 + tidx] = base[tidx]
        if tidx < num_scales:
            numbers[tidx] = scale[tidx]


@cute.jit
def push_norm(
    scratch: cute.Tensor, results: cute.Tensor, barrier: Int32, rank: Int32, thread: Int32, config: cutlass.Constexpr
):
    """Add up the block's warps and send the sums of u^2, one a token, to every block."""
    if thread < TOKENS:
        total = scratch[thread]
        for warp in cutlass.range_constexpr(1, config.warps):
            total = total + scratch[warp * TOKENS + thread]
        target = shared_address_of(results) + (STREAMS * TOKENS + rank * TOKENS + thread) * 4
        for peer in cutlass.range_constexpr(config.cluster):
            store_to_block(Int32(peer), target, total, barrier)


@cute.jit
def store_tokens(packed: cute.Tensor, u: cute.Tensor, token: Int32, channel: Int32):
    """Store a lane's channels of a token, if there is such a token."""
    if token < u.shape[0]:
        target = cute.zipped_divide(u[(token, None)], (WORDS,))
        for load in cutlass.range_constexpr(LOADS):
            cute.autovec_copy(packed[None, load], target[(None,), (channel + STEP_VALUES * load) // 8])


@cute.jit
def write_sums(values, scratch: cute.Tensor, first: Int32, wanted, add: cutlass.Constexpr):
    """Write a lane's sums to a slot of the scratch memory, or add them to what is there, if `wanted`."""
    if wanted:
        for place, value, mine in values:
            write_if(mine, scratch, first + place, value, add)


@cute.jit
def write_if(wanted, scratch: cute.Tensor, place: Int32, value: Float32, add: cutlass.Constexpr):
    """Write a value to the scratch memory, or add it to what is there, if `wanted`."""
    if cutlass.const_expr(wanted is True):
        scratch[place] = value + scratch[place] if cutlass.const_expr(add) else value
    else:
        if wanted:
            scratch[place] = value + scratch[place] if cutlass.const_expr(add) else value


@cute.jit
def select(wanted, a: Float32, b: Float32) -> Float32:
    """Return a if `wanted`, else b."""
    return a if wanted else b


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return quick_reciprocal(1.0 + cute.math.exp(-x))


def divide_rows(matrix, hc_eps):
    """Divide every row by its sum plus hc_eps."""
    for j in range(STREAMS):
        factor = quick_reciprocal((matrix[j, 0] + matrix[j, 1]) + (matrix[j, 2] + matrix[j, 3]) + hc_eps)
        for k in range(STREAMS):
            matrix[j, k] = matrix[j, k] * factor


def divide_columns(matrix, hc_eps):
    """Divide every column by its sum plus hc_eps."""
    for k in range(STREAMS):
        factor = quick_reciprocal((matrix[0, k] + matrix[1, k]) + (matrix[2, k] + matrix[3, k]) + hc_eps)
        for j in range(STREAMS):
            matrix[j, k] = matrix[j, k] * factor
