# SPDX-License-Identifier: Apache-2.0
"""A dispatch mode that finds, on a CPU, divisions that a CUDA device would turn into multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DIVIDES = {"div", "div_", "true_divide", "true_divide_", "floor_divide", "floor_divide_"}
MEANS = {"mean", "nanmean", "var", "std", "var_mean", "std_mean"}  # a sum times the reciprocal of a count


class RefuseReciprocals(TorchDispatchMode):
    """Fails where a floating-point result is a quotient by a number, or by a scalar that comes from the host.

    torch divides a CUDA tensor by a tensor of that device and by nothing else: a Python number, and a CPU tensor
    without dimensions, are inverted first. `number / tensor` inverts on every device, and so does a mean.

    Args:
        allow: torch operators that are not looked at.
    """

    def __init__(self, *allow: str) -> None:
        super().__init__()
        self.allow = set(allow)
        self.from_host: list[torch.Tensor] = []  # kept alive, so that none is taken for another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "lift_fresh":  # torch.tensor(number)
            self.from_host.append(result)
        if name in self.allow or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        if name in MEANS or name == "reciprocal" or name == "reciprocal_":
            raise AssertionError(f"{func}: multiplies by a reciprocal")
        if name in DIVIDES and (
            not isinstance(args[1], torch.Tensor) or any(args[1] is one for one in self.from_host if one.dim() == 0)
        ):
            raise AssertionError(
                f"{func} by {args[1]}: a CUDA device multiplies by the reciprocal; use formats.division"
            )
        return result
