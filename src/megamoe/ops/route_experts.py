# SPDX-License-Identifier: Apache-2.0
"""route_experts: which experts a token goes to, and with which weights.

Math       s = sqrt(softplus(x @ gate.T))                                [T, E]
           ids = the top_k of s + bias, best first, or expert_table[token_ids]
           weights = s[ids] / sum(s[ids]) * routed_scaling
           where token_ids[t] is -1: ids -1 and weights 0
Numerics   everything fp32, the product included (the gate is stored in bf16 and never quantized). The bias only
           selects; the weights are the unbiased scores, of experts chosen by table, too. Equal scores go to the lowest
           expert. Nothing is added to the sum that normalizes. Row-invariant.
Tolerance  verify/tolerance.py, "route_experts"
Kernels    scores on the matrix unit, then a selection by warps. Ids outside the table or the experts give NaN
           weights there, since a kernel cannot raise without waiting for the device
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dequant_cache import dequantized
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul
from megamoe.ops.row_math import row_sum, softplus


def route_experts(
    x: torch.Tensor,
    gate: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None = None,
    expert_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by score, or by token id in layers that have a table.

    Args:
        x: [T, D] bf16 or fp32. T may be 0.
        gate: [E, D] bf16 or fp32.
        token_ids: [T] int64; -1 is a row of nobody, which goes to no expert.
        top_k: A, experts per token, 1 to E.
        routed_scaling: the weights of a token sum to it.
        bias: [E] fp32, added to the scores to select; None for none. Not together with expert_table.
        expert_table: [V, A] int64 or int32, the experts of every token id; None to select by score.

    Returns:
        weights [T, A] fp32 and expert ids [T, A] int64, newly allocated; 0 and -1 in the rows of nobody.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, top_k is out of range, bias and expert_table are both given, or (on the
            CPU) a token id is below -1 or not in the table, or the table names an expert that does not exist.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "route_experts",
        x=(x, "T D", FLOATS),
        gate=(gate, "E D", FLOATS),
        bias=(bias, "?E", FLOAT32),
        expert_table=(expert_table, "?V A", (torch.int64, torch.int32)),
        token_ids=(token_ids, "T", INT64),
    )
    if not 1 <= top_k <= dims["E"]:
        raise ValueError(f"route_experts: top_k must be 1 to {dims['E']} (the experts of gate); got {top_k}.")
    if expert_table is not None:
        _check_table(dims, top_k, bias)
    run = pick("route_experts", x.device, reference)
    return run(x, gate, top_k, routed_scaling, bias, expert_table, token_ids)  # type: ignore[no-any-return]


def _check_table(dims: dict[str, int], top_k: int, bias: torch.Tensor | None) -> None:
    if dims["A"] != top_k:
        raise ValueError(
            f"route_experts: expert_table must be [V, {top_k}], one column per slot; got {dims['A']} columns."
        )
    if bias is not None:
        raise ValueError(
            "route_experts: bias only selects experts by score; got bias and expert_table, which selects without "
            "scores. Pass one of them."
        )


def reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None,
    expert_table: torch.Tensor | None,
    token_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute route_experts in plain torch."""
    scores = softplus(row_invariant_matmul(x.float(), dequantized(gate))).sqrt_()  # [T, E]
    is_nobody = (token_ids == -1)[:, None]  # [T, 1]
    if expert_table is not None:
        _refuse_outside("token_ids", token_ids, -1, expert_table.shape[0], "rows of expert_table")
        expert_ids = expert_table[token_ids.clamp(min=0)].long().masked_fill_(is_nobody, 0)  # [T, A]
        _refuse_outside("expert_table", expert_ids, 0, gate.shape[0], "experts of gate")
    else:
        _refuse_outside("token_ids", token_ids, -1, None, "ids of tokens")
        selection = scores if bias is None else scores + bias
        expert_ids = selection.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()  # [T, A]
    chosen = scores.gather(1, expert_ids)
    weights = chosen.div_(row_sum(chosen)).mul_(routed_scaling)
    return weights.masked_fill_(is_nobody, 0.0), expert_ids.masked_fill_(is_nobody, -1)


def _refuse_outside(name: str, ids: torch.Tensor, least: int, limit: int | None, what: str) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < least or (limit is not None and high >= limit):
        got = low if low < least else high
        nobody = "-1 (nobody) or " if least < 0 else ""
        allowed = "0 and more" if limit is None else f"0 to {limit - 1}"
        raise ValueError(
            f"route_experts: {name} must be {nobody}{allowed}, the {what}; got {got}. Check the vocabulary."
        )


def _run(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None,
    expert_table: torch.Tensor | None,
    token_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = pick("route_experts", x.device, reference)
    return run(x, gate, top_k, routed_scaling, bias, expert_table, token_ids)  # type: ignore[no-any-return]


def _fake(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None,
    expert_table: torch.Tensor | None,
    token_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty((x.shape[0], top_k), dtype=torch.float32, device=x.device)
    return weights, torch.empty((x.shape[0], top_k), dtype=torch.int64, device=x.device)


traced(
    "route_experts",
    {
        "route_experts": "(Tensor x, Tensor gate, int top_k, float routed_scaling, Tensor? bias, Tensor? expert_table,"
        " Tensor token_ids) -> (Tensor, Tensor)"
    },
    {"route_experts": _run},
    {"route_experts": _fake},
)
