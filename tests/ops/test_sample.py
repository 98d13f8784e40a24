# SPDX-License-Identifier: Apache-2.0
"""sample: greedy ties, nucleus and top-k edges by hand, frequencies, refusals by row."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.sample import LOG2_E, masses, sample

from .invariance import assert_row_invariant

# token 2 has mass 0.5, token 0 0.3, token 1 0.2
LOGITS = torch.tensor([0.3, 0.2, 0.5]).log()


def _draw(
    logits: torch.Tensor, uniform: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[int]:
    count = len(uniform)
    ids = sample(
        logits.expand(count, -1),
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        uniform=torch.tensor(uniform),
    )
    assert ids.dtype == torch.int64 and ids.shape == (count,)
    return ids.tolist()


# --- known answers ---


def test_greedy_takes_the_lowest_index_among_the_best() -> None:
    assert _draw(torch.tensor([1.0, 3.0, 3.0, 3.0]), [0.99], temperature=0.0) == [1]
    many = torch.zeros(5000)
    many[[77, 4321]] = 1.0
    assert _draw(many, [0.5], temperature=0.0, top_k=3, top_p=0.1) == [77]


def test_the_inverse_of_the_running_mass() -> None:
    """In order of mass: token 2 up to 0.5, token 0 up to 0.8, token 1 up to 1."""
    assert _draw(LOGITS, [0.0, 0.49, 0.51, 0.79, 0.81, 0.9999]) == [2, 2, 0, 0, 1, 1]


def test_temperature_sharpens() -> None:
    """Masses 0.25, 0.09, 0.04 of 0.38 at temperature 1/2."""
    assert _draw(LOGITS, [0.64, 0.66, 0.88, 0.90], temperature=0.5) == [2, 0, 0, 1]
    assert _draw(LOGITS, [0.0, 0.5, 0.9999], temperature=1e-6) == [2, 2, 2]
    assert _draw(LOGITS, [0.3, 0.4, 0.7], temperature=1e6) == [2, 0, 1]


def test_top_k() -> None:
    """Two tokens with masses 0.5 and 0.3 of 0.8."""
    assert _draw(LOGITS, [0.62, 0.63, 0.9999], top_k=2) == [2, 0, 0]
    assert _draw(LOGITS, [0.0, 0.9999], top_k=1) == [2, 2]
    assert _draw(LOGITS, [0.9999], top_k=3) == _draw(LOGITS, [0.9999], top_k=99) == [1]


def test_top_p_keeps_a_token_while_the_mass_before_it_is_short() -> None:
    assert _draw(LOGITS, [0.9999], top_p=0.49) == [2]
    assert _draw(LOGITS, [0.62, 0.63, 0.9999], top_p=0.51) == [2, 0, 0]
    assert _draw(LOGITS, [0.9999], top_p=0.81) == [1]
    assert _draw(LOGITS, [0.9999], top_p=1e-30) == [2]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    """0.5 of 0.8 is 0.625: one token is enough for 0.6, two are needed for 0.65."""
    assert _draw(LOGITS, [0.9999], top_k=2, top_p=0.6) == [2]
    assert _draw(LOGITS, [0.9999], top_k=2, top_p=0.65) == [0]


def test_masses_by_hand() -> None:
    """At temperature log2 e an octave is a difference of 1: masses are powers of two, the last one is below 2^-40."""
    below = torch.tensor([[0.0, -1.0, -2.0, -40.0, -40.5, -41.0, -1e30, -math.inf]])
    temperature = torch.tensor([LOG2_E])
    assert masses(below, temperature).tolist() == [[2**40, 2**39, 2**38, 1, 0, 0, 0, 0]]
    quarter = int(2**40 * 0.84089642)  # 2^-0.25; the polynomial ends on a multiple of 2^-24
    assert abs(int(masses(torch.tensor([[-0.25]]), temperature)) - quarter) <= 2**17


def test_masses_at_the_ends_of_temperature() -> None:
    below = torch.tensor([[0.0, -1e-38, -1.0, -math.inf]])
    for temperature, want in ((1e-45, [2**40, 0, 0, 0]), (3e38, [2**40, 2**40, 2**40, 0])):
        got = masses(below, torch.tensor([temperature]))[0]
        assert got[[0, 2, 3]].tolist() == [want[0], want[2], want[3]]
    assert _draw(torch.tensor([1.0, 3.0, 3.0]), [0.0, 0.4, 0.6, 0.9999], temperature=1e-45) == [1, 1, 2, 2]


def test_masses_are_the_exponential() -> None:
    below = -torch.cat((torch.linspace(0, 14, 100_001), torch.rand(1000) * 1e-4))
    for temperature in (1.0, 0.37):
        want = 2.0**40 * (below.double() * (1.0 / torch.tensor(temperature).double())).exp()
        got = masses(below[None], torch.tensor([temperature]))[0].double()
        assert bool(((got - want).abs() <= 3e-7 * (1 - below.double() / temperature) * want + 1.5).all())


def test_min_p_is_relative_to_the_best() -> None:
    """Relative masses 1, 0.6 and 0.4; what is left is drawn from alone."""

    def draw(least: float, uniform: float, top_p: float = 1.0) -> int:
        one = torch.ones(1)
        ids = sample(
            LOGITS[None],
            temperature=one,
            top_k=torch.zeros(1, dtype=torch.int64),
            top_p=one * top_p,
            min_p=one * least,
            uniform=one * uniform,
        )
        return int(ids[0])

    assert draw(0.0, 0.9999) == draw(0.39, 0.9999) == 1
    assert draw(0.41, 0.9999) == draw(0.59, 0.9999) == 0
    assert draw(0.61, 0.9999) == draw(1.0, 0.9999) == 2
    assert (draw(0.41, 0.62), draw(0.41, 0.63)) == (2, 0), "0.5 of 0.8"
    assert draw(0.41, 0.9999, top_p=0.6) == 2, "top_p counts the mass that min_p left"


def test_equal_logits_are_ordered_by_index() -> None:
    assert _draw(torch.zeros(4), [0.0, 0.26, 0.51, 0.76]) == [0, 1, 2, 3]
    assert _draw(torch.zeros(4), [0.0, 0.6], top_k=2) == [0, 1]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert _draw(logits, [0.0, 0.49, 0.51, 1 - 2**-24]) == [1, 1, 3, 3]
    assert _draw(logits, [0.5], temperature=0.0) == [1]


def test_rows_of_every_kind_in_one_call() -> None:
    ids = sample(
        LOGITS.expand(4, -1),
        temperature=torch.tensor([0.0, 1.0, 1.0, 1.0]),
        top_k=torch.tensor([0, 0, 1, 0]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.5]),
        uniform=torch.tensor([0.99, 0.99, 0.99, 0.99]),
    )
    assert ids.tolist() == [2, 1, 2, 2]


def test_no_rows() -> None:
    empty = torch.zeros(0)
    assert sample(torch.zeros(0, 5), temperature=empty, top_k=empty.long(), top_p=empty, uniform=empty).shape == (0,)


def test_one_token() -> None:
    assert _draw(torch.tensor([-3.0]), [0.0, 0.7]) == [0, 0]


# --- properties ---


def _by_digits(logits, temperature, top_k, top_p, min_p, uniform, generator):
    """One row as a device may sample it: no sort, masses added in a random order, order found digit by digit."""
    logits = logits + 0.0  # -0 is 0
    bits = logits.view(torch.int32).long()
    keys = torch.where(bits < 0, -bits - 2**31, bits).neg_() + 2**31  # ascending: falling logits
    mass = masses((logits - logits.max())[None], temperature[None])[0]

    def first_beyond(weights: torch.Tensor, target: int) -> int:
        """Return the first token, by key and then index, at which the running weight exceeds target; -1 for none."""
        inside = torch.ones_like(keys, dtype=torch.bool)
        for shift in (24, 16, 8, 0):
            shuffled = inside.nonzero()[:, 0]
            shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
            digits = keys >> shift & 255
            sums = torch.zeros(256, dtype=torch.int64).index_add_(0, digits[shuffled], weights[shuffled]).tolist()
            for digit in range(256):
                if sums[digit] > target:
                    break
                target -= sums[digit]
            else:
                return -1
            inside &= digits == digit
        for token in inside.nonzero()[:, 0].tolist():
            if int(weights[token]) > target:
                return token
            target -= int(weights[token])
        raise AssertionError

    def cut(weights: torch.Tensor, target: int) -> None:
        """Drop what comes after the first token at which the running weight exceeds target."""
        last = first_beyond(weights, target)
        if last >= 0:
            after = (keys > keys[last]) | (keys == keys[last]) & (torch.arange(len(keys)) > last)
            mass.masked_fill_(after, 0)

    if top_k:
        cut(torch.ones_like(mass), int(top_k) - 1)
    mass.masked_fill_(mass < math.ceil(float(min_p) * 2.0**40), 0)
    if top_p < 1.0:
        cut(mass, math.ceil(float(top_p) * float(int(mass.sum()))) - 1)
    return first_beyond(mass, int(float(uniform) * float(int(mass.sum()))))


@pytest.mark.parametrize("num_tokens", [1, 2, 300, 5000])
def test_a_device_without_a_sort_draws_the_same_tokens(num_tokens: int, seed: int) -> None:
    """The rule of ties and sums is one that histograms and atomics can meet exactly."""
    generator = torch.Generator().manual_seed(seed)
    count = 40
    logits = (torch.randn(count, num_tokens, generator=generator) * 8).round() / 4  # many ties, zeros of both signs
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -math.inf
    logits[:, num_tokens // 2] = 0.0
    temperature = torch.rand(count, generator=generator) * 2 + 0.01
    top_k = torch.randint(0, 30, (count,), generator=generator) * (torch.arange(count) % 2)
    top_p = (torch.rand(count, generator=generator) + 0.3).clamp(max=1.0)
    min_p = torch.rand(count, generator=generator) * 0.2 * (torch.arange(count) % 3 == 0)
    uniform = torch.rand(count, generator=generator)
    rows = logits, temperature, top_k, top_p, min_p, uniform
    want = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    assert [_by_digits(*row, generator) for row in zip(*rows, strict=True)] == want.tolist()


def test_frequencies_are_the_softmax(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator) * 2
    count = 20_000
    uniform = (torch.arange(count) + 0.5) / count  # every quantile once
    ids = torch.tensor(_draw(logits, uniform.tolist(), temperature=0.7))
    frequency = torch.bincount(ids, minlength=50).double() / count
    torch.testing.assert_close(frequency, (logits.double() / 0.7).softmax(0), rtol=0.0, atol=2 / count)


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 777, generator=generator) * 3
    temperature = torch.rand(60, generator=generator).mul(2).sub(0.4).clamp(min=0.0)
    top_k = torch.randint(0, 20, (60,), generator=generator)
    top_p = torch.rand(60, generator=generator).clamp(min=0.01)
    uniform = torch.rand(60, generator=generator)
    min_p = torch.rand(60, generator=generator) * 0.3

    def run(*rows: torch.Tensor) -> torch.Tensor:
        return sample(rows[0], temperature=rows[1], top_k=rows[2], top_p=rows[3], min_p=rows[5], uniform=rows[4])

    assert_row_invariant(run, logits, temperature, top_k, top_p, uniform, min_p)


# --- refusals ---


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("temperature", -0.1, "temperature must be finite and at least 0; got -0.1"),
        ("temperature", math.nan, "temperature must be finite and at least 0; got nan"),
        ("temperature", math.inf, "temperature must be finite and at least 0; got inf"),
        ("top_k", -2, r"top_k must be at least 0 \(0 keeps all tokens\), or -1 in a row of nobody; got -2"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1; got 0"),
        ("top_p", 1.5, "top_p must be above 0 and at most 1; got 1.5"),
        ("min_p", -0.1, "min_p must be 0 to 1; got -0.1"),
        ("min_p", math.nan, "min_p must be 0 to 1; got nan"),
        ("uniform", 1.0, r"uniform must be in \[0, 1\); got 1"),
        ("uniform", math.nan, r"uniform must be in \[0, 1\); got nan"),
    ],
)
def test_parameters_out_of_range(name: str, value: float, message: str) -> None:
    parameters = {
        "temperature": torch.ones(3),
        "top_k": torch.zeros(3, dtype=torch.int64),
        "top_p": torch.ones(3),
        "min_p": torch.zeros(3),
        "uniform": torch.zeros(3),
    }
    parameters[name][1] = value
    with pytest.raises(ValueError, match=f"^sample: {message}.* in row 1"):
        sample(torch.zeros(3, 4), **parameters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_mean_nothing(value: float) -> None:
    logits = torch.zeros(3)
    logits[1] = value
    with pytest.raises(ValueError, match="sample: logits must have a finite maximum and no NaN; got .* in row 0"):
        _draw(logits, [0.5])
    with pytest.raises(ValueError, match="got -inf in row 0"):
        _draw(torch.full((3,), -math.inf), [0.5])


def test_shapes_and_dtypes() -> None:
    good = {"temperature": torch.ones(2), "top_k": torch.zeros(2, dtype=torch.int64), "top_p": torch.ones(2)}
    with pytest.raises(ValueError, match=r"sample: uniform must be \[T\]"):
        sample(torch.zeros(2, 3), **good, uniform=torch.zeros(3))
    with pytest.raises(TypeError, match="sample: logits must be float32; got bfloat16"):
        sample(torch.zeros(2, 3).bfloat16(), **good, uniform=torch.zeros(2))
    with pytest.raises(ValueError, match="logits may have at most 4194304 columns; got 4194305"):
        sample(torch.zeros(1, 1).expand(2, 2**22 + 1), **good, uniform=torch.zeros(2))
    with pytest.raises(ValueError, match="logits must have at least one column"):
        sample(torch.zeros(2, 0), **good, uniform=torch.zeros(2))
