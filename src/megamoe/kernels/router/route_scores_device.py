# SPDX-License-Identifier: Apache-2.0
"""Device half of the router scores."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from megamoe.kernels.parts.mma_device import mma, zeros
from megamoe.kernels.parts.ptx_device import square_root
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_rows
from megamoe.kernels.router.route_scores_config import CHUNK, WARPS, Config

WORDS = 4
THREADS = 32 * WARPS


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    x = symbolic_rows(Uint32, num_tokens, config.width // 2)
    gate = symbolic_rows(Uint32, config.experts, config.width // 2)
    scores = symbolic_rows(Float32, num_tokens, config.experts, 4)
    return RouteScores(config), (x, gate, scores, current_stream())


class RouteScores:
    """s = sqrt(softplus(x @ gate.T))."""

    def __init__(self, config: Config):
        self.config = config
        self.rows = 16 * config.row_tiles
        self.tokens = 8 * config.token_tiles
        self.values = self.rows * self.tokens
        self.chunks = config.width // CHUNK

    @cute.jit
    def __call__(self, x: cute.Tensor, gate: cute.Tensor, scores: cute.Tensor, stream):
        grid = (-(-self.config.experts // self.rows), (x.shape[0] + self.tokens - 1) // self.tokens, 1)
        self.kernel(x, gate, scores).launch(grid=grid, block=(THREADS, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(self, x: cute.Tensor, gate: cute.Tensor, scores: cute.Tensor):
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        expert_tile, token_tile, _ = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        first_expert, first_token = expert_tile * self.rows, token_tile * self.tokens
        num_tokens = x.shape[0]
        shared = cutlass.memory.SmemAllocator()
        per_warp = shared.allocate_tensor(Float32, cute.make_layout((self.values, WARPS)))

        overlap_launches()
        gate_rows = [
            cute.zipped_divide(
                gate[(cutlass.min(first_expert + 8 * half + lane // 4, config.experts - 1), None)], (WORDS,)
            )
            for half in range(2 * config.row_tiles)
        ]
        token_rows = [
            cute.zipped_divide(x[(cutlass.min(first_token + 8 * which + lane // 4, num_tokens - 1), None)], (WORDS,))
            for which in range(config.token_tiles)
        ]
        products = zeros(4, config.row_tiles, config.token_tiles)
        a = cute.make_rmem_tensor(cute.make_layout((WORDS, 2 * config.row_tiles)), Uint32)
        b = cute.make_rmem_tensor(cute.make_layout((WORDS, config.token_tiles)), Uint32)
        for chunk in cutlass.range(warp, self.chunks, WARPS, unroll=4 if config.row_tiles == 1 else 1):
            vector = chunk * (CHUNK // 8) + lane % 4
            for half in cutlass.range_constexpr(2 * config.row_tiles):
                cute.autovec_copy(gate_rows[half][(None,), vector], a[None, half])
            for which in cutlass.range_constexpr(config.token_tiles):
                cute.autovec_copy(token_rows[which][(None,), vector], b[None, which])
            for step in cutlass.range_constexpr(2):
                for row_tile in cutlass.range_constexpr(config.row_tiles):
                    weights = [a[2 * step + pair, 2 * row_tile + half] for pair in range(2) for half in range(2)]
                    for which in cutlass.range_constexpr(config.token_tiles):
                        values = [b[2 * step + pair, which] for pair in range(2)]
                        new = mma([products[index, row_tile, which] for index in range(4)], weights, values)
                        for index in cutlass.range_constexpr(4):
                            products[index, row_tile, which] = new[index]

        for row_tile in cutlass.range_constexpr(config.row_tiles):
            for which in cutlass.range_constexpr(config.token_tiles):
                for index in cutlass.range_constexpr(4):
                    row = 16 * row_tile + 8 * (index // 2) + lane // 4
                    token = 8 * which + 2 * (lane % 4) + index % 2
                    per_warp[token * self.rows + row, warp] = products[index, row_tile, which]
        cute.arch.sync_threads()
        for start in cutlass.range_constexpr(0, self.values, THREADS):
            store_score(per_warp, scores, start + tidx, self.values, self.rows, first_expert, first_token, num_tokens)


@cute.jit
def store_score(
    per_warp: cute.Tensor,
    scores: cute.Tensor,
    place: Int32,
    values: cutlass.Constexpr,
    rows: cutlass.Constexpr,
    first_expert: Int32,
    first_token: Int32,
    num_tokens: Int32,
):
    """Add up the warps and store one score."""
    if place < values:
        total = per_warp[place, 0]
        for warp in cutlass.range_constexpr(1, WARPS):
            total = total + per_warp[place, warp]
        expert, token = first_expert + place % rows, first_token + place // rows
        if (expert < scores.shape[1]) & (token < num_tokens):
            scores[token, expert] = square_root(softplus(total))


def softplus(x):
    """Return max(x, 0) + log1p(exp(-|x|))."""
    return cute.arch.fmax(x, Float32(0.0), nan=True) + cute.math.log1p(cute.math.exp(-cute.math.absf(x)))
