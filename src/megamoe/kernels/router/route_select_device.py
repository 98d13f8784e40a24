# SPDX-License-Identifier: Apache-2.0
"""Device half of the selection of experts."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.ptx_device import divide, multiply
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_rows
from megamoe.kernels.router.route_select_config import TOKENS, Config

NO_EXPERT = 1 << 20  # above every expert


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    scores = symbolic_rows(Float32, num_tokens, config.experts, 4)
    weights = symbolic_rows(Float32, num_tokens, config.top_k, 4)
    ids = symbolic_rows(Int64, num_tokens, config.top_k, 8)
    select = RouteSelect(config)
    token_ids = make_fake_tensor(Int64, (num_tokens,), (1,))
    rest = (weights, ids, Float32(0.0), current_stream())
    if config.mode.startswith("table"):
        table = symbolic_rows(Int32 if config.mode == "table32" else Int64, cute.sym_int32(), config.top_k, 4)
        return select.by_table, (scores, token_ids, table, *rest)
    if config.mode == "biased":
        return select.by_biased_score, (scores, token_ids, make_fake_tensor(Float32, (config.experts,), (1,)), *rest)
    return select.by_score, (scores, token_ids, *rest)


class RouteSelect:
    """ids = the top_k of s + bias, or of a table; weights = s[ids] / sum(s[ids]) * routed_scaling."""

    def __init__(self, config: Config):
        self.config = config
        self.per_lane = -(-config.experts // 32)

    @cute.jit
    def by_table(self, scores, token_ids, table, weights, ids, routed_scaling: Float32, stream):
        self._launch(scores, token_ids, None, table, weights, ids, routed_scaling, stream)

    @cute.jit
    def by_biased_score(self, scores, token_ids, bias, weights, ids, routed_scaling: Float32, stream):
        self._launch(scores, token_ids, bias, None, weights, ids, routed_scaling, stream)

    @cute.jit
    def by_score(self, scores, token_ids, weights, ids, routed_scaling: Float32, stream):
        self._launch(scores, token_ids, None, None, weights, ids, routed_scaling, stream)

    def _launch(self, scores, token_ids, bias, table, weights, ids, routed_scaling, stream):
        grid = ((scores.shape[0] + TOKENS - 1) // TOKENS, 1, 1)
        self.kernel(scores, token_ids, bias, table, weights, ids, routed_scaling).launch(
            grid=grid, block=(32 * TOKENS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        scores: cute.Tensor,
        token_ids: cute.Tensor,
        bias,
        table,
        weights: cute.Tensor,
        ids: cute.Tensor,
        scaling: Float32,
    ):
        block, _, _ = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        token = block * TOKENS + cute.arch.warp_idx()
        overlap_launches()
        if token < scores.shape[0]:
            token_id = token_ids[token]
            if cutlass.const_expr(table is not None):
                self._by_table(scores, token_id, table, weights, ids, scaling, token, lane)
            else:
                self._by_score(scores, token_id, bias, weights, ids, scaling, token, lane)

    @cute.jit
    def _by_table(
        self,
        scores: cute.Tensor,
        token_id: Int64,
        table: cute.Tensor,
        weights: cute.Tensor,
        ids: cute.Tensor,
        scaling: Float32,
        token: Int32,
        lane: Int32,
    ):
        """Every lane reads all of a token's experts; the first top_k lanes store one each."""
        config = self.config
        known = (token_id >= 0) & (token_id < Int64(table.shape[0]))
        row = Int32(cutlass.max(Int64(0), cutlass.min(token_id, Int64(table.shape[0] - 1))))
        chosen, experts = [], []
        for slot in cutlass.range_constexpr(config.top_k):
            expert = Int64(table[row, slot])
            inside = known & (expert >= 0) & (expert < config.experts)
            safe = Int32(cutlass.max(Int64(0), cutlass.min(expert, Int64(config.experts - 1))))
            score = scores[token, safe]
            chosen.append(score if inside else Float32(float("nan")))
            experts.append(safe)
        self._store(chosen, experts, weights, ids, scaling, token_id, token, lane)

    @cute.jit
    def _by_score(
        self,
        scores: cute.Tensor,
        token_id: Int64,
        bias,
        weights: cute.Tensor,
        ids: cute.Tensor,
        scaling: Float32,
        token: Int32,
        lane: Int32,
    ):
        """top_k rounds: best of the lane, best of the warp, out of the running."""
        config = self.config
        own = cute.make_rmem_tensor(cute.make_layout(self.per_lane), Float32)
        keys = cute.make_rmem_tensor(cute.make_layout(self.per_lane), Float32)
        for place in cutlass.range_constexpr(self.per_lane):
            expert = lane + 32 * place
            own[place] = Float32(0.0)
            keys[place] = Float32(0.0)
            if expert < config.experts:
                own[place] = scores[token, expert]
                keys[place] = own[place]
                if cutlass.const_expr(bias is not None):
                    keys[place] = own[place] + bias[expert]
        taken = Int32(0)  # a bit for each place
        chosen, experts = [], []
        for _ in cutlass.range_constexpr(config.top_k):
            key, expert, score = Float32(-float("inf")), Int32(NO_EXPERT), Float32(0.0)
            for place in cutlass.range_constexpr(self.per_lane):
                candidate = lane + 32 * place
                free = (candidate < config.experts) & ((taken >> place) & 1 == 0)
                better = free & ((keys[place] > key) | (expert == NO_EXPERT))
                key = keys[place] if better else key
                expert = candidate if better else expert
                score = own[place] if better else score
            for offset in cutlass.range_constexpr(5):
                other_key = cute.arch.shuffle_sync_bfly(key, offset=1 << offset)
                other_expert = cute.arch.shuffle_sync_bfly(expert, offset=1 << offset)
                other_score = cute.arch.shuffle_sync_bfly(score, offset=1 << offset)
                # A lane that has run out says NO_EXPERT; it loses against all others.
                real = other_expert != NO_EXPERT
                better = real & (
                    (expert == NO_EXPERT) | (other_key > key) | ((other_key == key) & (other_expert < expert))
                )
                key = other_key if better else key
                expert = other_expert if better else expert
                score = other_score if better else score
            taken = taken | (Int32(1) << (expert // 32) if expert % 32 == lane else Int32(0))
            chosen.append(score)
            experts.append(expert)
        self._store(chosen, experts, weights, ids, scaling, token_id, token, lane)

    def _store(self, chosen, experts, weights, ids, scaling, token_id, token, lane):
        is_nobody = token_id == -1
        total = chosen[0]
        for score in chosen[1:]:
            total = total + score
        for slot in range(self.config.top_k):
            weight = multiply(divide(chosen[slot], total), scaling)
            store_slot(weights, ids, token, slot, weight, experts[slot], is_nobody, lane)


@cute.jit
def store_slot(
    weights: cute.Tensor,
    ids: cute.Tensor,
    token: Int32,
    slot: cutlass.Constexpr,
    weight: Float32,
    expert: Int32,
    is_nobody: cutlass.Boolean,
    lane: Int32,
):
    """Let one lane store a slot."""
    if lane == slot:
        weights[token, slot] = Float32(0.0) if is_nobody else weight
        ids[token, slot] = Int64(-1) if is_nobody else Int64(expert)
