# SPDX-License-Identifier: Apache-2.0
"""rope: rotate the last R channels, in interleaved pairs, by angles that grow with the position.

Math       pair i = channels (2i, 2i+1) of the last R; angle a = p * f_i
           even' = even * cos a - odd * sin a,  odd' = odd * cos a + even * sin a; inverse: sin a negated
Numerics   the angle is the fp32 product float(p) * f_i, then fp32 cos and sin; the rotation in fp32; one rounding to
           the dtype of x. At positions near a million the fp32 angle is off by hundredths of a radian. The model was
           trained with these angles: a more exact angle is a wrong one. Row-invariant.
Frequency  f_i = base^(-2i/R) in fp32, by the source's own expression. With YaRN, pairs that turn slowly over the
           original context are divided by `factor`, with a linear ramp between; no attention factor anywhere.
Tolerance  verify/tolerance.py, "rope"
Kernels    none yet
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code
"""

from __future__ import annotations

import dataclasses
import math

import torch

from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.yarn_scaling import YarnScaling

__all__ = ["RopeTable", "YarnScaling", "reference", "rope", "rope_table"]


@dataclasses.dataclass(frozen=True, eq=False)
class RopeTable:
    """The frequencies of one kind of layer.

    Attributes:
        inv_freq: fp32 [R/2], radians per position of each pair.
    """

    inv_freq: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse anything but a vector of fp32."""
        check("RopeTable", inv_freq=(self.inv_freq, "P", FLOAT32))

    @property
    def rope_dim(self) -> int:
        """R, the number of channels that rotate."""
        return 2 * self.inv_freq.shape[0]


def rope_table(
    rope_dim: int, base: float, yarn: YarnScaling | None = None, device: torch.device | str = "cpu"
) -> RopeTable:
    """Make the frequencies of one kind of layer.

    They are computed on the CPU and copied, so that every device uses the same bits.

    Args:
        rope_dim: R, even and positive.
        base: 10000 for plain layers, 160000 for compressed ones.
        yarn: the stretch, or None.
        device: where the table is put.

    Raises:
        ValueError: rope_dim is not an even positive number.
    """
    if rope_dim < 2 or rope_dim % 2:
        raise ValueError(f"rope_table: rope_dim must be even and positive; got {rope_dim}. Channels rotate in pairs.")
    inv_freq = 1.0 / (base ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))  # [R/2]
    if yarn is not None:
        low = max(math.floor(_pair_of_turns(yarn.beta_fast, rope_dim, base, yarn.original_max_pos)), 0)
        high = min(math.ceil(_pair_of_turns(yarn.beta_slow, rope_dim, base, yarn.original_max_pos)), rope_dim - 1)
        width = high - low if high != low else 0.001  # the source's guard against an empty ramp
        ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
        keep = 1.0 - ramp
        inv_freq = inv_freq / yarn.factor * (1.0 - keep) + inv_freq * keep
    return RopeTable(inv_freq.to(device))


def _pair_of_turns(num_turns: float, rope_dim: int, base: float, max_pos: int) -> float:
    """Return the (fractional) pair index that makes num_turns full turns over max_pos positions."""
    return rope_dim * math.log(max_pos / (num_turns * 2.0 * math.pi)) / (2.0 * math.log(base))


def rope(x: torch.Tensor, pos: torch.Tensor, table: RopeTable, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the last R channels of x by the position of each token.

    Args:
        x: [T, ..., C] bf16 or fp32; T may be 0.
        pos: [T] int64, absolute positions. A row of nobody, at -1, is rotated by the formula like any other: its values
            stay finite, and no one reads them.
        table: frequencies; R must not exceed C.
        inverse: rotate backwards.

    Returns:
        [T, ..., C] in the dtype of x, newly allocated; channels before the last R are copied.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: x has fewer than two dimensions or fewer than R channels, or pos does not have T values.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("rope", x=(x, "... C", FLOATS), pos=(pos, "T", INT64), table=(table.inv_freq, "P"))
    if x.dim() < 2 or x.shape[0] != pos.shape[0] or x.shape[-1] < table.rope_dim:
        raise ValueError(
            f"rope: x must be [T, ..., C] with T = {pos.shape[0]} (the length of pos) and C >= {table.rope_dim} (the "
            f"table's channels); got {list(x.shape)}. Put tokens first and channels last."
        )
    run = pick("rope", x.device, reference)
    return run(x, pos, table, inverse)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, pos: torch.Tensor, table: RopeTable, inverse: bool) -> torch.Tensor:
    """Compute rope in plain torch."""
    angles = pos.float()[:, None] * table.inv_freq  # [T, R/2] fp32
    shape = (x.shape[0], *(1,) * (x.dim() - 2), angles.shape[1])
    cos, sin = angles.cos().view(shape), angles.sin().view(shape)
    sin = torch.stack((sin, -sin) if inverse else (-sin, sin), -1)  # [T, .., R/2, 2]: what the partner is multiplied by
    y = x.clone(memory_format=torch.contiguous_format)
    pairs = y[..., -table.rope_dim :].view(*x.shape[:-1], table.rope_dim // 2, 2)  # [T, ..., R/2, 2], shares y
    values = pairs.float()
    pairs.copy_(values * cos[..., None] + values.flip(-1) * sin)
    return y
