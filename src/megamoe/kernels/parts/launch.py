# SPDX-License-Identifier: Apache-2.0
"""What launches do before a kernel gets its tensors: names of dtypes, tensors as kernels take them, what is refused.

No object depends on this file.
"""

from __future__ import annotations

import functools

import torch

from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels import BORDERS
from megamoe.kernels.parts.held_row import CLUSTER, HELD
from megamoe.kernels.store import architecture_of

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
MAX_WIDTH = 32768
MAX_COLUMNS = CLUSTER * HELD
"""Of a row of logits that a cluster keeps."""
MAX_STREAMS = 8
MAX_HEAD_WIDTH = 1024


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many blocks of a persistent kernel run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as [rows, K] with 16-byte aligned rows: a view, or one contiguous copy where no view has them."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    step = 16 // x.element_size()
    if rows.stride(-1) != 1 or rows.stride(0) % step or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows


def as_vector(x: torch.Tensor) -> torch.Tensor:
    """Return [K] contiguous and 16-byte aligned: x, or a copy where it is not."""
    return x if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous and 16-byte aligned: itself, or a copy where it is not."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Return whether the rows of x [..., K] start at multiples of 16 bytes and their values lie side by side."""
    step = 16 // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % step for stride in x.stride()[:-1])


def as_heads(x: torch.Tensor) -> torch.Tensor:
    """Return x [T, H, C] with 16-byte aligned heads: itself, or a contiguous copy where they are not."""
    return x if has_aligned_rows(x) else x.clone(memory_format=torch.contiguous_format)


def require_width(op: str, width: int, multiple: int = 8) -> None:
    """Refuse row widths the kernel has no tile for."""
    if width < multiple or width % multiple or width > MAX_WIDTH:
        raise NotImplementedError(
            f"{op}: the kernel takes rows of {multiple} to {MAX_WIDTH} values, a multiple of {multiple}; got {width}. "
            f'Pad the rows, or run the reference: with megamoe.ops.use("reference").'
        )


def require_streams(op: str, streams: int) -> None:
    """Refuse numbers of streams the kernels keep no registers for."""
    if streams > MAX_STREAMS:
        raise NotImplementedError(
            f"{op}: the kernel takes up to {MAX_STREAMS} streams; got {streams}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )


def require_heads(op: str, width: int, rope_dim: int) -> None:
    """Refuse heads wider than a warp, and borders between channels that rotate and others within a vector."""
    if width % 8 or width > MAX_HEAD_WIDTH or rope_dim % 8:
        raise NotImplementedError(
            f"{op}: the kernel takes heads of up to {MAX_HEAD_WIDTH} channels, a multiple of 8, of which a multiple of "
            f'8 rotate; got {width} and {rope_dim}. Run the reference: with megamoe.ops.use("reference").'
        )


def require_fragments(op: str, *weights: NvFp4Tensor) -> None:
    """Refuse weights that are not in fragment order."""
    for weight in weights:
        if weight.code_layout is not CodeLayout.FRAGMENT_16X64:
            raise ValueError(
                f"{op}: the kernel takes weights in fragment order; got {weight.code_layout.value} codes. Convert them "
                "once, when loading: w.fragments()."
            )


def is_of(arch: str, device: torch.device) -> bool:
    """Return whether a device is of an architecture."""
    return architecture_of(device) == arch


def takes_more(op: str, device: torch.device) -> bool:
    """Return whether an operation has its path for more than few tokens on the architecture of a device."""
    return architecture_of(device) in BORDERS[op].more


def require_more(op: str, num_tokens: int, limit: int, device: torch.device) -> None:
    """Refuse more than few tokens where there is no path for them."""
    if not takes_more(op, device):
        arch = architecture_of(device)
        raise NotImplementedError(
            f"{op}: on {arch} the kernel takes up to {limit} tokens of these sizes; got {num_tokens}. More is taken on "
            f"{', '.join(BORDERS[op].more)}. Pass {limit} at a time, or run the reference: "
            'with megamoe.ops.use("reference").'
        )


def require_columns(op: str, num_columns: int) -> None:
    """Refuse rows that a cluster cannot hold."""
    if num_columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"{op}: the kernel takes up to {MAX_COLUMNS} columns; got {num_columns}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )


def as_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return [T, V] with the values of a row side by side: itself, or a copy where they are not."""
    return logits if logits.stride(1) == 1 else logits.clone(memory_format=torch.contiguous_format)
