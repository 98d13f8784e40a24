# SPDX-License-Identifier: Apache-2.0
"""The skeleton that the four routed-experts operations share; each of them only says how one expert is multiplied.

Math       out[t] = sum over slots a = 0, 1, .. of expert_(ids[t, a])(x[t]; route_weights[t, a])  + shared_output[t]
           expert_e(v; r) = w2[e] . h,   h = clamped_swiglu(w1[e] . v, w3[e] . v) * r
Numerics   gate and up stay fp32 until h, which is rounded to what w2 is multiplied by (see the operation). The route
           weight multiplies h before that rounding. Each expert's output is rounded to the dtype of x; the slots are
           added in fp32 in ascending order, then the shared output, then one rounding to out_dtype.
           w1 and w3 are two weights with their own scales: nothing is fused, so no scale can be shared by mistake.
           Row-invariant. Experts without tokens are not touched.
Memory     A * T * D values of the dtype of x, and the gate and up of the busiest expert
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe.ops import swiglu
from megamoe.ops.check import FLOAT32, FLOATS, INT64, OUT_DTYPES, check

ExpertFunction = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(expert, rows of x [n], their route weights [n]) -> [n, D] fp32."""


def check_experts(
    op: str,
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: tuple[Any, Any, Any],
    weight_types: tuple[Any, ...],
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check the arguments of a routed-experts operation; weights are w1, w3 and w2."""
    w1, w3, w2 = weights
    check(
        op,
        x=(x, "T D", FLOATS),
        route_weights=(route_weights, "T A", FLOAT32),
        expert_ids=(expert_ids, "T A", INT64),
        w1=(w1, "E F D", weight_types),
        w3=(w3, "E F D", weight_types),
        w2=(w2, "E D F", weight_types),
        shared_output=(shared_output, "?T D", FLOATS),
        out_dtype=(out_dtype, OUT_DTYPES),
    )
    swiglu.check_limit(op, swiglu_limit)


def sum_of_experts(
    op: str,
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    expert: ExpertFunction,
    shared_output: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Run every chosen expert once over all of its tokens and add the slots up.

    Raises:
        ValueError: an expert id is not 0 to num_experts - 1.
    """
    num_tokens, num_slots = expert_ids.shape
    slot_outputs = x.new_empty(num_tokens * num_slots, x.shape[1])  # [T * A, D]
    route = route_weights.reshape(-1)
    order = expert_ids.reshape(-1).argsort(stable=True)  # slots by expert, tokens ascending within one
    sorted_ids = expert_ids.reshape(-1)[order].tolist()
    if sorted_ids and not (sorted_ids[0] >= 0 and sorted_ids[-1] < num_experts):
        got = sorted_ids[0] if sorted_ids[0] < 0 else sorted_ids[-1]
        raise ValueError(
            f"{op}: expert_ids must be 0 to {num_experts - 1}, the experts of w1; got {got}. Route with as many "
            f"experts as the weights hold."
        )
    start = 0
    while start < len(sorted_ids):
        expert_id, stop = sorted_ids[start], start + 1
        while stop < len(sorted_ids) and sorted_ids[stop] == expert_id:
            stop += 1
        slots = order[start:stop]
        slot_outputs[slots] = expert(expert_id, slots // num_slots, route[slots]).to(x.dtype)
        start = stop
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for outputs in slot_outputs.view(num_tokens, num_slots, x.shape[1]).unbind(1):
        total += outputs
    if shared_output is not None:
        total += shared_output
    return total.to(out_dtype)
