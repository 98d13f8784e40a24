# SPDX-License-Identifier: Apache-2.0
"""token_logprobs: log-probabilities of one chosen token per row, and of the most probable ones.

Math       lp[t, v] = logits[t, v] - max_t - log(sum_v exp(logits[t, v] - max_t))
Numerics   fp32. Terms are added by halves, so that a row's bits do not depend on the other rows.
           The most probable tokens come in order of logits, equal ones by id.
Nobody     where token_ids[t] is -1: every log-probability is 0 and every id -1
Tolerance  verify/tolerance.py, "token_logprobs"
Kernels    a cluster a row; up to 131,072 columns
Source     docs/engine.md, section "Sampling"
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe.ops.check import FLOAT32, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.fixed_order import sum_by_halves


class Logprobs(NamedTuple):
    """Log-probabilities of T rows.

    Attributes:
        chosen: [T] fp32, of the chosen token; 0 in the rows of nobody.
        top_ids: [T, K] int64, the most probable tokens, most probable first; -1 in the rows of nobody.
        top: [T, K] fp32, theirs; 0 in the rows of nobody.
    """

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, num_top: int) -> Logprobs:
    """Return log-probabilities under softmax(logits).

    Args:
        logits: [T, V] fp32; -inf is allowed. T may be 0, V not.
        token_ids: [T] int64, the chosen tokens; -1 is a row of nobody.
        num_top: how many of the most probable tokens to return; at most V are.

    Returns:
        Logprobs with K = min(num_top, V), newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, num_top is negative, or (on the CPU) an id is outside the vocabulary.
    """
    dims = check("token_logprobs", logits=(logits, "T V", FLOAT32), token_ids=(token_ids, "T", INT64))
    if dims["V"] == 0 or num_top < 0:
        raise ValueError(
            f"token_logprobs: needs a column of logits and num_top >= 0; got {list(logits.shape)} and {num_top}."
        )
    run = pick("token_logprobs", logits.device, reference)
    return Logprobs(*run(logits, token_ids, num_top))


def reference(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Compute token_logprobs in plain torch."""
    num_tokens, vocab_size = logits.shape
    if num_tokens:
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < -1 or high >= vocab_size:
            raise ValueError(
                f"token_logprobs: token_ids must be 0 to {vocab_size - 1}, or -1 for nobody; got "
                f"{low if low < -1 else high}."
            )
    is_nobody = token_ids == -1
    best = logits.amax(dim=-1, keepdim=True)
    total = sum_by_halves((logits - best).exp_(), -1)  # [T]
    shift = best[:, 0] + total.log()
    chosen = logits.gather(1, token_ids.clamp(min=0)[:, None])[:, 0] - shift
    chosen.masked_fill_(is_nobody, 0.0)
    if not num_top:
        return Logprobs(chosen, token_ids.new_empty(num_tokens, 0), logits.new_empty(num_tokens, 0))
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    top_ids = order[:, :num_top].masked_fill(is_nobody[:, None], -1)
    return Logprobs(chosen, top_ids, (ordered[:, :num_top] - shift[:, None]).masked_fill_(is_nobody[:, None], 0.0))
