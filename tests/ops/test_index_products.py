# SPDX-License-Identifier: Apache-2.0
"""Products of FP4 keys through FP8 instructions: one MXFP4 group a product of K = 32 is exact, K = 128 is not.

Every E2M1 value is an E4M3 value. Hopper's FP8 instructions align the products of a step to the largest of them and
keep some 14 bits below its leading one (what the model here needs to lose what was measured over K = 128); 13 are
assumed. The tests marked for a GPU ask the chip.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe.verify.selection import score_bounds

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
E2M1 = torch.cat((E2M1, -E2M1))
GROUP = 32
FRACTION_BITS = 13  # below the leading bit


def kept(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (x / unit).trunc() * unit


def one_step(x: torch.Tensor, y: torch.Tensor, total: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """total + x . y over the last dimension as an instruction adds it: align, truncate, add, truncate."""
    terms = torch.cat((x * y, total[..., None]), -1)
    lead = torch.frexp(terms.abs().amax(-1)).exponent - 1.0
    unit = torch.exp2(lead - fraction_bits)
    result = kept(terms, unit[..., None]).sum(-1)
    lead = torch.frexp(result.abs()).exponent - 1.0
    return kept(result, torch.exp2(lead - fraction_bits))


def in_steps(x: torch.Tensor, y: torch.Tensor, fraction_bits: int = FRACTION_BITS) -> torch.Tensor:
    """The product over K with one accumulator, 32 of K a step."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float64)
    for start in range(0, x.shape[-1], GROUP):
        total = one_step(x[..., start : start + GROUP], y[..., start : start + GROUP], total, fraction_bits)
    return total


def worst_cases(size: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest products beside every other one at every place, all signs; then random codes. [N, size] each."""
    pairs = torch.tensor(list(itertools.product(E2M1.tolist(), repeat=2)), dtype=torch.float64)  # [256, 2]
    x = torch.full((len(pairs), size, size), 6.0, dtype=torch.float64)
    y = x.clone()
    places = torch.arange(size)
    x[:, places, places], y[:, places, places] = pairs[:, :1], pairs[:, 1:]
    x, y = x.view(-1, size), y.view(-1, size)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (2, 20_000, size), generator=generator)
    return torch.cat((x, -x, E2M1[codes[0]])), torch.cat((y, y, E2M1[codes[1]]))


def test_every_e2m1_value_is_an_e4m3_value() -> None:
    assert torch.equal(E2M1.to(torch.float8_e4m3fn).double(), E2M1)


def test_a_group_needs_thirteen_bits() -> None:
    """Products are quarters, at most 36; 32 of them make at most 4608 quarters, which 13 bits hold."""
    products = E2M1[:, None] * E2M1
    assert bool(((products * 4) % 1 == 0).all()) and float(products.max()) == 36.0
    assert 2**12 < GROUP * 36 * 4 <= 2**13


@pytest.mark.parametrize("fraction_bits", [12, 13, 14, 22])
def test_a_product_of_one_group_is_exact(fraction_bits: int) -> None:
    x, y = worst_cases()
    zero = torch.zeros(len(x), dtype=torch.float64)
    assert torch.equal(one_step(x, y, zero, fraction_bits), (x * y).sum(-1))


def test_a_product_of_two_groups_with_one_scale_is_exact() -> None:
    """At most 9216 quarters: 14 bits. Four groups, 18432 quarters, are not."""
    for groups, is_exact in ((2, True), (4, False)):
        x, y = worst_cases(groups * GROUP)
        assert torch.equal(in_steps(x, y), (x * y).sum(-1)) == is_exact


def test_fewer_bits_would_not_do() -> None:
    x, y = worst_cases()
    zero = torch.zeros(len(x), dtype=torch.float64)
    assert not torch.equal(one_step(x, y, zero, 11), (x * y).sum(-1))


def test_the_model_loses_what_was_measured_over_128(seed: int) -> None:
    """Random E4M3 codes over K = 128 were off by 1.3e-4 on a Hopper chip (docs/experiments.md)."""
    codes = torch.randint(0, 256, (2, 2000, 128), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    x, y = codes.view(torch.float8_e4m3fn).double()
    want = (x * y).sum(-1)
    error = float((in_steps(x, y, 14) - want).norm() / want.norm())
    assert 1.1e-4 < error < 1.5e-4
    assert float((in_steps(x, y, 13) - want).norm() / want.norm()) > 2e-4


def test_scores_from_one_accumulator_over_128_leave_the_bound(seed: int) -> None:
    """FP8 keys and queries in one accumulator are off by more than the bound of a selection."""
    generator = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(1, 64, 128, generator=generator) * 40, torch.randn(200, 128, generator=generator) * 40
    q, keys = (value.to(torch.float8_e4m3fn).double() for value in (q, keys))
    head_weights = torch.randn(1, 64, generator=generator).double()
    found = score_bounds(q, head_weights, keys)
    x, y = q[0][:, None].expand(-1, 200, -1), keys.expand(64, -1, -1)
    scores = (head_weights[0, :, None] * in_steps(x, y).clamp(min=0.0)).sum(0)
    assert float(((scores - found.scores[0]).abs() / found.bounds[0]).max()) > 2.0


def on_device(x: torch.Tensor, y: torch.Tensor, fast: bool) -> torch.Tensor:
    """x @ y.T through FP8 instructions with scales of 1, fp32 out: [M, N] of [M, K] and [N, K]."""
    one = torch.ones((), device="cuda")
    a, b = (value.to("cuda", torch.float8_e4m3fn) for value in (x, y))
    product = torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)
    return product.double().cpu()


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("fast", [True, False], ids=["fast accumulation", "promoted"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_chip_multiplies_one_and_two_groups_exactly(size: int, fast: bool) -> None:
    """Two groups of one scale make at most 9216 quarters: 14 bits, just what is kept."""
    x, y = worst_cases(size)
    x, y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))], y
    for start in range(0, len(x) - 1024, len(x) // 8):
        rows, columns = x[start : start + 1024], y[start : start + 1024]
        assert torch.equal(on_device(rows, columns, fast), rows @ columns.T)
    corner = torch.full((32, size), 6.0, dtype=torch.float64)
    corner[:16, -1] = 0.5  # sums of 36s beside a quarter, a half or three quarters
    corner[16:, 0] = -1.5
    other = corner.flip(0)
    assert torch.equal(on_device(corner, other, fast), corner @ other.T)


@pytest.mark.gpu
@pytest.mark.sm90
def test_the_chip_loses_bits_over_128_of_fp8() -> None:
    """What makes the exact products above worth a test: random FP8 codes in one accumulator are not exact."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 256, 128, generator=generator).to(torch.float8_e4m3fn).double()
    want = x @ y.T
    error = float((on_device(x, y, True) - want).norm() / want.norm())
    assert 2e-5 < error < 1e-3
