# SPDX-License-Identifier: Apache-2.0
"""Device half of hyper_connection_pre and hyper_connection_head."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from megamoe.kernels.parts.mma_device import STEP_VALUES, bf16_pair, mma, split_in_three, zeros
from megamoe.kernels.parts.ptx_device import bf16_word, quick_reciprocal
from megamoe.kernels.parts.rows_device import current_stream, symbolic_rows, symbolic_vector
from megamoe.kernels.portable.hyper_connection_pre import FEW_WARPS, STREAMS, WARP_CHANNELS, Config

LOADS = WARP_CHANNELS // STEP_VALUES  # 16-byte loads a lane for the channels of one stream and token
WORDS = 4  # of a 16-byte load


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows, num_partials = cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    x = symbolic_rows(Uint32, num_rows, config.width // 2)
    fn = symbolic_rows(Float32, config.outputs, STREAMS * config.width)
    base = symbolic_vector(Float32, config.outputs)
    u = symbolic_rows(Uint32, num_tokens, config.width // 2)
    partial = symbolic_rows(Float32, num_partials, (config.outputs + 1) * config.tokens, 4)
    numbers = (partial, Float32(0.0), Float32(0.0), current_stream())
    if not config.sinkhorn_iters:
        return HyperConnectionPre(config).head, (x, fn, base, symbolic_vector(Float32, 1), u, *numbers)
    post = symbolic_rows(Float32, num_tokens, STREAMS, 4)
    comb = symbolic_rows(Float32, num_tokens, STREAMS * STREAMS, 4)
    return HyperConnectionPre(config).pre, (x, fn, base, symbolic_vector(Float32, 3), u, post, comb, *numbers)


class HyperConnectionPre:
    """m = (x . fn^T) * rsqrt(mean(x^2) + norm_eps); pre, post and C of m; u = sum_j pre_j * x_j."""

    def __init__(self, config: Config):
        self.config = config
        self.token_tiles = config.tokens // 8
        self.row_tiles = 2 if config.outputs > 16 else 1
        self.threads = 32 * config.warps
        self.values = (config.outputs + 1) * config.tokens  # partial sums of a block; the last row is sum(x^2)

    @cute.jit
    def pre(self, x, fn, base, scale, u, post, comb, partial, norm_eps: Float32, hc_eps: Float32, stream):
        self._launch(x, fn, base, scale, u, post, comb, partial, norm_eps, hc_eps, stream)

    @cute.jit
    def head(self, x, fn, base, scale, u, partial, norm_eps: Float32, hc_eps: Float32, stream):
        self._launch(x, fn, base, scale, u, None, None, partial, norm_eps, hc_eps, stream)

    def _launch(self, x, fn, base, scale, u, post, comb, partial, norm_eps, hc_eps, stream):
        config = self.config
        num_tiles = (u.shape[0] + config.tokens - 1) // config.tokens
        self.kernel(x, fn, base, scale, u, post, comb, partial, norm_eps, hc_eps).launch(
            grid=(config.cluster, num_tiles, 1),
            block=(self.threads, 1, 1),
            cluster=(config.cluster, 1, 1),
            min_blocks_per_mp=2 if config.warps <= FEW_WARPS else 1,
            preferred_smem_carveout=50,  # without a number, the DSL asks a device for its shared memory
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        fn: cute.Tensor,
        base: cute.Tensor,
        scale: cute.Tensor,
        u: cute.Tensor,
        post,
        comb,
        partial: cute.Tensor,
        norm_eps: Float32,
        hc_eps: Float32,
    ):
        config = self.config
        tokens = config.tokens
        tidx, _, _ = cute.arch.thread_idx()
        rank, tile, _ = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        num_tokens = u.shape[0]
        shared = cutlass.memory.SmemAllocator()
        per_warp = shared.allocate_tensor(Float32, cute.make_layout((self.values, config.warps)))
        sums = shared.allocate_tensor(Float32, cute.make_layout(self.values))
        weights = shared.allocate_tensor(Float32, cute.make_layout((STREAMS, tokens)))

        # This lane's share of the streams: tokens lane // 4 of each tile of 8, channels from `channel` on.
        channel = (rank * config.warps + warp) * WARP_CHANNELS + 8 * (lane % 4)
        held = cute.make_rmem_tensor(cute.make_layout((WORDS, LOADS, STREAMS, self.token_tiles)), Uint32)
        for which in cutlass.range_constexpr(self.token_tiles):
            token = cutlass.min(tile * tokens + 8 * which + lane // 4, num_tokens - 1)
            for j in cutlass.range_constexpr(STREAMS):
                words = cute.zipped_divide(x[(token * STREAMS + j, None)], (WORDS,))
                for load in cutlass.range_constexpr(LOADS):
                    vector = (channel + STEP_VALUES * load) // 8
                    cute.autovec_copy(words[(None,), vector], held[None, load, j, which])

        products, squares = self._project(fn, held, channel, lane)
        self._share_in_block(products, squares, per_warp, sums, partial, rank, tile, tidx, warp, lane)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        self._sum_over_cluster(partial, sums, tile, tidx)
        cute.arch.sync_threads()
        # The streams' weights are needed by every block, post and C by none: each block computes some of these.
        self._stream_weights(sums, base, scale, weights, norm_eps, hc_eps, tidx)
        cute.arch.sync_threads()
        for which in cutlass.range_constexpr(self.token_tiles):
            self._store_collapsed(held, weights, u, channel, tile, which, lane)
        if cutlass.const_expr(post is not None):
            self._mix(sums, base, scale, post, comb, norm_eps, hc_eps, rank, tile, tidx, num_tokens)

    @cute.jit
    def _project(self, fn: cute.Tensor, held: cute.Tensor, channel: Int32, lane: Int32):
        """Return this warp's part of x . fn^T as accumulators, and of sum(x^2) per token tile."""
        outputs, width = self.config.outputs, self.config.width
        products = zeros(4, self.row_tiles, self.token_tiles)
        squares = zeros(self.token_tiles)
        for j in cutlass.range_constexpr(STREAMS):
            for load in cutlass.range_constexpr(LOADS):
                for step in cutlass.range_constexpr(2):
                    column = j * width + channel + STEP_VALUES * load + 4 * step
                    for row_tile in cutlass.range_constexpr(self.row_tiles):
                        pieces = [
                            self._weight_pairs(fn, 16 * row_tile + 8 * half, lane // 4, column, outputs)
                            for half in range(2)
                        ]  # [half][pair][part]
                        for part in cutlass.range_constexpr(3):
                            a = [pieces[half][pair][part] for pair in range(2) for half in range(2)]
                            for which in cutlass.range_constexpr(self.token_tiles):
                                b = [held[2 * step + pair, load, j, which] for pair in range(2)]
                                old = [products[index, row_tile, which] for index in range(4)]
                                new = mma(old, a, b)
                                for index in cutlass.range_constexpr(4):
                                    products[index, row_tile, which] = new[index]
                for which in cutlass.range_constexpr(self.token_tiles):
                    for word in cutlass.range_constexpr(WORDS):
                        low, high = bf16_pair(held[word, load, j, which])
                        squares[which] = squares[which] + low * low + high * high
        return products, squares

    def _weight_pairs(self, fn, first_row: int, row, column, outputs: int):
        """Return four weights of a row as two pairs of three bf16 parts; rows past the last one are zero."""
        if first_row >= outputs:
            return [[Uint32(0)] * 3] * 2
        values = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        load_row(fn, first_row, row, column, outputs, values)
        return [split_in_three(values[2 * pair], values[2 * pair + 1]) for pair in range(2)]

    @cute.jit
    def _share_in_block(
        self,
        products: cute.Tensor,
        squares: cute.Tensor,
        per_warp: cute.Tensor,
        sums: cute.Tensor,
        partial: cute.Tensor,
        rank: Int32,
        tile: Int32,
        tidx: Int32,
        warp: Int32,
        lane: Int32,
    ):
        """Add up the warps in ascending order and write the block's sums to the workspace."""
        config = self.config
        tokens, outputs = config.tokens, config.outputs
        for which in cutlass.range_constexpr(self.token_tiles):
            square = squares[which]
            square = square + cute.arch.shuffle_sync_bfly(square, offset=1)
            square = square + cute.arch.shuffle_sync_bfly(square, offset=2)
            if lane % 4 == 0:
                per_warp[outputs * tokens + 8 * which + lane // 4, warp] = square
            for row_tile in cutlass.range_constexpr(self.row_tiles):
                for index in cutlass.range_constexpr(4):
                    row = 16 * row_tile + 8 * (index // 2) + lane // 4
                    token = 8 * which + 2 * (lane % 4) + index % 2
                    if row < outputs:
                        per_warp[row * tokens + token, warp] = products[index, row_tile, which]
        cute.arch.sync_threads()
        for start in cutlass.range_constexpr(0, self.values, self.threads):
            place = start + tidx
            if place < self.values:
                total = per_warp[place, 0]
                for one in cutlass.range_constexpr(1, config.warps):
                    total = total + per_warp[place, one]
                partial[tile * config.cluster + rank, place] = total

    @cute.jit
    def _sum_over_cluster(self, partial: cute.Tensor, sums: cute.Tensor, tile: Int32, tidx: Int32):
        """Add up the blocks of the cluster in ascending order."""
        config = self.config
        for start in cutlass.range_constexpr(0, self.values, self.threads):
            place = start + tidx
            if place < self.values:
                total = Float32(0.0)
                for rank in cutlass.range_constexpr(config.cluster):
                    source = partial[(tile * config.cluster + rank, None)].iterator + place
                    total = total + cute.arch.load(source, Float32, sem="relaxed", scope="gpu")  # not from a stale L1
                sums[place] = total

    @cute.jit
    def _stream_weights(
        self,
        sums: cute.Tensor,
        base: cute.Tensor,
        scale: cute.Tensor,
        weights: cute.Tensor,
        norm_eps: Float32,
        hc_eps: Float32,
        tidx: Int32,
    ):
        """pre_j = sigmoid(m_j * scale_0 + base_j) + hc_eps."""
        tokens = self.config.tokens
        for start in cutlass.range_constexpr(0, STREAMS * tokens, self.threads):
            place = start + tidx
            if place < STREAMS * tokens:
                j, token = place // tokens, place % tokens
                m = sums[place] * self._norm(sums, token, norm_eps)
                weights[j, token] = sigmoid(m * scale[0] + base[j]) + hc_eps

    def _norm(self, sums, token, norm_eps):
        """Return rsqrt(mean(x^2) + norm_eps)."""
        mean = sums[self.config.outputs * self.config.tokens + token] / (STREAMS * self.config.width)
        return cute.math.rsqrt(mean + norm_eps)

    @cute.jit
    def _store_collapsed(
        self,
        held: cute.Tensor,
        weights: cute.Tensor,
        u: cute.Tensor,
        channel: Int32,
        tile: Int32,
        which: cutlass.Constexpr,
        lane: Int32,
    ):
        """u = sum_j pre_j * x_j, j ascending."""
        local = 8 * which + lane // 4
        token = tile * self.config.tokens + local
        if token < u.shape[0]:
            pre = [weights[j, local] for j in range(STREAMS)]
            target = cute.zipped_divide(u[(token, None)], (WORDS,))
            for load in cutlass.range_constexpr(LOADS):
                packed = cute.make_rmem_tensor(cute.make_layout(WORDS), Uint32)
                for word in cutlass.range_constexpr(WORDS):
                    pairs = [bf16_pair(held[word, load, j, which]) for j in range(STREAMS)]
                    low, high = pairs[0][0] * pre[0], pairs[0][1] * pre[0]
                    for j in cutlass.range_constexpr(1, STREAMS):
                        low, high = low + pairs[j][0] * pre[j], high + pairs[j][1] * pre[j]
                    packed[word] = bf16_word(low, high)
                cute.autovec_copy(packed, target[(None,), (channel + STEP_VALUES * load) // 8])

    @cute.jit
    def _mix(
        self,
        sums: cute.Tensor,
        base: cute.Tensor,
        scale: cute.Tensor,
        post: cute.Tensor,
        comb: cute.Tensor,
        norm_eps: Float32,
        hc_eps: Float32,
        rank: Int32,
        tile: Int32,
        tidx: Int32,
        num_tokens: Int32,
    ):
        """One thread a token: post, and C by softmax and Sinkhorn."""
        config = self.config
        tokens = config.tokens
        local = rank + config.cluster * tidx  # this block's tokens
        token = tile * tokens + local
        if (local < tokens) & (token < num_tokens):
            norm = self._norm(sums, local, norm_eps)
            for k in cutlass.range_constexpr(STREAMS):
                row = STREAMS + k
                post[token, k] = 2.0 * sigmoid(sums[row * tokens + local] * norm * scale[1] + base[row])
            matrix = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS)), Float32)
            for j in cutlass.range_constexpr(STREAMS):
                logits = []
                for k in cutlass.range_constexpr(STREAMS):
                    row = 2 * STREAMS + STREAMS * j + k
                    logits.append(sums[row * tokens + local] * norm * scale[2] + base[row])
                top = cute.arch.fmax(cute.arch.fmax(logits[0], logits[1]), cute.arch.fmax(logits[2], logits[3]))
                powers = [cute.math.exp(one - top) for one in logits]
                total = quick_reciprocal(powers[0] + powers[1] + powers[2] + powers[3])
                for k in cutlass.range_constexpr(STREAMS):
                    matrix[j, k] = powers[k] * total + hc_eps
            divide_columns(matrix, hc_eps)
            for _ in cutlass.range(config.sinkhorn_iters - 1, unroll=1):
                divide_rows(matrix, hc_eps)
                divide_columns(matrix, hc_eps)
            for j in cutlass.range_constexpr(STREAMS):
                for k in cutlass.range_constexpr(STREAMS):
                    comb[token, STREAMS * j + k] = matrix[j, k]


@cute.jit
def load_row(
    fn: cute.Tensor,
    first_row: cutlass.Constexpr,
    row: Int32,
    column: Int32,
    outputs: cutlass.Constexpr,
    values: cute.Tensor,
):
    """Load four weights of row first_row + row, or zeros past the last row."""
    if cutlass.const_expr(first_row + 8 <= outputs):
        cute.autovec_copy(cute.zipped_divide(fn[(first_row + row, None)], (4,))[(None,), column // 4], values)
    else:
        values.fill(0.0)
        if first_row + row < outputs:
            cute.autovec_copy(cute.zipped_divide(fn[(first_row + row, None)], (4,))[(None,), column // 4], values)


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return quick_reciprocal(1.0 + cute.math.exp(-x))


def divide_rows(matrix, hc_eps):
    """Divide every row by its sum plus hc_eps."""
    for j in range(STREAMS):
        factor = quick_reciprocal(matrix[j, 0] + matrix[j, 1] + matrix[j, 2] + matrix[j, 3] + hc_eps)
        for k in range(STREAMS):
            matrix[j, k] = matrix[j, k] * factor


def divide_columns(matrix, hc_eps):
    """Divide every column by its sum plus hc_eps."""
    for k in range(STREAMS):
        factor = quick_reciprocal(matrix[0, k] + matrix[1, k] + matrix[2, k] + matrix[3, k] + hc_eps)
        for j in range(STREAMS):
            matrix[j, k] = matrix[j, k] * factor
