# SPDX-License-Identifier: Apache-2.0
"""penalize: lower (or raise) the logits of tokens that occurred before.

Math       for each pair (row r, token v), all different; a pair with a -1 is nobody's and changes nothing:
           z = logits[r, v];  z = z / repetition[r] if z > 0, else z * repetition[r]
           where counts > 0:  z = z - frequency[r] * count - presence[r]
Numerics   fp32, in this order. Row-invariant.
Tolerance  verify/tolerance.py, "penalize": exact
Kernels    a thread a pair; a pair outside the logits changes nothing there
Source     docs/engine.md, section "Sampling"; Keskar et al., 2019 (CTRL) for the repetition penalty
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOAT32, INT64, check
from megamoe.ops.dispatch import pick


def penalize(
    logits: torch.Tensor,
    row_idx: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    *,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Change the logits of the named tokens in place.

    Args:
        logits: [T, V] fp32.
        row_idx: [N] int64, rows of logits; -1 for a pair of nobody.
        token_ids: [N] int64, columns of logits; no pair (row, column) may occur twice. -1 for a pair of nobody.
        counts: [N] fp32, how often the token occurs in the output; 0 where it occurs in the prompt only.
        repetition: [T] fp32, above 0; 1 changes nothing.
        presence: [T] fp32; 0 changes nothing.
        frequency: [T] fp32; 0 changes nothing.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or (on the CPU) an index is outside logits.
    """
    dims = check(
        "penalize",
        logits=(logits, "T V", FLOAT32),
        row_idx=(row_idx, "N", INT64),
        token_ids=(token_ids, "N", INT64),
        counts=(counts, "N", FLOAT32),
        repetition=(repetition, "T", FLOAT32),
        presence=(presence, "T", FLOAT32),
        frequency=(frequency, "T", FLOAT32),
    )
    if dims["N"]:
        pick("penalize", logits.device, reference)(logits, row_idx, token_ids, counts, repetition, presence, frequency)


def reference(
    logits: torch.Tensor,
    row_idx: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Compute penalize in plain torch."""
    for name, idx, size in (("row_idx", row_idx, logits.shape[0]), ("token_ids", token_ids, logits.shape[1])):
        low, high = (int(bound) for bound in idx.aminmax())
        if low < -1 or high >= size:
            got = low if low < -1 else high
            raise ValueError(f"penalize: {name} must be 0 to {size - 1}, or -1 for nobody; got {got}.")
    is_pair = (row_idx >= 0) & (token_ids >= 0)
    row_idx, token_ids, counts = row_idx[is_pair], token_ids[is_pair], counts[is_pair]
    values = logits[row_idx, token_ids]
    factor = repetition[row_idx]
    values = torch.where(values > 0.0, values / factor, values * factor)
    lowered = values - frequency[row_idx] * counts - presence[row_idx]
    logits[row_idx, token_ids] = torch.where(counts > 0.0, lowered, values)
