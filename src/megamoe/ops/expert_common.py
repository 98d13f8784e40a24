# SPDX-License-Identifier: Apache-2.0
"""The skeleton that the four routed-experts operations share; each of them only says how one expert is multiplied.

Math       out[t] = sum over slots a = 0, 1, .. of expert_(ids[t, a])(x[t]; route_weights[t, a])  + shared_output[t]
           expert_e(v; r) = w2[e] . h,   h = clamped_swiglu(w1[e] . v, w3[e] . v) * r
Numerics   gate and up stay fp32 until h, which is rounded to what w2 is multiplied by (see the operation). The route
           weight multiplies h before that rounding. Each expert's output is rounded to the dtype of x; the slots are
           added in fp32 in ascending order, then the shared output, then one rounding to out_dtype.
           w1 and w3 are two weights with their own scales: nothing is fused, so no scale can be shared by mistake.
           The NVFP4 operations take the shared expert's weights instead of its output: shared_output[t] is then what
           the linear of the same arithmetic gives, gate, up, h and output each rounded to the dtype of x.
           Row-invariant. Experts without tokens are not touched.
Nobody     An id of -1 is no expert, an id of E or more an expert of another rank: neither adds anything nor is a weight
           read for it. A token all of whose ids are -1 is nobody: its output is 0 whatever its row holds, and the
           shared expert adds nothing to it; to a token with no expert but those of other ranks it does.
Memory     A * T * F values in fp32 (three times) and A * T * D of the dtype of x
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Any

import torch

from megamoe.ops import swiglu
from megamoe.ops.check import FLOAT32, FLOATS, INT64, OUT_DTYPES, check
from megamoe.ops.dequant_cache import Weight, dequantized
from megamoe.ops.matmul import row_invariant_matmul


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
    shared_weights: tuple[Any, Any, Any] | None = None,
) -> None:
    """Check the arguments of a routed-experts operation; weights are w1, w3 and w2."""
    w1, w3, w2 = weights
    shared_w1, shared_w3, shared_w2 = (None, None, None) if shared_weights is None else shared_weights
    if shared_output is not None and shared_weights is not None:
        raise ValueError(
            f"{op}: the shared expert is given by its output or by its weights; got both. Pass shared_output or "
            "shared_weights."
        )
    check(
        op,
        x=(x, "T D", FLOATS),
        route_weights=(route_weights, "T A", FLOAT32),
        expert_ids=(expert_ids, "T A", INT64),
        w1=(w1, "E F D", weight_types),
        w3=(w3, "E F D", weight_types),
        w2=(w2, "E D F", weight_types),
        shared_output=(shared_output, "?T D", FLOATS),
        shared_w1=(shared_w1, "?F D", weight_types),
        shared_w3=(shared_w3, "?F D", weight_types),
        shared_w2=(shared_w2, "?D F", weight_types),
        out_dtype=(out_dtype, OUT_DTYPES),
    )
    swiglu.check_limit(op, swiglu_limit)


def sum_of_experts(
    op: str,
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: tuple[Weight, Weight, Weight],
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
    round_input: Callable[[torch.Tensor], torch.Tensor],
    round_hidden: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run every chosen expert once over all of its tokens and add the slots up.

    Args:
        op: the operation's name for messages.
        x: [T, D] bf16 or fp32.
        route_weights: [T, A] fp32.
        expert_ids: [T, A] int64.
        weights: w1, w3 and w2.
        shared_output: [T, D] or None.
        swiglu_limit: the clamp or None.
        out_dtype: dtype of the result.
        round_input: x [T, D] -> fp32, what w1 and w3 are multiplied by; each row on its own.
        round_hidden: h [n, F] fp32 -> fp32, what w2 is multiplied by; each row on its own.

    Raises:
        ValueError: an expert id is below -1.
    """
    w1, w3, w2 = weights
    num_tokens, num_slots = expert_ids.shape
    order, spans = _order(op, expert_ids, w1.shape[0])
    nobody = is_nobody(expert_ids)
    has_nobody = bool(nobody.any())
    inputs = round_input(x.masked_fill(nobody[:, None], 0.0) if has_nobody else x)  # their rows may hold anything
    tokens = order // num_slots
    gate = inputs.new_empty(order.shape[0], w1.shape[1])  # [n, F], slots by expert
    up = torch.empty_like(gate)
    for expert_id, start, stop in spans:
        rows = inputs[tokens[start:stop]]
        gate[start:stop] = row_invariant_matmul(rows, dequantized(w1, expert_id))
        up[start:stop] = row_invariant_matmul(rows, dequantized(w3, expert_id))
    hidden = round_hidden(swiglu.reference(gate, up, swiglu_limit, route_weights.reshape(-1)[order], torch.float32))
    outputs = x.new_zeros(num_tokens * num_slots, x.shape[1])  # [T * A, D], slots by token
    for expert_id, start, stop in spans:
        outputs[order[start:stop]] = row_invariant_matmul(hidden[start:stop], dequantized(w2, expert_id)).to(x.dtype)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot_output in outputs.view(num_tokens, num_slots, x.shape[1]).unbind(1):
        total += slot_output
    if shared_output is not None:
        total += shared_output
    return (total.masked_fill_(nobody[:, None], 0.0) if has_nobody else total).to(out_dtype)


def is_nobody(expert_ids: torch.Tensor) -> torch.Tensor:
    """Return [T] bool, the tokens all of whose expert ids [T, A] are -1."""
    return (expert_ids == -1).all(1)


def without_nobody(x: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Return x [T, D] with zeros in the rows of nobody, which may hold anything and must not be refused for it."""
    nobody = is_nobody(expert_ids)
    return x.masked_fill(nobody[:, None], 0.0) if bool(nobody.any()) else x


def shared_expert(
    x: torch.Tensor,
    weights: tuple[Weight, Weight, Weight],
    swiglu_limit: float | None,
    rounded: Callable[[torch.Tensor], Any],
    times: Callable[[Any, Any, torch.dtype], torch.Tensor],
) -> torch.Tensor:
    """Return the shared expert's output [T, D] in the dtype of x.

    Args:
        x: [T, D] bf16 or fp32.
        weights: w1 and w3 [F, D], w2 [D, F].
        swiglu_limit: the clamp or None.
        rounded: values [T, K] -> what weights are multiplied by.
        times: (rounded values, weight [N, K], dtype) -> [T, N], a linear's reference.
    """
    w1, w3, w2 = weights
    source = rounded(x)
    hidden = swiglu.reference(times(source, w1, x.dtype), times(source, w3, x.dtype), swiglu_limit, None, x.dtype)
    return times(rounded(hidden), w2, x.dtype)


def _order(op: str, expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Return the slots [n] that have an expert here, by expert and tokens ascending, and (expert, start, stop) of each.

    Raises:
        ValueError: an expert id is below -1.
    """
    sorted_ids, order = expert_ids.reshape(-1).sort(stable=True)
    ids = sorted_ids.tolist()
    if ids and ids[0] < -1:
        raise ValueError(
            f"{op}: expert_ids must be an expert of w1 (0 to {num_experts - 1}), {num_experts} or more for an expert "
            f"of another rank, or -1 for none; got {ids[0]}. Number the experts of other ranks from {num_experts} on."
        )
    first, last = bisect.bisect_left(ids, 0), bisect.bisect_left(ids, num_experts)
    spans, start = [], 0
    for expert_id, run in itertools.groupby(ids[first:last]):
        stop = start + len(list(run))
        spans.append((expert_id, start, stop))
        start = stop
    return order[first:last], spans
