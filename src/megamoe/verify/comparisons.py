# SPDX-License-Identifier: Apache-2.0
"""How a result is compared with the reference's, where one bound for every tensor of it does not say it.

A rule takes the operation's name, the result, the reference's result and the arguments before the call, and raises
AssertionError. Every operation names its rule in its entry of verify/inputs.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.cache_rows import CachePool, decode_rows
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops import read_cache
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.verify.selection import compare_selections, score_bounds
from megamoe.verify.tolerance import ROW_ROUNDING, TOLERANCES, Mismatch, assert_within
from megamoe.verify.values import copied, moved, parts, pool_rows, rows_of, whole_storage

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
        AssertionError: an expert was chosen before a clearly better or an equal, lower one, or for nobody; or a weight
            is wrong.
    """
    weights, ids = got[0].cpu(), got[1].cpu()
    is_nobody = arguments["token_ids"].cpu() == -1
    if bool(is_nobody.any()):
        index = is_nobody.nonzero()[:, 0]
        assert_within(op, ids[index], torch.full_like(ids[index], -1))
        assert_within(op, weights[index], torch.zeros_like(weights[index]))
        index = (~is_nobody).nonzero()[:, 0]
        some = {**arguments, **{name: rows_of(moved(arguments[name], "cpu"), index) for name in ("x", "token_ids")}}
        routes(op, rows_of((weights, ids), index), rows_of(want, index), some)
        return
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
        chose, best = int(ids[token, slot]), int(want[1][token, slot])
        message = (
            f"{op}: token {token} slot {slot}: got expert {chose} with {float(keys[token, chose])!r}, want {best} with "
            f"{float(keys[token, best])!r}; equal ones go to the lowest"
        )
        raise Mismatch(message, (token, slot), chose, best)
    chosen = scores.gather(1, ids)
    expected = chosen / chosen.sum(-1, keepdim=True) * arguments["routed_scaling"]
    assert_within(op, weights, expected.float())


def scores(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare index scores [T, N] with exact ones, each within the bound of its own terms.

    Raises:
        AssertionError: a score is further from the exact one than verify/selection.py allows, or NaN.
    """
    got = got.cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{op}: got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}")
    keys = read_cache.reference(moved(arguments["keys"], "cpu"), arguments["key_slots"].cpu())
    found = score_bounds(_values(arguments["q"]), arguments["head_weights"].cpu(), keys)
    wrong = ~((got.double() - found.scores).abs() <= found.bounds)
    if bool(wrong.any()):
        token, entry = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{op}: {int(wrong.sum())} of {wrong.numel()} elements differ, first at [{token}, {entry}]: got "
            f"{float(got[token, entry])!r}, want {float(found.scores[token, entry])!r} +- "
            f"{float(found.bounds[token, entry]):.1e}"
        )


def selections(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare selected entries [T, top_k] by the rule of verify/selection.py, the tokens of each request by its keys.

    Raises:
        AssertionError: a row is not a selection, or leaves out an entry that certainly precedes one that it holds.
    """
    got, requests = got.cpu(), arguments["requests"].cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{op}: got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}")
    pool, num_visible = moved(arguments["keys"], "cpu"), arguments["num_visible"].cpu().masked_fill(requests < 0, 0)
    q, head_weights = _values(arguments["q"]), arguments["head_weights"].cpu()
    for request in requests.unique().tolist():
        tokens = (requests == request).nonzero()[:, 0]
        entries = torch.arange(int(num_visible[tokens].max()))
        blocks = arguments["block_tables"].cpu()[request].long()[entries // pool.rows_per_block]
        keys = read_cache.reference(pool, blocks * pool.rows_per_block + entries % pool.rows_per_block)
        found = score_bounds(q[tokens], head_weights[tokens], keys)
        try:
            compare_selections(got[tokens].long(), want[tokens].long(), found, num_visible[tokens])
        except Mismatch as wrong:  # counts the tokens of this request
            place = (int(tokens[wrong.coordinate[0]]), *wrong.coordinate[1:])
            message = f"{op}: request {request}, token {place[0]} of the step: {wrong}"
            raise Mismatch(message, place, wrong.got, wrong.want) from wrong


def attention(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare attention by the bound of what it multiplies.

    Raises:
        AssertionError: a row is not within the bound.
    """
    is_fp16 = arguments.get("operand_dtype") == torch.float16
    within(op if is_fp16 else f"{op}, fp32 operands", got, want, arguments)


@contextlib.contextmanager
def _damage_is_an_error(where: str) -> Iterator[None]:
    """Turn the refusal of a NaN code or scale, as unwritten memory has them, into a wrong result."""
    try:
        yield
    except ValueError as refused:
        raise AssertionError(f"{where}: {refused}") from refused


def rounded_query(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    """Compare index queries by their values, of which a few may lie beside a step, and the head weights.

    Raises:
        AssertionError: a row is not within the bound and the rounding of the keys' format.
    """
    rounding = ROW_ROUNDING[arguments["key_format"]] + 2.0**-8
    with _damage_is_an_error(op):
        values = _values(got[0]).float()
    assert_within(op, values, _values(want[0]).float(), rounding=rounding)
    assert_within(op, got[1], want[1])


def rows_written(*names: str) -> Rule:
    """Return the rule of an operation that works rows out and writes them into pools.

    Rows that the reference has written are compared by their values, under the operation's bound and the rounding of
    the row format; everything else in a pool's memory byte by byte.

    Args:
        *names: the pools among the arguments, in the order of the result, behind what the operation returns.
    """

    def compare(op: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
        returned = len(want) - len(names)
        within(op, got[:returned], want[:returned], arguments)
        for name, one, other in zip(names, got[returned:], want[returned:], strict=True):
            before = moved(arguments[name], "cpu")
            _compare_rows(f"{name} of {op}", op, before, copied(one, "cpu"), copied(other, "cpu"))

    return compare


def _compare_rows(where: str, op: str, before: CachePool, got: CachePool, want: CachePool) -> None:
    slots = torch.arange(want.num_slots)
    if want.num_slots == before.num_slots:  # else some of the rows that were written, and nothing else
        stored = zip(pool_rows(before, slots), pool_rows(want, slots), strict=True)
        slots = slots[torch.stack([(one != other).any(-1) for one, other in stored]).any(0)]
    with _damage_is_an_error(where):
        values = decode_rows(*pool_rows(got, slots), want.row_format, want.width)
    expected = decode_rows(*pool_rows(want, slots), want.row_format, want.width)
    try:
        assert_within(op, values, expected, rounding=ROW_ROUNDING[want.row_format])
    except Mismatch as wrong:
        place = (int(slots[wrong.coordinate[0]]), *wrong.coordinate[1:])
        message = f"{where}: row {place[0]} of the pool: {wrong}"
        raise Mismatch(message, place, wrong.got, wrong.want, is_slot=True) from wrong
    block, row = slots // want.rows_per_block, slots % want.rows_per_block
    for pool in (got, want):
        pool.data_rows[block, row] = 0
        pool.scale_rows[block, row] = 0
    differing = (whole_storage(got.storage) != whole_storage(want.storage)).nonzero()
    if len(differing):
        raise AssertionError(f"{where}: {len(differing)} bytes that the operation does not write differ")
