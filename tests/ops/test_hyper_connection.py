# SPDX-License-Identifier: Apache-2.0
"""hyper_connection: hand-worked mixes, an independent fp64 computation, and the faults F19 that it must tell apart."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_head_norm,
    hyper_connection_post,
    hyper_connection_post_pre_norm,
    hyper_connection_pre,
    hyper_connection_pre_norm,
)
from megamoe.ops.rms_norm import rms_norm
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant

EPS = 1e-6
FAULTS = [
    "sigmoid for softmax",
    "post without factor 2",
    "post with eps",
    "rows first",
    "pre without eps",
    "no column end",
]


def _weights(num_streams: int, width: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    num_rows = (2 + num_streams) * num_streams
    fn = torch.randn(num_rows, num_streams * width, generator=generator) * spread / math.sqrt(num_streams * width)
    return fn, torch.randn(num_rows, generator=generator), torch.tensor([0.7, 1.3, 1.9])


def _pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    fault: str | None = None,
    hc_eps: float = EPS,
    iters: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute u, post and C token by token in Python floats, from the text of the specification."""
    num_tokens, n, width = x.shape
    outputs = []
    for token in range(num_tokens):
        flat = x[token].double().reshape(-1)
        statistic = float((flat.square().sum() / flat.numel() + EPS).rsqrt())
        m = [float(flat @ row) * statistic for row in fn.double()]
        s, b = scale.tolist(), base.tolist()
        pre = [
            1 / (1 + math.exp(-(m[j] * s[0] + b[j]))) + (0 if fault == "pre without eps" else hc_eps) for j in range(n)
        ]
        factor = 1 if fault == "post without factor 2" else 2
        shift = hc_eps if fault == "post with eps" else 0
        post = [factor / (1 + math.exp(-(m[n + j] * s[1] + b[n + j]))) + shift for j in range(n)]
        logits = [[m[2 * n + n * j + k] * s[2] + b[2 * n + n * j + k] for k in range(n)] for j in range(n)]
        if fault == "sigmoid for softmax":
            c = [[1 / (1 + math.exp(-v)) + hc_eps for v in row] for row in logits]
        else:
            c = [[math.exp(v) / sum(map(math.exp, row)) + hc_eps for v in row] for row in logits]
        steps = ["column"] + ["row", "column"] * (iters - 1)
        if fault == "rows first":
            steps = ["row", "column"] * iters
        if fault == "no column end":
            steps = steps[:-1]
        for step in steps:
            rows = [sum(row) + hc_eps for row in c]
            columns = [sum(row[k] for row in c) + hc_eps for k in range(n)]
            c = [[c[j][k] / (rows[j] if step == "row" else columns[k]) for k in range(n)] for j in range(n)]
        u = sum(pre[j] * x[token, j].double() for j in range(n))
        outputs.append((u, torch.tensor(post), torch.tensor(c)))
    u, post, comb = (torch.stack(part) for part in zip(*outputs, strict=True))
    return u.to(x.dtype), post.float(), comb.float()


def _post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, index: str) -> torch.Tensor:
    mix = torch.einsum("tjk,tjd->tkd" if index == "first" else "tkj,tjd->tkd", comb.double(), x.double())
    return (post.double()[:, :, None] * y.double()[:, None] + mix).to(x.dtype)


# --- known answers ---


def test_zero_parameters_average_the_streams() -> None:
    x = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    zeros = torch.zeros(24, 12), torch.zeros(24), torch.zeros(3)
    u, post, comb = hyper_connection_pre(x, *zeros)
    torch.testing.assert_close(u, x.sum(1) * (0.5 + EPS))
    assert torch.equal(post, torch.ones(2, 4))
    torch.testing.assert_close(comb, torch.full((2, 4, 4), 0.25), rtol=1e-5, atol=0.0)
    y = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    want = y[:, None] + x.mean(1, keepdim=True)
    torch.testing.assert_close(hyper_connection_post(y, x, post, comb), want.expand(2, 4, 3), rtol=1e-5, atol=1e-5)


def test_one_column_step_by_hand() -> None:
    """Rows (3/4, 1/4) and (1/2, 1/2) after the softmax; columns sum to 5/4 and 3/4; the first index is summed."""
    x = torch.tensor([[[1.0], [10.0]]])
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, math.log(3.0), 0.0, 0.0, 0.0])
    u, post, comb = hyper_connection_pre(x, torch.zeros(8, 2), base, torch.ones(3), hc_eps=0.0, sinkhorn_iters=1)
    torch.testing.assert_close(u, torch.tensor([[5.5]]))
    torch.testing.assert_close(comb, torch.tensor([[[0.6, 1 / 3], [0.4, 2 / 3]]]))
    mixed = hyper_connection_post(torch.zeros(1, 1), x, post, comb)
    torch.testing.assert_close(mixed, torch.tensor([[[4.6], [7.0]]]))


def test_the_statistic_is_one_number_over_all_streams() -> None:
    x = torch.tensor([[[3.0], [4.0]]])  # mean square 12.5
    fn, base = torch.zeros(8, 2), torch.zeros(8)
    fn[0, 0] = 1.0
    u, _, _ = hyper_connection_pre(x, fn, base, torch.tensor([2.0, 1.0, 1.0]), norm_eps=0.0, hc_eps=0.0)
    pre = 1 / (1 + math.exp(-2 * 3 / math.sqrt(12.5)))
    torch.testing.assert_close(u, torch.tensor([[3 * pre + 4 * 0.5]]))


def test_head_by_hand() -> None:
    x = torch.tensor([[[3.0, 1.0], [4.0, 2.0]]])
    fn = torch.zeros(2, 4)
    base = torch.tensor([math.log(3.0), -math.log(3.0)])
    h = hyper_connection_head(x, fn, base, torch.ones(1), hc_eps=0.0)
    torch.testing.assert_close(h, torch.tensor([[0.75 * 3 + 0.25 * 4, 0.75 * 1 + 0.25 * 2]]))


# --- properties ---


@pytest.mark.parametrize("num_streams,width", [(4, 64), (2, 3), (1, 8), (4, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_specification_in_fp64(num_streams: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(5, num_streams, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weights = _weights(num_streams, width, seed + 1)
    for got, want in zip(hyper_connection_pre(x, *weights), _pre(x, *weights), strict=True):
        assert_within("hyper_connection_pre", got, want)
    u, post, comb = hyper_connection_pre(x, *weights)
    assert_within("hyper_connection_post", hyper_connection_post(u, x, post, comb), _post(u, x, post, comb, "first"))
    fn, base, scale = weights
    head = hyper_connection_head(x, fn[:num_streams], base[:num_streams], scale[:1])
    assert_within("hyper_connection_head", head, _pre(x, *weights)[0])


def test_the_mix_is_doubly_stochastic_and_not_symmetric(seed: int) -> None:
    x = torch.randn(9, 4, 32, generator=torch.Generator().manual_seed(seed))
    _, post, comb = hyper_connection_pre(x, *_weights(4, 32, seed))
    torch.testing.assert_close(comb.sum(1), torch.ones(9, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(comb.sum(2), torch.ones(9, 4), rtol=0.1, atol=0.1)
    assert bool((comb > 0).all()) and bool(((post > 0) & (post < 2)).all())
    assert not torch.allclose(comb, comb.transpose(1, 2), atol=1e-3)


@pytest.mark.parametrize("num_streams", [2, 4])
def test_row_invariant(num_streams: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(130, num_streams, 48, generator=generator).bfloat16()
    y = torch.randn(130, 48, generator=generator).bfloat16()
    fn, base, scale = _weights(num_streams, 48, seed)

    def whole(streams: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, post, comb = hyper_connection_pre(streams, fn, base, scale)
        head = hyper_connection_head(streams, fn[:num_streams], base[:num_streams], scale[:1])
        return u, post, comb, hyper_connection_post(output, streams, post, comb), head

    assert_row_invariant(whole, x, y)


# --- faults F19 ---


@pytest.mark.parametrize("fault", FAULTS[:2])
def test_gross_faults_are_caught_with_the_constants_of_the_model(fault: str, seed: int) -> None:
    _assert_caught(fault, seed, hc_eps=EPS, iters=20)


@pytest.mark.parametrize("fault", FAULTS)
def test_subtle_faults_are_caught_with_constants_that_show_them(fault: str, seed: int) -> None:
    """A misplaced 1e-6 or a 40th step cannot be seen; a misplaced 0.05 or a 4th of 3 can."""
    _assert_caught(fault, seed, hc_eps=0.05, iters=2)


def _assert_caught(fault: str, seed: int, hc_eps: float, iters: int) -> None:
    x = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(seed))
    weights = _weights(4, 64, seed)
    got = hyper_connection_pre(x, *weights, hc_eps=hc_eps, sinkhorn_iters=iters)
    for part, want in zip(got, _pre(x, *weights, hc_eps=hc_eps, iters=iters), strict=True):
        assert_within("hyper_connection_pre", part, want)
    with pytest.raises(AssertionError, match="hyper_connection_pre: .* first at"):
        for part, want in zip(got, _pre(x, *weights, fault=fault, hc_eps=hc_eps, iters=iters), strict=True):
            assert_within("hyper_connection_pre", part, want)


def test_the_wrong_contraction_index_is_caught(seed: int) -> None:
    x = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(seed))
    u, post, comb = hyper_connection_pre(x, *_weights(4, 64, seed))
    got = hyper_connection_post(u, x, post, comb)
    assert_within("hyper_connection_post", got, _post(u, x, post, comb, "first"))
    with pytest.raises(AssertionError, match="hyper_connection_post: .* first at"):
        assert_within("hyper_connection_post", got, _post(u, x, post, comb, "second"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pre_norm_is_pre_and_then_the_norm_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, 64, generator=generator).to(dtype)
    weight = (1.0 + 0.2 * torch.randn(64, generator=generator)).bfloat16()
    weights = _weights(4, 64, seed)
    u, post, comb = hyper_connection_pre(x, *weights, norm_eps=1e-5)
    got = hyper_connection_pre_norm(x, *weights, weight, norm_eps=1e-5)
    for one, want in zip(got, (rms_norm(u, weight, eps=1e-5), post, comb), strict=True):
        assert one.dtype == want.dtype and torch.equal(one, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_post_pre_norm_is_post_and_then_pre_norm_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(37, 4, 64, generator=generator).to(dtype), torch.randn(37, 64, generator=generator).to(dtype)
    weight = (1.0 + 0.2 * torch.randn(64, generator=generator)).bfloat16()
    _, post, comb = hyper_connection_pre(x, *_weights(4, 64, seed))
    weights = _weights(4, 64, seed + 1)
    constants = {"norm_eps": 1e-5, "hc_eps": 1e-3, "sinkhorn_iters": 3}
    streams = hyper_connection_post(y, x, post, comb)
    want = streams, *hyper_connection_pre_norm(streams, *weights, weight, **constants)
    got = hyper_connection_post_pre_norm(y, x, post, comb, *weights, weight, **constants)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)

    def call(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hyper_connection_post_pre_norm(*rows, *weights, weight, **constants)

    assert_row_invariant(call, y, x, post, comb)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_norm_is_the_head_of_some_rows_and_the_norm_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(35, 4, 64, generator=generator).to(dtype)
    weight = (1.0 + 0.2 * torch.randn(64, generator=generator)).bfloat16()
    fn, base, scale = _weights(4, 64, seed)
    head = fn[:4], base[:4], scale[:1]
    want = rms_norm(hyper_connection_head(x, *head, norm_eps=1e-5), weight, eps=1e-5)
    got = hyper_connection_head_norm(x, *head, weight, norm_eps=1e-5)
    assert got.dtype == dtype and torch.equal(got, want)
    rows = torch.tensor([34, 0, -1, 7, 7, -1])
    some = hyper_connection_head_norm(x, *head, weight, rows=rows, norm_eps=1e-5)
    assert torch.equal(some[rows >= 0], want[rows[rows >= 0]]) and not some[rows < 0].count_nonzero()
    assert_row_invariant(lambda streams: hyper_connection_head_norm(streams, *head, weight), x)
    assert hyper_connection_head_norm(x, *head, weight, rows=rows[:0]).shape == (0, 64)
    nobody = hyper_connection_head_norm(x[:0], *head, weight, rows=rows[2:3])
    assert nobody.tolist() == [[0.0] * 64]


# --- refusals ---


def test_refusals() -> None:
    x = torch.zeros(3, 4, 8)
    fn, base, scale = torch.zeros(24, 32), torch.zeros(24), torch.zeros(3)
    with pytest.raises(ValueError, match=r"fn must be \[\(2 \+ X\) \* X, X \* D\] = \[24, 32\].*; got \[24, 31\]"):
        hyper_connection_pre(x, torch.zeros(24, 31), base, scale)
    with pytest.raises(ValueError, match=r"= \[24, 32\].*; got \[4, 32\]"):
        hyper_connection_pre(x, fn[:4], base[:4], scale)
    with pytest.raises(ValueError, match=r"scale must be \[3\]"):
        hyper_connection_pre(x, fn, base, torch.zeros(1))
    with pytest.raises(TypeError, match="fn must be float32; got bfloat16"):
        hyper_connection_pre(x, fn.bfloat16(), base, scale)
    with pytest.raises(ValueError, match="sinkhorn_iters must be at least 1; got 0"):
        hyper_connection_pre(x, fn, base, scale, sinkhorn_iters=0)
    with pytest.raises(ValueError, match=r"hyper_connection_pre_norm: weight must be \[D\]"):
        hyper_connection_pre_norm(x, fn, base, scale, torch.ones(7))
    with pytest.raises(ValueError, match="hyper_connection_pre_norm: sinkhorn_iters must be at least 1; got 0"):
        hyper_connection_pre_norm(x, fn, base, scale, torch.ones(8), sinkhorn_iters=0)
    with pytest.raises(ValueError, match=r"hyper_connection_head: fn must be \[X, X \* D\] = \[4, 32\]"):
        hyper_connection_head(x, fn, base, scale[:1])
    with pytest.raises(ValueError, match=r"hyper_connection_post: comb must be \[T, X, X\].*; got float32 \[3, 4, 5\]"):
        hyper_connection_post(torch.zeros(3, 8), x, torch.zeros(3, 4), torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"hyper_connection_post: x must be \[T, X, D\]"):
        hyper_connection_post(torch.zeros(3, 8), torch.zeros(3, 4, 9), torch.zeros(3, 4), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="hyper_connection_post_pre_norm: sinkhorn_iters must be at least 1; got 0"):
        hyper_connection_post_pre_norm(
            torch.zeros(3, 8),
            x,
            torch.zeros(3, 4),
            torch.zeros(3, 4, 4),
            fn,
            base,
            scale,
            torch.ones(8),
            sinkhorn_iters=0,
        )
    with pytest.raises(ValueError, match=r"hyper_connection_post_pre_norm: fn must be .* got \[4, 32\]"):
        hyper_connection_post_pre_norm(
            torch.zeros(3, 8), x, torch.zeros(3, 4), torch.zeros(3, 4, 4), fn[:4], base[:4], scale, torch.ones(8)
        )
    for bad in (3, -2):
        with pytest.raises(ValueError, match=rf"hyper_connection_head_norm: rows must be 0 to 2, .*; got {bad}"):
            hyper_connection_head_norm(x, fn[:4], base[:4], scale[:1], torch.ones(8), rows=torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="hyper_connection_head_norm: rows must be int64; got int32"):
        hyper_connection_head_norm(x, fn[:4], base[:4], scale[:1], torch.ones(8), rows=torch.zeros(1).int())
    with pytest.raises(ValueError, match=r"hyper_connection_head_norm: fn must be \[X, X \* D\]"):
        hyper_connection_head_norm(x, fn, base, scale[:1], torch.ones(8))
