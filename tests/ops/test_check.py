# SPDX-License-Identifier: Apache-2.0
"""check: named dimensions, dtypes, containers, devices, and the wording of refusals."""

from __future__ import annotations

import re

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.ops.check import FLOAT32, FLOATS, OUT_DTYPES, check

# --- known answers ---


def test_returns_the_bound_sizes() -> None:
    x, w = torch.zeros(3, 4), torch.zeros(5, 4)
    assert check("op", x=(x, "T K"), w=(w, "N K")) == {"T": 3, "K": 4, "N": 5}


def test_leading_dimensions_numbers_and_none() -> None:
    x = torch.zeros(2, 3, 4, 16)
    assert check("op", x=(x, "... K 16"), y=(None, "?K")) == {"K": 4}
    assert check("op", x=(torch.zeros(16), "... K")) == {"K": 16}
    assert check("op", scalar=(torch.zeros(()), "")) == {}


def test_a_container_is_checked_by_its_logical_shape() -> None:
    w = nvfp4.quantize(torch.ones(8, 32))
    assert check("op", w=(w, "N K", (nvfp4.NvFp4Tensor,))) == {"N": 8, "K": 32}
    assert check("op", w=(w.tiled(), "N K")) == {"N": 8, "K": 32}


def test_sizes_of_zero_bind_like_any_other() -> None:
    assert check("op", x=(torch.zeros(0, 4), "T K"), y=(torch.zeros(0), "T"))["T"] == 0
    with pytest.raises(ValueError, match=r"y must be \[T\] with T = 0"):
        check("op", x=(torch.zeros(0, 4), "T K"), y=(torch.zeros(1), "T"))


def test_a_parameter_is_a_tensor() -> None:
    check("op", w=(torch.nn.Parameter(torch.zeros(2)), "N", FLOATS))


# --- refusals ---


def test_a_wrong_size_names_what_is_known_and_what_was_passed() -> None:
    x, w = torch.zeros(7, 1000), torch.zeros(5, 999, dtype=torch.bfloat16)
    message = (
        r"^linear: w must be \[N, K\] with T = 7, K = 1000, N = 5; got bfloat16 \[5, 999\]\. .*x is float32 \[7, 1000\]"
    )
    with pytest.raises(ValueError, match=message):
        check("linear", x=(x, "T K"), w=(w, "N K"))


@pytest.mark.parametrize("shape", [(4,), (1, 3, 4)], ids=str)
def test_a_wrong_number_of_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got float32 {list(shape)}")):
        check("op", x=(torch.zeros(shape), "T K"))


def test_too_few_dimensions_before_free_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., T, K\]"):
        check("op", x=(torch.zeros(4), "... T K"))


def test_a_wrong_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be \[3\]; got float32 \[4\]"):
        check("op", scale=(torch.zeros(4), "3"))


def test_a_wrong_dtype_or_class_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"op: x must be bfloat16 or float32; got float64 \[2\]"):
        check("op", x=(torch.zeros(2, dtype=torch.float64), "N", FLOATS))
    w = fp8.quantize_blocks(torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"op: w must be NvFp4Tensor; got Fp8BlockTensor \[4, 4\]"):
        check("op", w=(w, "N K", (nvfp4.NvFp4Tensor,)))
    with pytest.raises(TypeError, match=r"op: w must be NvFp4Tensor; got float32"):
        check("op", w=(torch.ones(4, 4), "N K", (nvfp4.NvFp4Tensor,)))
    with pytest.raises(TypeError, match=r"op: x must be bfloat16 or float32; got NvFp4Tensor"):
        check("op", x=(nvfp4.quantize(torch.ones(4, 16)), "N K", FLOATS))


@pytest.mark.parametrize("value", [None, 3.0, [1.0]], ids=str)
def test_something_that_is_no_tensor_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="op: x must be a tensor or a quantized container; got"):
        check("op", x=(value, "N"))


def test_a_plain_value_that_is_not_allowed_is_refused() -> None:
    check("op", out_dtype=(None, OUT_DTYPES))
    with pytest.raises(ValueError, match=r"op: out_dtype must be None or bfloat16 or float32; got float16"):
        check("op", out_dtype=(torch.float16, OUT_DTYPES))


def test_two_devices_are_refused() -> None:
    elsewhere = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="must be on one device; y is on meta and others on cpu"):
        check("op", x=(torch.zeros(2), "N", FLOAT32), y=(elsewhere, "N", FLOAT32))
