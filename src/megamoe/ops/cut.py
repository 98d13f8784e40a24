# SPDX-License-Identifier: Apache-2.0
"""Operations cut over ranks: which share of a weight a rank has, and what its results add up to.

Math       outputs cut (a rank has some rows of w [N, K]):   y = concatenation of every rank's op(x, w_r)
           inputs cut (a rank has some columns):             y = round(sum over r = 0, 1, .. of op(x_r, w_r) in fp32)
           experts cut along F:                              the same sum, of experts(x, w1_r, w3_r, w2_r)
           experts dealt out whole:                          the same sum; a rank leaves out slots of other ranks
Numerics   The result of a cut operation is defined by the operation itself on every rank's share, returned in fp32.
           Results are added in fp32 in ascending rank order and rounded once.
           Weights are never quantized again: a share keeps the codes, block scales and tensor scale that the whole
           matrix has. Boundaries lie on blocks: 16 along K and F for NVFP4, 128 both ways for FP8.
           An activation that an operation rounds is rounded with the scales of THE RANK'S PART: a dynamic NVFP4 tensor
           scale is the part's amax / 2688 (so a rank needs no word from the others), FP8 groups of 128 are the same
           groups, a checkpoint's input_scale is the same number. So FP8, W4A16 and static W4A4 differ from the uncut
           operation by fp32 sums alone; W4A4 with dynamic scales rounds otherwise, no worse on the whole.
           Experts round each slot's output to the dtype of x, as the operation says, before the sum of slots.
Source     docs/numerics.md, section "Tensor parallelism"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor

Weight = torch.Tensor | NvFp4Tensor | Fp8BlockTensor


def cut_outputs(w: Weight, num_ranks: int) -> list[Weight]:
    """Return every rank's rows of a weight.

    Args:
        w: [..., N, K] in row-major order.
        num_ranks: how many equal shares of N.

    Returns:
        num_ranks weights [..., N / num_ranks, K] that share memory with w.

    Raises:
        ValueError: N is not a multiple of num_ranks (FP8: of 128 * num_ranks), or the weight is not row-major.
    """
    return [_share(w, -2, rank, num_ranks) for rank in range(num_ranks)]


def cut_inputs(w: Weight, num_ranks: int) -> list[Weight]:
    """Return every rank's columns of a weight.

    Args:
        w: [..., N, K] in row-major order.
        num_ranks: how many equal shares of K.

    Returns:
        num_ranks weights [..., N, K / num_ranks] that share memory with w.

    Raises:
        ValueError: K is not a multiple of num_ranks (NVFP4: of 16 * num_ranks, FP8: of 128 * num_ranks), or the weight
            is not row-major.
    """
    return [_share(w, -1, rank, num_ranks) for rank in range(num_ranks)]


def add_ranks(parts: Sequence[torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    """Add every rank's result in ascending order and round once.

    Args:
        parts: fp32 of one shape.
        out_dtype: bf16 or fp32.

    Raises:
        TypeError: a part is not fp32: it was rounded before the sum.
    """
    for rank, part in enumerate(parts):
        if part.dtype != torch.float32:
            raise TypeError(
                f"add_ranks: the part of rank {rank} must be float32; got {part.dtype}. Ask the operation for "
                "out_dtype float32: the sum is rounded once."
            )
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(out_dtype)


def input_cut_linear(
    x: torch.Tensor,
    w: Weight,
    num_ranks: int,
    times: Callable[[torch.Tensor, Any], torch.Tensor],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute a linear whose K is cut: what a model on num_ranks ranks returns.

    Args:
        x: [T, K] bf16 or fp32, not quantized.
        w: [N, K].
        num_ranks: shares of K.
        times: a rank's operation, (x_r, w_r) -> [T, N] fp32; it rounds x_r itself if it rounds it.
        out_dtype: bf16 or fp32.
    """
    inputs = x.chunk(num_ranks, dim=-1)
    shares = cut_inputs(w, num_ranks)
    return add_ranks([times(part, share) for part, share in zip(inputs, shares, strict=True)], out_dtype)


def cut_experts(
    experts: Callable[[Any, Any, Any], torch.Tensor],
    weights: tuple[Weight, Weight, Weight],
    num_ranks: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute routed experts whose inner size F is cut.

    Args:
        experts: a rank's operation, (w1_r, w3_r, w2_r) -> [T, D] fp32.
        weights: w1 and w3 [E, F, D], w2 [E, D, F].
        num_ranks: shares of F.
        out_dtype: bf16 or fp32.
    """
    w1, w3, w2 = weights
    shares = zip(cut_outputs(w1, num_ranks), cut_outputs(w3, num_ranks), cut_inputs(w2, num_ranks), strict=True)
    return add_ranks([experts(*share) for share in shares], out_dtype)


def _share(w: Weight, dim: int, rank: int, num_ranks: int) -> Weight:
    if isinstance(w, torch.Tensor):
        return _slice(w, dim, rank, num_ranks, 1)
    if isinstance(w, Fp8BlockTensor):
        codes = _slice(w.codes, dim, rank, num_ranks, fp8.BLOCK)
        return Fp8BlockTensor(codes, _slice(w.scales, dim, rank, num_ranks, 1))
    if w.row_major() is not w:
        raise ValueError(
            f"cut: an NVFP4 weight must be row-major; got scales in {w.scale_layout.name}. Cut before .tiled() or "
            ".fragments()."
        )
    if dim == -1 and w.shape[-1] % (nvfp4.BLOCK * num_ranks):
        raise ValueError(_uneven(w.shape[-1], num_ranks, nvfp4.BLOCK))
    codes = _slice(w.codes, dim, rank, num_ranks, 1)
    return dataclasses.replace(w, codes=codes, scales=_slice(w.scales, dim, rank, num_ranks, 1))


def _slice(x: torch.Tensor, dim: int, rank: int, num_ranks: int, block: int) -> torch.Tensor:
    size = x.shape[dim]
    if size % (num_ranks * block):
        raise ValueError(_uneven(size, num_ranks, block))
    return x.narrow(dim, rank * (size // num_ranks), size // num_ranks)


def _uneven(size: int, num_ranks: int, block: int) -> str:
    of = f" of whole blocks of {block}" if block > 1 else ""
    return f"cut: a size of {size} has no {num_ranks} equal shares{of}. Use fewer ranks, or keep it whole."
