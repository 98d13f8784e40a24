# SPDX-License-Identifier: Apache-2.0
"""How an operation is called and judged: one record, read by verify, by bench and by the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megamoe.verify.comparisons import Rule, within
from megamoe.verify.values import rows_of

Arguments = dict[str, Any]


def _rows_of_result(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    return rows_of(result, index)


def _no_bytes(arguments: Arguments) -> int:
    return 0


def _one(arguments: Arguments) -> int:
    return 1


@dataclasses.dataclass(frozen=True)
class OpInputs:
    """How to call an operation, and what its result must be.

    Attributes:
        door: the operation.
        make: (dims, number of tokens, generator) → keyword arguments on the generator's device.
        per_token: the arguments whose first dimension is the tokens; each token's result depends on its rows alone.
        tile: tokens that share a block at most; verify runs one below, at and above it.
        order_until: dims → number of tokens up to which sums have one order and beyond which they have another; None
            where the order never changes. A token's bits do not depend on its neighbours on either side of it.
        rule: how a result is compared with the reference's.
        written: the arguments that the operation changes in place. They belong to the result, behind what it returns.
        cut: (arguments, tokens) → the arguments besides per_token that are others when only these tokens are given.
        together: arguments → how many of the last tokens cannot be without each other.
        part: (result, arguments, tokens) → what of a result belongs to these tokens.
        partly: the arguments of which a call reads or writes a part, pools above all.
        partly_bytes: arguments → bytes of that part.
        timed: whether bench times this way of calling; a step padded to its bucket tells nothing about speed.
        on_kernels: whether kernels have to take it. Formats that no recipe of a GPU has (fp32 rows are those of
            `exact`) are called on references alone.
    """

    door: Callable[..., Any]
    make: Callable[[Mapping[str, int], int, torch.Generator], Arguments]
    per_token: tuple[str, ...]
    tile: int = 16
    order_until: Callable[[Mapping[str, int]], int] | None = None
    rule: Rule = within
    written: tuple[str, ...] = ()
    cut: Callable[[Arguments, torch.Tensor], Arguments] | None = None
    together: Callable[[Arguments], int] = _one
    part: Callable[[Any, Arguments, torch.Tensor], Any] = _rows_of_result
    partly: tuple[str, ...] = ()
    partly_bytes: Callable[[Arguments], int] = _no_bytes
    timed: bool = True
    on_kernels: bool = True

    def run(self, arguments: Arguments) -> Any:
        """Call the operation and return its result: what it returns, then what it has written in place."""
        returned = self.door(**arguments)
        if not self.written:
            return returned
        changed = tuple(arguments[name] for name in self.written)
        return changed if returned is None else (returned, *changed)

    def returned(self, result: Any) -> Any:
        """Return what of a result the operation has returned, and not written in place; None for nothing."""
        if not self.written:
            return result
        return result[0] if len(result) > len(self.written) else None

    def only(self, arguments: Arguments, index: torch.Tensor) -> Arguments:
        """Return the arguments of a call with some of the tokens, ascending."""
        some = {name: rows_of(value, index) if name in self.per_token else value for name, value in arguments.items()}
        return some if self.cut is None else {**some, **self.cut(arguments, index)}


def activations(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return bf16 values [*shape]: rows of different magnitude, a few outliers, hard rows first."""
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    magnitude = torch.randint(-6, 7, (*shape[:-1], 1), generator=generator, device=device).float().exp2()
    outlier = torch.rand(shape, generator=generator, device=device) > 0.999
    x = torch.where(outlier, x * 30.0, x) * magnitude
    x = x.to(torch.bfloat16)
    for index, row in enumerate(_hard_rows(shape[-1], device)):
        if shape[0] > index + 1:  # the first row stays random, so that one token is not a special case
            x[index + 1] = row.to(torch.bfloat16)
    return x


def _hard_rows(width: int, device: torch.device) -> list[torch.Tensor]:
    column = torch.arange(width, device=device)
    sign = torch.where(column % 3 == 0, -1.0, 1.0)
    quarters = sign * (column % 97) / 16.0  # with an amax of 6 every threshold of E2M1 is hit exactly
    return [
        torch.zeros(width, device=device) * sign,  # zeros of both signs
        quarters,
        quarters * 2.0**-130,  # subnormal in bf16 and fp32
        quarters.clamp(-6, 6) * 2.0**124,  # near the largest finite value
        torch.where(column == width - 1, 1.0, 2.0**-20 * sign),  # one value far above the others
        sign * 2.0 ** (column % 24 - 12).float(),
    ]


def finite_squares(x: torch.Tensor) -> torch.Tensor:
    """Return x with values whose squares overflow made smaller: no norm is defined for them."""
    return torch.where(x.abs() > 2.0**56, x * 2.0**-80, x)


def scaled(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return fp32 Gaussian values of a scale."""
    return torch.randn(shape, generator=generator, device=generator.device) * scale
