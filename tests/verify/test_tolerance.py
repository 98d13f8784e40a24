# SPDX-License-Identifier: Apache-2.0
"""assert_within: passes what the bound allows, names the first wrong coordinate, never passes NaN."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.kernels import KERNELS
from megamoe.verify.tolerance import TOLERANCES, assert_within

NAN, INF = math.nan, math.inf

# --- the table ---


def test_every_bound_has_a_reason_and_every_kernel_a_bound() -> None:
    for op, tolerance in TOLERANCES.items():
        assert 0.0 <= tolerance.relative_l2 < 0.05, op
        assert len(tolerance.reason) > 20, op
    assert set(KERNELS) <= set(TOLERANCES)


# --- what passes ---


def test_small_differences_pass_and_large_ones_name_place_and_values() -> None:
    want = torch.ones(4, 100)
    got = want.clone()
    got[2] *= 1 + 1.5e-5
    assert_within("linear", got, want)
    got[2, 7] = 1.25
    got[3, 1] = 1.5
    message = r"linear: 2 of 400 elements differ, first at \[2, 7\]: got 1.25, want 1.0; relative L2 .*bound 2e-05"
    with pytest.raises(AssertionError, match=message):
        assert_within("linear", got, want)


def test_bf16_outputs_may_differ_by_their_rounding() -> None:
    want = torch.ones(2, 64).bfloat16()
    got = want.clone()
    got[0, 0] = 1 + 2**-7
    assert_within("linear", got, want)
    with pytest.raises(AssertionError):
        assert_within("linear", want + 2**-7, want)


def test_empty_and_scalar_outputs() -> None:
    assert_within("linear", torch.zeros(0, 4), torch.zeros(0, 4))
    assert_within("sample", torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert_within("linear", torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(AssertionError, match=r"first at \[\]: got 2.0, want 1.0"):
        assert_within("linear", torch.tensor(2.0), torch.tensor(1.0))


def test_equal_infinities_pass() -> None:
    want = torch.tensor([[1.0, INF, -INF]])
    assert_within("index_scores", want.clone(), want)
    for got in ([[1.0, 5.0, -INF]], [[1.0, INF, INF]], [[INF, INF, -INF]]):
        with pytest.raises(AssertionError, match="is infinite on one side"):
            assert_within("index_scores", torch.tensor(got), want)


# --- what must not pass ---


@pytest.mark.parametrize("op", ["linear", "hadamard", "read_cache", "quantize_nvfp4"])
@pytest.mark.parametrize("side", ["got", "want", "both"])
def test_nan_never_passes(op: str, side: str) -> None:
    got, want = torch.ones(2, 3), torch.ones(2, 3)
    if side in ("got", "both"):
        got[1, 2] = NAN
    if side in ("want", "both"):
        want[1, 2] = NAN
    with pytest.raises(AssertionError, match=r"first at \[1, 2\].*is NaN"):
        assert_within(op, got, want)


def test_one_wrong_row_cannot_hide_in_a_large_tensor(seed: int) -> None:
    want = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(seed))
    got = want.clone()
    got[77_777] *= 1 + 2e-3
    assert float((got - want).norm() / want.norm()) < 2e-5  # the overall distance would pass
    with pytest.raises(AssertionError, match=r"linear: .* first at \[77777, \d\]"):
        assert_within("linear", got, want)


def test_a_few_huge_rows_hide_nothing() -> None:
    want = torch.ones(9, 4)
    want[6:] = 2.0**44
    got = want.clone()
    got[2, 1] *= 1 + 1e-3
    with pytest.raises(AssertionError, match=r"compress_kv: 1 of 36 elements differ, first at \[2, 1\]"):
        assert_within("compress_kv", got, want)
    small = want.clone()
    small[0] = 2.0**-40  # a row counts as at least as long as the median one
    got = small.clone()
    got[0] *= 2
    assert_within("compress_kv", got, small)


def test_bounds_grow_with_the_terms() -> None:
    linear = TOLERANCES["linear"]
    assert linear.bound() == linear.bound(4096) == 2e-5
    assert linear.bound(21504) == pytest.approx(5.34e-5, rel=1e-3)
    assert TOLERANCES["rms_norm"].bound(21504) == 1e-5


def test_rows_of_zeros() -> None:
    want = torch.zeros(3, 4)
    assert_within("linear", want.clone(), want)
    got = want.clone()
    got[1, 1] = 1e-30
    with pytest.raises(AssertionError, match=r"first at \[1, 1\]"):
        assert_within("linear", got, want)


def test_exact_operations_compare_bits() -> None:
    with pytest.raises(AssertionError, match=r"first at \[0\]: got -0.0, want 0.0; must have equal bits"):
        assert_within("read_cache", torch.tensor([-0.0]), torch.tensor([0.0]))
    codes = torch.arange(0, 126, dtype=torch.uint8)
    assert_within("quantize_fp8_rows", codes.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn))
    with pytest.raises(AssertionError, match=r"sample: 1 of 2 elements differ, first at \[1\]: got 4, want 5"):
        assert_within("sample", torch.tensor([3, 4]), torch.tensor([3, 5]))
    with pytest.raises(AssertionError, match="must have equal bits"):  # integer outputs of any operation
        assert_within("route_experts", torch.tensor([[1, 2]]), torch.tensor([[2, 1]]))


def test_shape_and_dtype_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"got torch.float32 \[2\], want torch.float32 \[1, 2\]"):
        assert_within("linear", torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="got torch.bfloat16"):
        assert_within("linear", torch.zeros(2).bfloat16(), torch.zeros(2))


def test_an_operation_without_a_bound_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such_op"):
        assert_within("no_such_op", torch.zeros(1), torch.zeros(1))
