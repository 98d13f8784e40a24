# SPDX-License-Identifier: Apache-2.0
"""How a result is compared with the reference's, where one bound for every tensor of it does not say it.

A rule takes the operation's name, the result, the reference's result and the arguments before the call, and raises
AssertionError. Every operation names its rule in its entry of verify/inputs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops import read_cache
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.verify.tolerance import TOLERANCES, assert_within
from megamoe.verify.values import moved, parts

Rule = Callable[[str, Any, Any, dict[str, Any]], None]

EQUAL = 1e-12
"""Two candidates whose fp64 scores are this close, relative to their size, have the same numbers behind them."""


def within(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare every tensor of a result under the operation's bound; integers and pools bit by bit.

    Raises:
        AssertionError: one is not within the bound.
    """
    got_parts = parts(got)
    for name, part in parts(want).items():
        assert_within(op, got_parts[name], part)


def products(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare x @ w.T [T, N], or the same by groups [T, G, N], whose terms are known.

    Raises:
        AssertionError: a row is not within the bound of the terms that it is made of.
    """
    x, w = arguments["x"], arguments["w"]
    assert_within(op, got, want, num_terms=x.shape[-1], term_sizes=lambda: product_sizes(_values(x), _values(w)))


def product_sizes(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares of the terms of every element of x @ w.T.

    Args:
        x: [T, K] or [T, G, K].
        w: [N, K] or [G, N, K].
    """
    squares = x.cpu().double().square()
    if w.dim() == 3:
        groups = [_square_sums(squares[:, group], one) for group, one in enumerate(w.cpu())]
        return torch.stack(groups, dim=1).sqrt()
    return _square_sums(squares, w.cpu()).sqrt()


def _square_sums(squares: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cat([squares @ rows.double().square().T for rows in w.split(512)], dim=1)  # 512: fp64 takes room


def _values(value: Any) -> torch.Tensor:
    """Return the numbers behind an operand."""
    value = moved(value, "cpu")
    if isinstance(value, NvFp4Tensor):
        return nvfp4.dequantize(value)
    if isinstance(value, MxFp4Tensor):
        return mxfp4.dequantize(value)
    if isinstance(value, Fp8RowTensor | Fp8BlockTensor):
        return fp8.dequantize(value)
    return torch.as_tensor(value)


def norm_and_quantized(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare a norm by its bound, and its quantization with the quantization of the very norm that came with it.

    Raises:
        AssertionError: the norm is not within its bound, or a byte of the quantization is another.
    """
    y, quantized = got
    assert_within(op, y, want[0])
    within("quantize_nvfp4", quantized, quantize_nvfp4(y.cpu()), arguments)


def routes(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare expert choices: fp32 sums in another order may swap experts whose scores are that close, no others.

    Raises:
        AssertionError: an expert was chosen before a clearly better or an equal, lower one; or a weight is wrong.
    """
    weights, ids = got[0].cpu(), got[1].cpu()
    if arguments.get("expert_table") is not None or ids.numel() == 0:
        assert_within(op, ids, want[1])  # a lookup: every bit
        assert_within(op, weights, want[0])
        return
    logits = arguments["x"].cpu().double() @ arguments["gate"].cpu().double().T
    scores = torch.nn.functional.softplus(logits).sqrt()
    bias = arguments.get("bias")
    keys = scores if bias is None else scores + bias.cpu().double()
    if int(ids.min()) < 0 or int(ids.max()) >= keys.shape[1]:
        raise AssertionError(f"{op}: an expert id is outside 0..{keys.shape[1] - 1}: {ids.aminmax()}")
    if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise AssertionError(f"{op}: a token has the same expert twice")
    lost = keys.gather(1, want[1]) - keys.gather(1, ids)  # [T, A]
    close = TOLERANCES[op].relative_l2 * keys.abs().amax(-1, keepdim=True)
    different = ids != want[1]
    wrong = (lost > close) | (different & (lost.abs() < EQUAL))
    if bool(wrong.any()):
        token, slot = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{op}: token {token} slot {slot}: got expert {int(ids[token, slot])} with "
            f"{float(keys[token, ids[token, slot]])!r}, want {int(want[1][token, slot])} with "
            f"{float(keys[token, want[1][token, slot]])!r}; equal ones go to the lowest"
        )
    chosen = scores.gather(1, ids)
    expected = chosen / chosen.sum(-1, keepdim=True) * arguments["routed_scaling"]
    assert_within(op, weights, expected.float())


def scores(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare index scores [T, N], whose terms are known.

    Raises:
        AssertionError: a row is not within the bound of the terms that it is made of.
    """

    def term_sizes() -> torch.Tensor:
        keys = read_cache.reference(moved(arguments["keys"], "cpu"), arguments["key_slots"].cpu()).double()
        return _score_sizes(_values(arguments["q"]).double(), arguments["head_weights"].cpu().double(), keys)

    assert_within(op, got, want, term_sizes=term_sizes)


def _score_sizes(q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares of the terms of every score [T, N]; q [T, Hi, K], keys [N, K]."""
    squares = (head_weights.square()[:, :, None] * q.square()).sum(1)  # [T, K]
    return (squares @ keys.square().T).sqrt()


def selections(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare selected entries [T, top_k]: entries whose scores are close may be swapped, no others.

    Scores are worked out in fp64 from the values of queries and keys. An entry may stand for another whose score is no
    further away than the bounds of both; of keys with the same bytes the lower one is taken.

    Raises:
        AssertionError: a row is not min(num_visible, top_k) visible entries in ascending order and then -1; an entry
            was left out for a clearly worse one, or for a later one with the same key.
    """
    got = got.cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{op}: got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}")
    pool, top_k = moved(arguments["keys"], "cpu"), arguments["top_k"]
    num_visible = arguments["num_visible"].cpu().long()
    _refuse_malformed(op, got, num_visible)
    q, head_weights = _values(arguments["q"]).double(), arguments["head_weights"].cpu().double()
    starts = arguments["query_starts"].tolist()
    for table, start, stop in zip(arguments["block_tables"].cpu().long(), starts, starts[1:], strict=False):
        for token in range(start, stop):
            num_keys = int(num_visible[token])
            if num_keys <= top_k:
                continue
            entries = torch.arange(num_keys)
            slots = table[entries // pool.rows_per_block] * pool.rows_per_block + entries % pool.rows_per_block
            keys = read_cache.reference(pool, slots)
            of_token = slice(token, token + 1)
            logits = (q[token] @ keys.double().T).clamp(min=0.0)  # [Hi, keys]
            score = head_weights[token] @ logits
            size = _score_sizes(q[of_token], head_weights[of_token], keys.double())[0].maximum(score.abs())
            _compare_selection(f"{op}: token {token}", got[token], keys, score, size)


def _refuse_malformed(op: str, got: torch.Tensor, num_visible: torch.Tensor) -> None:
    counts = num_visible.clamp(max=got.shape[1])[:, None]
    is_entry = torch.arange(got.shape[1]) < counts  # [T, top_k]
    ascends = torch.nn.functional.pad(got[:, :-1], (1, 0), value=-1) < got if got.shape[1] else is_entry
    right = torch.where(is_entry, (got >= 0) & (got < num_visible[:, None]) & ascends, got == -1)
    if not bool(right.all()):
        token, column = (~right).nonzero()[0].tolist()
        raise AssertionError(
            f"{op}: token {token} column {column}: got {int(got[token, column])}; a row is {int(counts[token])} "
            f"entries of 0..{int(num_visible[token]) - 1} in ascending order, then -1"
        )


def _compare_selection(
    where: str, got: torch.Tensor, keys: torch.Tensor, score: torch.Tensor, size: torch.Tensor
) -> None:
    is_chosen = torch.zeros(len(score), dtype=torch.bool)
    is_chosen[got] = True
    close = TOLERANCES["index_scores"].bound() * size
    worst = (score + close).masked_fill(~is_chosen, torch.inf).argmin()
    best = (score - close).masked_fill(is_chosen, -torch.inf).argmax()
    if bool(score[best] - close[best] > score[worst] + close[worst]):
        raise AssertionError(
            f"{where}: entry {int(worst)} with {float(score[worst])!r} was selected and entry {int(best)} with "
            f"{float(score[best])!r} was not"
        )
    _, group = keys.unique(dim=0, return_inverse=True)
    entries = torch.arange(len(score))
    num_groups = int(group.max()) + 1
    last = torch.full((num_groups,), -1).scatter_reduce(0, group[is_chosen], entries[is_chosen], "amax")
    first = torch.full((num_groups,), len(score)).scatter_reduce(0, group[~is_chosen], entries[~is_chosen], "amin")
    if bool((first < last).any()):
        which = int((first < last).nonzero()[0])
        raise AssertionError(
            f"{where}: entry {int(last[which])} was selected and entry {int(first[which])}, which has the same key, "
            "was not; equal ones go to the lowest"
        )
