# SPDX-License-Identifier: Apache-2.0
"""sample: draw one token id per row from logits.

Math       temperature 0: the lowest index among the largest logits.
           Otherwise sort logits from high to low, equal ones by index; keep the first top_k (0 keeps all); weigh them
           by exp((logit - max) / temperature); keep those of weight min_p and more (the best has weight 1); keep a
           token while the mass before it is below top_p of the kept mass; take the first token at which the running
           mass exceeds uniform * kept mass. A row whose top_k is -1 is nobody's: its id is -1.
Numerics   weights are integers, in units of 2^-40 of the best, so that sums are exact in any order: a device may add
           with atomics, select by digits instead of sorting, and must return the same token. A weight is made in fp32,
           every step rounded on its own (no fused multiply-add):
             t = max((logit - max) * min(log2 e / temperature, largest fp32), -64)
             k = t to the nearest integer, ties to even;  f = t - k
             weight = floor(2^(k + 40) * p(f)),  p = the Taylor polynomial of 2^f to f^7, by Horner, EXP2_SERIES
           It is within 4e-7 of the exact weight at 2^-1, 2e-6 at 2^-20; below 2^-40 it is 0. min_p * 2^40 is rounded up
           to an integer, and so is top_p * kept mass; uniform * kept mass is rounded down; these three products are
           fp64, one a row. top_p 1 keeps all. Row-invariant.
Tolerance  verify/tolerance.py, "sample": exact
Kernels    a cluster a row, histograms of masses instead of a sort; up to 131,072 columns
Source     docs/numerics.md, section "Operations"; docs/decisions/0013-integer-masses.md
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOAT32, INT64, check
from megamoe.ops.dispatch import pick

MASS_BITS = 40
MAX_VOCABULARY = 2**22
"""Masses of so many tokens add up to less than 2^63."""
LOG2_E = 1.4426950
EXP2_SERIES = (1.0, 0.69314718, 0.24022651, 0.055504109, 0.0096181291, 0.0013333558, 0.00015403530, 0.000015252734)
"""ln(2)^k / k!, each rounded to fp32 where it is used."""
LEAST_OCTAVE = -64.0
FLOAT32_MAX = torch.finfo(torch.float32).max


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor | None = None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token id per row.

    Args:
        logits: [T, V] fp32; -inf marks tokens that must not be drawn. T may be 0, V not.
        temperature: [T] fp32, at least 0; 0 takes the best token.
        top_k: [T] int64, at least 0; 0 keeps all tokens. -1 is a row of nobody, whose other values mean nothing.
        top_p: [T] fp32, above 0 and at most 1.
        min_p: [T] fp32, 0 to 1; None or 0 keeps all tokens.
        uniform: [T] fp32 in [0, 1), one random number per row.

    Returns:
        [T] int64 token ids, newly allocated; -1 in the rows of nobody.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, there are more than 2^22 columns, or (on the CPU) a parameter is out of
            range or a row of logits has a NaN, +inf, or nothing above -inf.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check(
        "sample",
        logits=(logits, "T V", FLOAT32),
        temperature=(temperature, "T", FLOAT32),
        top_k=(top_k, "T", INT64),
        top_p=(top_p, "T", FLOAT32),
        min_p=(min_p, "?T", FLOAT32),
        uniform=(uniform, "T", FLOAT32),
    )
    if dims["V"] == 0:
        raise ValueError("sample: logits must have at least one column; got [T, 0].")
    if dims["V"] > MAX_VOCABULARY:
        raise ValueError(
            f"sample: logits may have at most {MAX_VOCABULARY} columns; got {dims['V']}. Sums of more masses "
            f"would not fit 64 bits; sample from the best {MAX_VOCABULARY}."
        )
    run = pick("sample", logits.device, reference)
    return run(logits, temperature, top_k, top_p, min_p, uniform)  # type: ignore[no-any-return]


def reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Compute sample in plain torch."""
    _refuse_rows("top_k", top_k, top_k >= -1, "be at least 0 (0 keeps all tokens), or -1 in a row of nobody")
    is_row = top_k >= 0
    if not bool(is_row.all()):
        ids = torch.full_like(top_k, -1)
        least = None if min_p is None else min_p[is_row]
        ids[is_row] = reference(
            logits[is_row], temperature[is_row], top_k[is_row], top_p[is_row], least, uniform[is_row]
        )
        return ids
    best, ids = logits.max(dim=-1)  # the first of equal logits
    _refuse_rows("logits", best, best.isfinite(), "have a finite maximum and no NaN")
    _refuse_rows("temperature", temperature, (temperature >= 0.0) & temperature.isfinite(), "be finite and at least 0")
    _refuse_rows("top_p", top_p, (top_p > 0.0) & (top_p <= 1.0), "be above 0 and at most 1")
    _refuse_rows("uniform", uniform, (uniform >= 0.0) & (uniform < 1.0), "be in [0, 1)")
    if min_p is not None:
        _refuse_rows("min_p", min_p, (min_p >= 0.0) & (min_p <= 1.0), "be 0 to 1")
    rows = (temperature > 0.0).nonzero()[:, 0]
    if rows.numel():
        least = None if min_p is None else min_p[rows]
        ids[rows] = _draw(logits[rows], temperature[rows], top_k[rows], top_p[rows], least, uniform[rows])
    return ids


def _draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # [T, V]
    mass = masses(ordered - ordered[:, :1], temperature)
    rank = torch.arange(logits.shape[1], device=logits.device)
    mass.masked_fill_((rank >= top_k[:, None]) & (top_k[:, None] > 0), 0)
    if min_p is not None:
        mass.masked_fill_(mass < (min_p.double() * 2.0**MASS_BITS).ceil().long()[:, None], 0)
    running = mass.cumsum(-1)
    before, total = running - mass, running[:, -1:]
    limit = torch.where(top_p[:, None] < 1.0, (top_p.double()[:, None] * total.double()).ceil().long(), total)
    mass.masked_fill_(before >= limit, 0)
    running = mass.cumsum(-1)
    target = (uniform.double()[:, None] * running[:, -1:].double()).long()
    picked = torch.searchsorted(running, target, right=True)  # [T, 1], the first with running > target
    return order.gather(1, picked)[:, 0]


def masses(below: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return floor(2^40 * exp(below / temperature)) as the header defines it, bit for bit.

    Args:
        below: [T, V] fp32, logit - max: 0 or less.
        temperature: [T] fp32, above 0.

    Returns:
        [T, V] int64, 2^40 where `below` is 0.
    """
    factor = (torch.full_like(temperature, LOG2_E) / temperature).clamp(max=FLOAT32_MAX)
    octaves = (below * factor[:, None]).clamp_(min=LEAST_OCTAVE)
    whole = octaves.round()
    part = octaves.sub_(whole)
    value = torch.full_like(part, EXP2_SERIES[-1])
    for coefficient in reversed(EXP2_SERIES[:-1]):
        value.mul_(part).add_(coefficient)
    power = whole.add_(127.0 + MASS_BITS).to(torch.int32).bitwise_left_shift_(23).view(torch.float32)  # a power of two
    return value.mul_(power).long()


def _refuse_rows(name: str, values: torch.Tensor, good: torch.Tensor, rule: str) -> None:
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise ValueError(f"sample: {name} must {rule}; got {values[row].item()} in row {row}.")
