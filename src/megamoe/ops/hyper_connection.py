# SPDX-License-Identifier: Apache-2.0
"""hyper_connection: collapse the residual streams before a sublayer and mix its output back (mHC).

Math       per token, x = the X streams [X, D] flattened stream by stream:
           m      = (x . fn^T) * rsqrt(mean(x^2) + norm_eps)                 (2 + X) * X numbers
           pre_j  = sigmoid(m_j * scale_0 + base_j) + hc_eps                 j < X
           post_j = 2 * sigmoid(m_(X+j) * scale_1 + base_(X+j))
           C_jk   = softmax over k of (m_(2X+Xj+k) * scale_2 + base_(2X+Xj+k)), plus hc_eps
           then Sinkhorn: columns (sum over j), and sinkhorn_iters - 1 times rows (sum over k) and columns; every step
           divides by (sum + hc_eps)
           u      = sum_j pre_j * x_j                    hyper_connection_pre  -> u, post, C
           x'_k   = post_k * y + sum_j C_jk * x_j        hyper_connection_post: the FIRST index of C is summed
           h      = sum_j pre_j * x_j                    hyper_connection_head: pre alone, no Sinkhorn
           hyper_connection_pre_norm is hyper_connection_pre and rms_norm of its u, rounded in between as u is
           hyper_connection_post_pre_norm is hyper_connection_post of one sublayer and hyper_connection_pre_norm of the
           next, over the streams as they are rounded in between
           hyper_connection_head_norm is hyper_connection_head of some rows and rms_norm of its h, rounded in between
Numerics   everything fp32; u, x' and h are rounded once to the dtype of x; post and C stay fp32. Sums over streams are
           added in ascending order, in hyper_connection_post after the term of y. Row-invariant.
Tolerance  verify/tolerance.py, "hyper_connection_pre", "..._pre_norm", "..._post", "..._post_pre_norm", "..._head",
           "..._head_norm"
Kernels    pre, pre_norm and head as one kernel that reads the streams once and takes fn to 17 significant
           bits; post in one pass, bit for bit. post_pre_norm: post, then pre_norm. head_norm: rows gathered by
           the kernel of embed_streams, head, rms_norm
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code
"""

from __future__ import annotations

import functools

import torch

from megamoe.formats.division import divide
from megamoe.ops import rms_norm as norm_op
from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul
from megamoe.ops.row_math import row_sum, sigmoid


def hyper_connection_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collapse the streams into a sublayer's input and make the weights that mix its output back.

    Args:
        x: [T, X, D] bf16 or fp32, the streams. T may be 0.
        fn: [(2 + X) * X, X * D] fp32; rows are pre, post, then C row by row.
        base: [(2 + X) * X] fp32.
        scale: [3] fp32, for pre, post and C.
        norm_eps: added to the mean of squares.
        hc_eps: added to pre, to C and to every Sinkhorn divisor.
        sinkhorn_iters: number of column steps, at least 1.

    Returns:
        u [T, D] in the dtype of x, post [T, X] fp32, C [T, X, X] fp32; newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or sinkhorn_iters is below 1.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "hyper_connection_pre",
        x=(x, "T X D", FLOATS),
        fn=(fn, "M XD", FLOAT32),
        base=(base, "M", FLOAT32),
        scale=(scale, "3", FLOAT32),
    )
    num_streams = dims["X"]
    _check_fn("hyper_connection_pre", dims, (2 + num_streams) * num_streams, "(2 + X) * X")
    if sinkhorn_iters < 1:
        raise ValueError(f"hyper_connection_pre: sinkhorn_iters must be at least 1; got {sinkhorn_iters}.")
    run = pick("hyper_connection_pre", x.device, reference_pre)
    return run(x, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters)  # type: ignore[no-any-return]


def hyper_connection_pre_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collapse the streams and norm the result: hyper_connection_pre, then rms_norm of its u.

    Args:
        x: [T, X, D] bf16 or fp32, the streams. T may be 0.
        fn: [(2 + X) * X, X * D] fp32, as hyper_connection_pre takes it.
        base: [(2 + X) * X] fp32.
        scale: [3] fp32, for pre, post and C.
        weight: [D] bf16 or fp32, of the norm.
        norm_eps: added to the mean of squares of the streams, and to that of u.
        hc_eps: added to pre, to C and to every Sinkhorn divisor.
        sinkhorn_iters: number of column steps, at least 1.

    Returns:
        y [T, D] in the dtype of x, post [T, X] fp32, C [T, X, X] fp32; newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or sinkhorn_iters is below 1.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "hyper_connection_pre_norm",
        x=(x, "T X D", FLOATS),
        fn=(fn, "M XD", FLOAT32),
        base=(base, "M", FLOAT32),
        scale=(scale, "3", FLOAT32),
        weight=(weight, "D", FLOATS),
    )
    num_streams = dims["X"]
    _check_fn("hyper_connection_pre_norm", dims, (2 + num_streams) * num_streams, "(2 + X) * X")
    if sinkhorn_iters < 1:
        raise ValueError(f"hyper_connection_pre_norm: sinkhorn_iters must be at least 1; got {sinkhorn_iters}.")
    run = pick("hyper_connection_pre_norm", x.device, reference_pre_norm)
    return run(x, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters)  # type: ignore[no-any-return]


def hyper_connection_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Mix a sublayer's output back into the streams.

    Args:
        y: [T, D] bf16 or fp32, what the sublayer returned.
        x: [T, X, D] bf16 or fp32, the streams before the sublayer.
        post: [T, X] fp32, of hyper_connection_pre.
        comb: [T, X, X] fp32, of hyper_connection_pre; the first X is summed.

    Returns:
        [T, X, D] in the dtype of x, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "hyper_connection_post",
        y=(y, "T D", FLOATS),
        x=(x, "T X D", FLOATS),
        post=(post, "T X", FLOAT32),
        comb=(comb, "T X X", FLOAT32),
    )
    run = pick("hyper_connection_post", x.device, reference_post)
    return run(y, x, post, comb)  # type: ignore[no-any-return]


def hyper_connection_post_pre_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iters: int = 20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix one sublayer's output back into the streams and make the next one's input of them.

    Args:
        y: [T, D] bf16 or fp32, what the sublayer returned.
        x: [T, X, D] bf16 or fp32, the streams before it. T may be 0.
        post: [T, X] fp32, made for it.
        comb: [T, X, X] fp32, made for it; the first X is summed.
        fn: [(2 + X) * X, X * D] fp32, of the next sublayer, and so is everything below.
        base: [(2 + X) * X] fp32.
        scale: [3] fp32, for pre, post and C.
        weight: [D] bf16 or fp32, of the norm.
        norm_eps: added to the mean of squares of the streams, and to that of u.
        hc_eps: added to pre, to C and to every Sinkhorn divisor.
        sinkhorn_iters: number of column steps, at least 1.

    Returns:
        The streams [T, X, D] and the next sublayer's input [T, D], both in the dtype of x, its post [T, X] fp32 and
        its C [T, X, X] fp32; newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or sinkhorn_iters is below 1.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "hyper_connection_post_pre_norm",
        y=(y, "T D", FLOATS),
        x=(x, "T X D", FLOATS),
        post=(post, "T X", FLOAT32),
        comb=(comb, "T X X", FLOAT32),
        fn=(fn, "M XD", FLOAT32),
        base=(base, "M", FLOAT32),
        scale=(scale, "3", FLOAT32),
        weight=(weight, "D", FLOATS),
    )
    num_streams = dims["X"]
    _check_fn("hyper_connection_post_pre_norm", dims, (2 + num_streams) * num_streams, "(2 + X) * X")
    if sinkhorn_iters < 1:
        raise ValueError(f"hyper_connection_post_pre_norm: sinkhorn_iters must be at least 1; got {sinkhorn_iters}.")
    run = pick("hyper_connection_post_pre_norm", x.device, reference_post_pre_norm)
    return run(y, x, post, comb, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters)  # type: ignore[no-any-return]


def hyper_connection_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> torch.Tensor:
    """Collapse the streams after the last block.

    Args:
        x: [T, X, D] bf16 or fp32, the streams. T may be 0.
        fn: [X, X * D] fp32.
        base: [X] fp32.
        scale: [1] fp32.
        norm_eps: added to the mean of squares.
        hc_eps: added to the weight of every stream.

    Returns:
        [T, D] in the dtype of x, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "hyper_connection_head",
        x=(x, "T X D", FLOATS),
        fn=(fn, "M XD", FLOAT32),
        base=(base, "M", FLOAT32),
        scale=(scale, "1", FLOAT32),
    )
    _check_fn("hyper_connection_head", dims, dims["X"], "X")
    run = pick("hyper_connection_head", x.device, reference_head)
    return run(x, fn, base, scale, norm_eps, hc_eps)  # type: ignore[no-any-return]


def hyper_connection_head_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> torch.Tensor:
    """Collapse the streams of some tokens after the last block and norm the result.

    Args:
        x: [T, X, D] bf16 or fp32, the streams. T may be 0.
        fn: [X, X * D] fp32.
        base: [X] fp32.
        scale: [1] fp32.
        weight: [D] bf16 or fp32, of the norm.
        rows: [N] int64, which tokens, 0 to T - 1; -1 for a row of zeros that is nobody's. None for all, N = T.
        norm_eps: added to the mean of squares of the streams, and to that of h.
        hc_eps: added to the weight of every stream.

    Returns:
        [N, D] in the dtype of x, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or (on the CPU) a row is not in -1 .. T - 1.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "hyper_connection_head_norm",
        x=(x, "T X D", FLOATS),
        fn=(fn, "M XD", FLOAT32),
        base=(base, "M", FLOAT32),
        scale=(scale, "1", FLOAT32),
        weight=(weight, "D", FLOATS),
        rows=(rows, "?N", INT64),
    )
    _check_fn("hyper_connection_head_norm", dims, dims["X"], "X")
    run = pick("hyper_connection_head_norm", x.device, reference_head_norm)
    return run(x, fn, base, scale, weight, rows, norm_eps, hc_eps)  # type: ignore[no-any-return]


def _check_fn(op: str, dims: dict[str, int], num_rows: int, rows: str) -> None:
    num_columns = dims["X"] * dims["D"]
    if dims["M"] != num_rows or dims["XD"] != num_columns:
        raise ValueError(
            f"{op}: fn must be [{rows}, X * D] = [{num_rows}, {num_columns}] for x [T, {dims['X']}, {dims['D']}]; got "
            f"[{dims['M']}, {dims['XD']}]. Check that fn is of the same model and not transposed."
        )


@functools.cache
def _scale_index(num_streams: int, device: torch.device) -> torch.Tensor:
    """Return which of the three scales each row of fn uses."""
    counts = (num_streams, num_streams, num_streams * num_streams)
    return torch.tensor([which for which, count in enumerate(counts) for _ in range(count)], device=device)


def _projected(values: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """Return m, the projections [T, M] of the normalized streams; values are x in fp32 [T, X, D]."""
    flat = values.reshape(values.shape[0], fn.shape[1])  # [T, X * D]
    mean_square = divide(row_sum(flat.square()), flat.shape[1])  # [T, 1]
    return row_invariant_matmul(flat, fn).mul_(mean_square.add_(norm_eps).rsqrt_())


def _weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return sum_j weights[t, j] * values[t, j] in ascending order of j: [T, X], [T, X, D] -> [T, D] fp32."""
    terms = (weights[:, :, None] * values).unbind(1)  # X times [T, D]
    return functools.reduce(torch.add, terms)


def _sinkhorn(start: torch.Tensor, hc_eps: float, sinkhorn_iters: int) -> torch.Tensor:
    """Normalize columns, then (sinkhorn_iters - 1) times rows and columns: [T, X, X] -> [T, X, X].

    The matrix lives in the corner of one with an extra row and column of hc_eps, so that a sum over the longer side is
    already the divisor: two small operations a step instead of three, of which a token needs 39 in every sublayer.
    """
    num_tokens, num_streams, _ = start.shape
    framed = start.new_full((num_tokens, num_streams + 1, num_streams + 1), hc_eps)
    rows, columns = framed[:, :num_streams, :], framed[:, :, :num_streams]
    comb = framed[:, :num_streams, :num_streams]
    row_divisor, column_divisor = rows.new_empty(num_tokens, num_streams, 1), rows.new_empty(num_tokens, 1, num_streams)
    comb.copy_(start)
    comb.div_(torch.sum(columns, 1, keepdim=True, out=column_divisor))
    for _ in range(sinkhorn_iters - 1):
        comb.div_(torch.sum(rows, 2, keepdim=True, out=row_divisor))
        comb.div_(torch.sum(columns, 1, keepdim=True, out=column_divisor))
    return comb.contiguous()


def reference_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_pre in plain torch."""
    num_tokens, num_streams, _ = x.shape
    values = x.float()
    m = _projected(values, fn, norm_eps)  # [T, (2 + X) * X]
    m.mul_(scale[_scale_index(num_streams, scale.device)]).add_(base)
    gates = sigmoid(m[:, : 2 * num_streams])
    pre = gates[:, :num_streams] + hc_eps  # [T, X]
    post = gates[:, num_streams:] * 2.0  # [T, X]
    logits = m[:, 2 * num_streams :].reshape(num_tokens, num_streams, num_streams)
    comb = _sinkhorn(logits.softmax(-1).add_(hc_eps), hc_eps, sinkhorn_iters)
    return _weighted_sum(pre, values).to(x.dtype), post, comb


def reference_pre_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_pre_norm in plain torch."""
    u, post, comb = reference_pre(x, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters)
    return norm_op.reference(u, weight, norm_eps, u.dtype), post, comb


def reference_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Compute hyper_connection_post in plain torch."""
    values = x.float()
    total = post[:, :, None] * y.float()[:, None, :]  # [T, X, D]
    for stream in range(x.shape[1]):
        total += comb[:, stream, :, None] * values[:, stream, None, :]
    return total.to(x.dtype)


def reference_head(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """Compute hyper_connection_head in plain torch."""
    values = x.float()
    pre = sigmoid(_projected(values, fn, norm_eps).mul_(scale).add_(base)).add_(hc_eps)  # [T, X]
    return _weighted_sum(pre, values).to(x.dtype)


def reference_post_pre_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_post_pre_norm in plain torch."""
    streams = reference_post(y, x, post, comb)
    return streams, *reference_pre_norm(streams, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters)


def reference_head_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor | None,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Compute hyper_connection_head_norm in plain torch."""
    if rows is not None:
        num_tokens = x.shape[0]
        bad = (rows < -1) | (rows >= num_tokens)
        if bool(bad.any()):
            raise ValueError(
                f"hyper_connection_head_norm: rows must be 0 to {num_tokens - 1}, the tokens of x, or -1 for nobody; "
                f"got {int(rows[bad][0])}. Number the tokens of this step."
            )
        x = x[rows.clamp(min=0)] if num_tokens else x.new_zeros(rows.shape[0], *x.shape[1:])
    h = reference_head(x, fn, base, scale, norm_eps, hc_eps)
    y = norm_op.reference(h, weight, norm_eps, h.dtype)
    return y if rows is None else y.masked_fill_((rows < 0)[:, None], 0.0)


def _run_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = pick("hyper_connection_pre", x.device, reference_pre)
    return run(x, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters)  # type: ignore[no-any-return]


def _fake_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, streams, width = x.shape
    u = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    return u, _empty(x, num_tokens, streams), _empty(x, num_tokens, streams, streams)


def _run_pre_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = pick("hyper_connection_pre_norm", x.device, reference_pre_norm)
    return run(x, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters)  # type: ignore[no-any-return]


def _fake_pre_norm(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake_pre(x, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters)


def _empty(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _run_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    return pick("hyper_connection_post", x.device, reference_post)(y, x, post, comb)  # type: ignore[no-any-return]


def _fake_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _run_head(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    run = pick("hyper_connection_head", x.device, reference_head)
    return run(x, fn, base, scale, norm_eps, hc_eps)  # type: ignore[no-any-return]


def _fake_head(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    return torch.empty((x.shape[0], x.shape[2]), dtype=x.dtype, device=x.device)


for _op, _schema, _run_op, _fake_op in (
    (
        "hyper_connection_pre",
        "(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, int sinkhorn_iters)"
        " -> (Tensor, Tensor, Tensor)",
        _run_pre,
        _fake_pre,
    ),
    (
        "hyper_connection_pre_norm",
        "(Tensor x, Tensor fn, Tensor base, Tensor scale, Tensor weight, float norm_eps, float hc_eps,"
        " int sinkhorn_iters) -> (Tensor, Tensor, Tensor)",
        _run_pre_norm,
        _fake_pre_norm,
    ),
    ("hyper_connection_post", "(Tensor y, Tensor x, Tensor post, Tensor comb) -> Tensor", _run_post, _fake_post),
    (
        "hyper_connection_head",
        "(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps) -> Tensor",
        _run_head,
        _fake_head,
    ),
):
    traced(_op, {_op: _schema}, {_op: _run_op}, {_op: _fake_op})
