# SPDX-License-Identifier: Apache-2.0
"""When two selections of index entries agree although their scores were added in another order.

Rule       Let s[w] be an entry's exact score and b[w] how far an implementation's score may be from it. An entry
           certainly precedes another one if s - b of the first exceeds s + b of the second, or if both scores are exact
           (b = 0), equal, and the first has the lower number. A selection is right if none of the entries it leaves
           out certainly precedes one that it holds. Where a token sees at most top_k entries, it holds all of them.
Bound      b[w] = tolerance * sqrt(sum_h head_weights[h]^2 * sum_k (q[h, k] * key[w, k])^2), over the heads whose
           product is not certainly negative, with the tolerance of "index_scores". It is no worst case: fp32 sums of
           exact products come to a fiftieth of it in any order, and to a quarter where every addition truncates; one
           FP8 accumulator over K = 128 exceeds it, twentyfold at worst (tests/ops/test_index_products.py). A head that
           certainly gives 0 adds nothing, so an entry that no head likes has the exact score 0.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.verify.tolerance import TOLERANCES, Mismatch


@dataclasses.dataclass(frozen=True)
class ScoreBounds:
    """Exact scores and how far computed ones may be from them.

    Attributes:
        scores: [T, N] fp64.
        bounds: [T, N] fp64, at least 0.
    """

    scores: torch.Tensor
    bounds: torch.Tensor


def score_bounds(q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor) -> ScoreBounds:
    """Return the exact scores of keys and their bounds.

    Args:
        q: [T, H, K] values of the index queries, any float dtype.
        head_weights: [T, H] of either sign.
        keys: [N, K] values of the index keys.
    """
    q, head_weights, keys = q.double(), head_weights.double(), keys.double()
    tolerance = TOLERANCES["index_scores"].relative_l2
    logits, sizes = q @ keys.T, (q.square() @ keys.square().T).sqrt()  # [T, H, N]
    scores = torch.einsum("th,thn->tn", head_weights, logits.clamp(min=0.0))
    sizes.masked_fill_(logits < -tolerance * sizes, 0.0)
    return ScoreBounds(scores, tolerance * torch.einsum("th,thn->tn", head_weights.square(), sizes.square()).sqrt())


def compare_selections(got: torch.Tensor, want: torch.Tensor, found: ScoreBounds, num_visible: torch.Tensor) -> None:
    """Compare the entries that an implementation selected with the reference's.

    Args:
        got: [T, top_k] integers, entry numbers in ascending order, then -1.
        want: [T, top_k] from the reference, which decides how many entries a token holds.
        found: exact scores and bounds of entries 0 .. N - 1.
        num_visible: [T] integers; token t may hold entries 0 .. num_visible[t] - 1.

    Raises:
        AssertionError: shape or dtype is another.
        Mismatch: got is not in the form of a selection, or leaves out an entry that certainly precedes one that it
            holds; the message names the token and both entries.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"index_topk: got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}")
    for token in range(got.shape[0]):
        visible, count = int(num_visible[token]), int((want[token] >= 0).sum())
        chosen = got[token, :count]
        _check_form(token, got[token], want[token], count, visible)
        if count == visible or count == 0:
            continue
        scores, bounds = found.scores[token, :visible], found.bounds[token, :visible]
        is_chosen = torch.zeros(visible, dtype=torch.bool, device=got.device).index_fill_(0, chosen, True)
        held, left = is_chosen.nonzero()[:, 0], (~is_chosen).nonzero()[:, 0]
        last = held[(scores + bounds)[held].argmin()]
        first = left[(scores - bounds)[left].argmax()]
        if float((scores - bounds)[first]) > float((scores + bounds)[last]):
            raise _left_out(token, int(first), int(last), chosen, scores, bounds)
        exact = bounds == 0.0
        for entry in held[exact[held]].tolist():
            before = left[exact[left] & (scores[left] == scores[entry]) & (left < entry)]
            if before.numel():
                raise _left_out(token, int(before[0]), entry, chosen, scores, bounds)


def _check_form(token: int, row: torch.Tensor, want: torch.Tensor, count: int, visible: int) -> None:
    chosen, rest = row[:count], row[count:]
    if bool((rest != -1).any()) or bool((chosen < 0).any()):
        held = int((row >= 0).sum())
        column = int(torch.cat((chosen < 0, rest != -1)).nonzero()[0])
        message = f"index_topk: token {token} holds {held} entries, want {count}, then -1; got {row.tolist()}"
        raise Mismatch(message, (token, column), int(row[column]), int(want[column]))
    if count and (int(chosen[-1]) >= visible or bool((chosen.diff() <= 0).any())):
        message = (
            f"index_topk: token {token} must hold different entries below {visible} in ascending order; "
            f"got {row.tolist()}"
        )
        column = int((chosen != want[:count]).nonzero()[0])
        raise Mismatch(message, (token, column), int(row[column]), int(want[column]))


def _left_out(
    token: int, left: int, held: int, chosen: torch.Tensor, scores: torch.Tensor, bounds: torch.Tensor
) -> Mismatch:
    message = (
        f"index_topk: token {token} holds entry {held} with score {float(scores[held])!r} +- {float(bounds[held]):.1e} "
        f"and leaves out entry {left} with {float(scores[left])!r} +- {float(bounds[left]):.1e}; equal ones go to the "
        f"lowest"
    )
    return Mismatch(message, (token, int((chosen == held).nonzero()[0])), held, left)
