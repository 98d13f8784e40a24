# SPDX-License-Identifier: Apache-2.0
"""Ceilings: the least time an operation can take, from the bytes it must move and the products it must form."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megamoe.verify.values import parts


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What an operation cannot beat.

    Attributes:
        num_bytes: every input read once, every output written once.
        flops: multiplications and additions of its products, 0 where memory alone counts.
        copy_gbps: measured bandwidth of a copy, in this run.
        tflops: measured rate of a large bf16 matrix product, in this run.
    """

    num_bytes: int
    flops: int
    copy_gbps: float
    tflops: float

    @property
    def memory_us(self) -> float:
        """Time to move the bytes."""
        return self.num_bytes / self.copy_gbps / 1e3

    @property
    def compute_us(self) -> float:
        """Time to form the products."""
        return self.flops / self.tflops / 1e6

    @property
    def us(self) -> float:
        """The larger of the two."""
        return max(self.memory_us, self.compute_us)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of a tensor, a container, or a collection of them."""
    if isinstance(value, dict):
        return sum(tensor_bytes(one) for one in value.values())
    tensors = [part for part in parts(value).values() if isinstance(part, torch.Tensor)]  # numbers and names are none
    return sum(part.numel() * part.element_size() for part in tensors)
