# SPDX-License-Identifier: Apache-2.0
"""How far an implementation of an operation may be from its reference, and why.

A bound is a relative L2 distance. It holds for the whole output and for every row (last dimension) on its own, where a
row counts as at least as long as the median of the rows that are not zero: a wrong row, or a wrong element of a short
row, cannot hide in a large tensor, nor beside a few rows of huge numbers. A bf16 output may differ by its rounding on
top. A bound of 0 means equal bits.

Where the terms of a sum are known, a row is measured by them instead. A sum of K terms t of either sign is as large as
the root of the sum of t^2, and so are the partial sums on the way to it, whatever is left of them in the end. What a
rounding step loses is a share of a partial sum. So a row counts as at least as long as the roots of its sums of t^2: a
result that cancels is allowed the error of the terms it is made of, and a row of zeros none.

The bounds are for two implementations over the SAME inputs, quantized inputs included: they leave room for another
order of fp32 additions and for another exp, and for nothing else. None is a statement about quantization error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from megamoe.formats.cache_rows import RowFormat


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """A bound and where it comes from.

    Attributes:
        relative_l2: largest allowed |got - want| / |want| before output rounding; 0 asks for equal bits.
        reason: why this number.
        per_term: the same for every term of a sum; the larger of the two counts.
    """

    relative_l2: float
    reason: str
    per_term: float = 0.0

    def bound(self, num_terms: int = 0) -> float:
        """Return the bound of sums of so many terms."""
        return max(self.relative_l2, self.per_term * num_terms)


_EXACT = "a copy, a cast or a selection: every bit is defined"
_PRODUCT = "fp32 sums of K <= 32768 terms in any order: sqrt(K) * 2^-24 is 1.1e-5; a factor of 2 is left"
_CHAIN = 2.0**-24 / 24
_CHAINED = _PRODUCT + (
    ". Matrix units cut off where they add: each of the K / 16 steps of a chain loses about 2^-24 of the partial sum, "
    "always towards zero, and partial sums of random terms are two thirds of the last one on average: K / 24 * 2^-24, "
    "which is above 2e-5 from K = 8053"
)
_REQUANTIZED = (
    "fp32 sums in another order can move h across a rounding step before w2: by 2^-8 of an element in bf16, 2^-4 in "
    "FP8, up to a half in NVFP4, but only the few elements that lie within 1e-5 of a step"
)

TOLERANCES: dict[str, Tolerance] = {
    "rms_norm": Tolerance(1e-5, "one fp32 sum of K squares in any order, and an approximate rsqrt"),
    "rms_norm_quantize_nvfp4": Tolerance(
        1e-5, "y as rms_norm; the codes must be quantize_nvfp4 of that very y, every bit"
    ),
    "rope": Tolerance(1e-6, "fp32 cos and sin of the same fp32 angle, four products; a different angle is a fault"),
    "hyper_connection_pre": Tolerance(3e-5, "an fp32 product over X * D, then 39 normalizations that do not amplify"),
    "hyper_connection_pre_norm": Tolerance(
        1e-4, "as hyper_connection_pre; u may round otherwise in the few elements that lie within 1e-5 of a step"
    ),
    "hyper_connection_post": Tolerance(1e-6, "X + 1 fp32 products a channel"),
    "hyper_connection_post_pre_norm": Tolerance(
        1e-4, "as hyper_connection_pre_norm, over streams that may round otherwise where they lie within 1e-6 of a step"
    ),
    "hyper_connection_head_norm": Tolerance(
        1e-4, "as hyper_connection_head; h may round otherwise in the few elements that lie within 1e-5 of a step"
    ),
    "hyper_connection_head": Tolerance(3e-5, "an fp32 product over X * D, then X products a channel"),
    "embed_streams": Tolerance(0.0, _EXACT),
    "mean_of_streams": Tolerance(0.0, "X - 1 fp32 additions in a stated order and one division, each rounded"),
    "add_to_streams": Tolerance(0.0, "one fp32 addition, then one rounding"),
    "rotate_queries": Tolerance(
        1e-5, "as rms_norm, then rope: a normed element may round otherwise within 1e-5 of a step of bf16"
    ),
    "write_latent": Tolerance(
        1e-5,
        "as rms_norm; the stored rows are those of rotate_queries with a weight, rounded to the format of the pool",
    ),
    "round_index_query": Tolerance(
        1e-6, "as rope and hadamard before the rounding to the key format; the head weights are one product, exact"
    ),
    "quantize_nvfp4": Tolerance(0.0, _EXACT),
    "quantize_fp8_rows": Tolerance(0.0, _EXACT),
    "quantize_mxfp4": Tolerance(0.0, _EXACT),
    "linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "fp8_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "nvfp4_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "nvfp4_weight_only_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "grouped_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "fp8_grouped_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "nvfp4_grouped_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "nvfp4_weight_only_grouped_linear": Tolerance(2e-5, _CHAINED, _CHAIN),
    "clamped_swiglu": Tolerance(2e-6, "one fp32 exp of about 2 units in the last place and three products"),
    "route_experts": Tolerance(3e-5, _PRODUCT + ", then softplus, square root and a division; the ids must be equal"),
    "experts": Tolerance(4e-3, _REQUANTIZED),
    "fp8_experts": Tolerance(1e-2, _REQUANTIZED),
    "nvfp4_experts": Tolerance(2e-2, _REQUANTIZED),
    "nvfp4_weight_only_experts": Tolerance(4e-3, _REQUANTIZED),
    "sample": Tolerance(0.0, _EXACT),
    "penalize": Tolerance(0.0, "one or two rounded operations per token, each defined"),
    "token_logprobs": Tolerance(1e-6, "an fp32 sum of V exponentials in any order, one log; the ids must be equal"),
    "copy_cache": Tolerance(0.0, _EXACT),
    "hadamard": Tolerance(1e-6, "log2(n) fp32 additions an element"),
    "write_cache": Tolerance(0.0, _EXACT),
    "read_cache": Tolerance(0.0, _EXACT),
    "plan_slots": Tolerance(0.0, "integers: every one is defined"),
    "write_block_tables": Tolerance(0.0, "integers are copied: every one is defined"),
    "save_rows": Tolerance(0.0, _EXACT),
    "compress_kv": Tolerance(1e-5, "an fp32 softmax over at most 256 rows, an fp32 norm, one rotation"),
    "write_index_keys": Tolerance(1e-5, "as compress_kv, then log2(n) fp32 additions an element"),
    "index_scores": Tolerance(
        2e-5,
        "exact products; fp32 sums of K and of H terms in any order, truncating ones included; one FP8 accumulator "
        "over K = 128 is off by 1.3e-4 and does not pass",
    ),
    "index_topk": Tolerance(0.0, _EXACT),
    "sparse_attention": Tolerance(
        1e-3,
        "fp16 weights: where another exp or sum leaves one beside a rounding step, it moves by 2^-10 of itself. Of a "
        "row in which it stands alone that is 1e-3; over many rows 1e-4 at most, as few weights lie so near a step",
    ),
    "sparse_attention, fp32 operands": Tolerance(2e-5, "fp32 sums of at most 8320 terms in any order, and a 2 ulp exp"),
}
"""Operation → bound."""

OUTPUT_ROUNDING: dict[torch.dtype, float] = {
    torch.float32: 0.0,
    torch.bfloat16: 2.0**-8,  # both sides round by up to 2^-9 of an element
}
"""Added to a bound by the dtype of the output."""


ROW_ROUNDING: dict[RowFormat, float] = {
    RowFormat.FP32: 0.0,
    RowFormat.BF16: 2.0**-8,
    RowFormat.FP8_ROPE_BF16: 2e-2,  # a code beside a step moves by 2^-3 of itself: of 64 values alike 1.6e-2
    RowFormat.INDEX_FP8: 2e-2,
    RowFormat.INDEX_FP4: 2e-1,  # a code beside a step moves by up to half of itself; 128 values, a few of them
}
"""Added to the bound of an operation whose result is rounded to a row format, where a value may lie beside a step."""

SMALLEST = torch.finfo(torch.float32).tiny
"""What lies below may be flushed to zero."""


class Mismatch(AssertionError):
    """A result that is not within its bound, with the place of the first wrong value.

    Attributes:
        coordinate: in the tensor that was compared.
        got, want: the values there.
        is_slot: the first coordinate is the slot of a pool, and no token.
    """

    def __init__(
        self, message: str, coordinate: tuple[int, ...], got: float, want: float, *, is_slot: bool = False
    ) -> None:
        """Say what is wrong and where."""
        super().__init__(message)
        self.coordinate, self.got, self.want, self.is_slot = coordinate, got, want, is_slot


def assert_within(
    op: str,
    got: torch.Tensor,
    want: torch.Tensor,
    *,
    num_terms: int = 0,
    term_sizes: Callable[[], torch.Tensor] | None = None,
    rounding: float | None = None,
) -> None:
    """Compare an output with the reference's and fail with the first wrong coordinate.

    NaN fails on either side. Infinities must be equal and stand at the same places.

    Args:
        op: key of TOLERANCES.
        got: what the implementation returned.
        want: what the reference returned, same shape and dtype.
        num_terms: K, where every element is a sum of K terms.
        term_sizes: gives the root of the sum of squares of every element's terms, in the shape of want. It is asked
            only where a row is not within the bound of its own length. None where the terms are not known.
        rounding: what rounding adds to the bound; None: what the dtype of the output does.

    Raises:
        KeyError: the operation has no bound.
        AssertionError: shape or dtype is another.
        Mismatch: got is not within the bound of want.
    """
    tolerance = TOLERANCES[op]
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{op}: got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}")
    got, want = got.detach().cpu(), want.detach().cpu()
    if tolerance.relative_l2 == 0.0 or not want.is_floating_point():
        _assert_equal_bits(op, got, want)
        return
    if want.numel() == 0:
        return
    relative, rounding = tolerance.bound(num_terms), OUTPUT_ROUNDING[want.dtype] if rounding is None else rounding
    bound = relative + rounding
    got_values, want_values = got.double(), want.double()
    _fail_at(op, got_values.isnan() | want_values.isnan(), got, want, "is NaN")
    infinite = got_values.isinf() | want_values.isinf()
    _fail_at(op, infinite & (got_values != want_values), got, want, "is infinite on one side")
    # Errors are measured row by row; a scalar output is one row.
    error = (got_values - want_values).masked_fill(infinite, 0.0)
    size = want_values.masked_fill(infinite, 0.0)
    if want.dim() == 0:
        error, size = error[None], size[None]
    row_error, row_size = error.norm(dim=-1), size.norm(dim=-1)
    overall = float(error.norm()) / max(float(size.norm()), torch.finfo(torch.float64).tiny)
    if term_sizes is None:
        row_limit = bound * row_size.clamp(min=_typical(row_size))
        is_within = overall <= bound
    else:
        row_limit, is_within = bound * row_size, True
        if bool((row_error > row_limit).any()):
            of_terms = term_sizes().double().cpu().masked_fill(infinite, 0.0).norm(dim=-1)
            flushed = SMALLEST * math.sqrt(want.shape[-1]) * (of_terms > 0.0)
            row_limit = relative * row_size.maximum(of_terms) + rounding * row_size + flushed
    if bool((row_error <= row_limit).all()) and is_within:
        return
    # A row beyond its limit has an element beyond its share of the limit; so has the whole tensor.
    share = row_limit[..., None] / math.sqrt(error.shape[-1])
    worst = float((row_error / row_limit.clamp(min=torch.finfo(torch.float64).tiny)).max()) * bound
    why = f"relative L2 {overall:.3g}, worst row {worst:.3g}, bound {bound:.3g} ({tolerance.reason})"
    raise _mismatch(op, (error.abs() > share).reshape(want.shape), got, want, why)


def _typical(row_size: torch.Tensor) -> float:
    """Return the median of the rows that are not zero, the upper one of two."""
    sizes = row_size[row_size > 0.0].sort().values
    return float(sizes[len(sizes) // 2]) if len(sizes) else 0.0


def _assert_equal_bits(op: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if got.is_floating_point():
        nan = got.float().isnan() | want.float().isnan()
        _fail_at(op, nan, got, want, "is NaN")
    got, want = (one.clone(memory_format=torch.contiguous_format) for one in (got, want))  # expanded ones, too
    as_bytes_got = got.reshape(-1).view(torch.uint8).view(got.numel(), got.element_size())
    as_bytes_want = want.reshape(-1).view(torch.uint8).view(want.numel(), want.element_size())
    _fail_at(op, (as_bytes_got != as_bytes_want).any(-1).view(want.shape), got, want, "must have equal bits")


def _fail_at(op: str, wrong: torch.Tensor, got: torch.Tensor, want: torch.Tensor, why: str) -> None:
    if bool(wrong.any()):
        raise _mismatch(op, wrong, got, want, why)


def _mismatch(op: str, wrong: torch.Tensor, got: torch.Tensor, want: torch.Tensor, why: str) -> Mismatch:
    places = wrong.nonzero()
    first = tuple(places[0].tolist())
    got_value, want_value = got[first].item(), want[first].item()
    message = (
        f"{op}: {len(places)} of {want.numel()} elements differ, first at {list(first)}: "
        f"got {got_value!r}, want {want_value!r}; {why}"
    )
    return Mismatch(message, first, got_value, want_value)
