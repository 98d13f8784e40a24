# SPDX-License-Identifier: Apache-2.0
"""Device half of the router scores for many tokens."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32

from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of, store_pair_to_cluster
from megamoe.kernels.parts.memory_device import copy_16_bytes, load_matrices, load_shared_float
from megamoe.kernels.parts.mma_device import mma, zeros
from megamoe.kernels.parts.ptx_device import square_root
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_rows
from megamoe.kernels.router.route_scores_device import softplus
from megamoe.kernels.router.route_tiles_config import (
    EXPERT_WARPS,
    PADDING,
    ROW_BYTES,
    STAGE_COLUMNS,
    STAGES,
    THREADS,
    TILE_TOKENS,
    TOKEN_WARPS,
    Config,
)

CHUNKS = ROW_BYTES // 16  # of a row of a stage
PASS_ROWS = THREADS // CHUNKS  # rows that the block copies at once
WARP_TOKENS = TILE_TOKENS // TOKEN_WARPS
TOKEN_TILES = WARP_TOKENS // 16


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    x = symbolic_rows(Uint32, num_tokens, config.width // 2)
    gate = symbolic_rows(Uint32, config.experts, config.width // 2)
    scores = symbolic_rows(Float32, num_tokens, config.experts, 4)
    return RouteTiles(config), (x, gate, scores, current_stream())


class RouteTiles:
    """s = sqrt(softplus(x @ gate.T))."""

    def __init__(self, config: Config):
        self.config = config
        self.steps = config.width // config.splits // STAGE_COLUMNS
        self.passes = (TILE_TOKENS + config.tile_experts) // PASS_ROWS
        self.warp_experts = config.tile_experts // EXPERT_WARPS
        self.own_tokens = TILE_TOKENS // config.splits
        self.sum_stride = config.tile_experts + PADDING

    @cute.jit
    def __call__(self, x: cute.Tensor, gate: cute.Tensor, scores: cute.Tensor, stream):
        config = self.config
        self.kernel(x, gate, scores).launch(
            grid=(config.splits, config.expert_tiles, (x.shape[0] + (TILE_TOKENS - 1)) // TILE_TOKENS),
            block=(THREADS, 1, 1),
            cluster=(config.splits, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, gate: cute.Tensor, scores: cute.Tensor):
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        rank, expert_tile, token_tile = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        first_token, first_expert = token_tile * TILE_TOKENS, expert_tile * config.tile_experts
        shared = cutlass.memory.SmemAllocator().allocate_tensor(Uint8, cute.make_layout(config.shared_bytes), 128)
        memory = shared_address_of(shared)

        # What this thread copies: 16 bytes of a row in every pass. The chunks of a row change places by its number, so
        # that eight rows of a column of chunks, which ldmatrix reads at once, meet all banks.
        row, chunk = tidx // CHUNKS, tidx % CHUNKS
        target = memory + row * ROW_BYTES + (chunk ^ (row % 8)) * 16
        first_column = rank * (self.steps * STAGE_COLUMNS) * 2 + chunk * 16
        sources = []
        for which in cutlass.range_constexpr(self.passes):
            if cutlass.const_expr(which < TILE_TOKENS // PASS_ROWS):
                token = cutlass.min(first_token + which * PASS_ROWS + row, x.shape[0] - 1)
                sources.append(x[(token, None)].iterator.toint() + first_column)
            else:
                expert = first_expert + which * PASS_ROWS + row - TILE_TOKENS
                expert = cutlass.min(expert, config.experts - 1)
                sources.append(gate[(expert, None)].iterator.toint() + first_column)

        overlap_launches()
        for stage in cutlass.range_constexpr(STAGES - 1):
            self._copy(target, sources, Int32(stage))
        sums = zeros(4, TOKEN_TILES, self.warp_experts // 8)
        # ldmatrix: lane l names row l % 8 of matrix l // 8: of tokens (rows 0, rows 8, both of the next 8 columns), of
        # experts (rows 0, the next 8 columns of these, rows 8, the next 8 columns).
        matrix, place = lane // 8, lane % 8
        token_row = warp % TOKEN_WARPS * WARP_TOKENS + matrix % 2 * 8 + place
        token_address = memory + token_row * ROW_BYTES + ((matrix // 2) ^ place) * 16
        expert_row = TILE_TOKENS + warp // TOKEN_WARPS * self.warp_experts + matrix // 2 * 8 + place
        expert_address = memory + expert_row * ROW_BYTES + ((matrix % 2) ^ place) * 16
        for step in cutlass.range(self.steps, unroll=1):
            cute.arch.cp_async_wait_group(STAGES - 2)
            cute.arch.sync_threads()  # the stage has come, and the one before it has been read
            self._copy(target, sources, step + (STAGES - 1))
            stage = step % STAGES * config.stage_bytes
            for columns in cutlass.range_constexpr(STAGE_COLUMNS // 16):
                swap = columns * 32  # 16 columns are two chunks, and these are the bits that change
                self._multiply(sums, (token_address + stage) ^ swap, (expert_address + stage) ^ swap)
        cute.arch.cp_async_wait_group(0)
        self._everyone()  # the ring has been read and becomes the place for sums
        self._send(sums, memory, rank, warp, lane)
        self._everyone()
        self._store(memory, scores, rank, first_token, first_expert, tidx)

    def _everyone(self):
        """Wait for all threads of the cluster."""
        if self.config.splits > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def _copy(self, target, sources, step):
        """Start copying a stage, if there is such a step; a group either way."""
        copy_stage(target, sources, step, self.steps, self.config.stage_bytes)
        cute.arch.cp_async_commit_group()

    def _multiply(self, sums, token_address, expert_address):
        """Multiply 16 columns of a stage."""
        tokens = [load_matrices(token_address + 16 * tile * ROW_BYTES) for tile in range(TOKEN_TILES)]
        for pair in range(self.warp_experts // 16):
            experts = load_matrices(expert_address + 16 * pair * ROW_BYTES)
            for which in range(2):
                for tile in range(TOKEN_TILES):
                    expert_tile = 2 * pair + which
                    old = [sums[index, tile, expert_tile] for index in range(4)]
                    new = mma(old, tokens[tile], experts[2 * which : 2 * which + 2])
                    for index in range(4):
                        sums[index, tile, expert_tile] = new[index]

    def _send(self, sums, memory, rank, warp, lane):
        """Send every token's sums to the block that will add them up."""
        for tile in range(TOKEN_TILES):
            for half in range(2):
                token = warp % TOKEN_WARPS * WARP_TOKENS + 16 * tile + 8 * half + lane // 4
                place = (rank * self.own_tokens + token % self.own_tokens) * self.sum_stride
                place = place + warp // TOKEN_WARPS * self.warp_experts + lane % 4 * 2
                target = address_in_block(token // self.own_tokens, memory + place * 4)
                for expert_tile in range(self.warp_experts // 8):
                    pair = [sums[2 * half + index, tile, expert_tile] for index in range(2)]
                    store_pair_to_cluster(target + 32 * expert_tile, *pair)

    @cute.jit
    def _store(
        self, memory: Int32, scores: cute.Tensor, rank: Int32, first_token: Int32, first_expert: Int32, tidx: Int32
    ):
        """Add up the blocks in ascending order and store the scores of this block's tokens."""
        config = self.config
        part = self.own_tokens * self.sum_stride * 4
        for start in cutlass.range(0, self.own_tokens * config.tile_experts, THREADS, unroll=4):
            local, column = (start + tidx) // config.tile_experts, (start + tidx) % config.tile_experts
            address = memory + (local * self.sum_stride + column) * 4
            total = load_shared_float(address)
            for block in cutlass.range_constexpr(1, config.splits):
                total = total + load_shared_float(address + block * part)
            token, expert = first_token + rank * self.own_tokens + local, first_expert + column
            if (token < scores.shape[0]) & (expert < config.experts):
                scores[token, expert] = square_root(softplus(total))


@cute.jit
def copy_stage(target: Int32, sources, step: Int32, steps: cutlass.Constexpr, stage_bytes: cutlass.Constexpr):
    """Start a thread's copies of a step."""
    if step < steps:
        base = target + step % STAGES * stage_bytes
        for which in cutlass.range_constexpr(len(sources)):
            copy_16_bytes(base + which * (PASS_ROWS * ROW_BYTES), sources[which] + step * ROW_BYTES, True)
