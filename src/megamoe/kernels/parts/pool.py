# SPDX-License-Identifier: Apache-2.0
"""Cache pools as kernels take them: what a launch is given of one, and what is refused."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat

ROW_NAMES: dict[RowFormat, str] = {one: one.value for one in RowFormat}
"""Row formats as compile keys name them."""


MAX_PAGE_BYTES = 2**31


def as_pool(op: str, name: str, pool: CachePool) -> torch.Tensor:
    """Return a pool's storage [blocks, page bytes], whose pages must start at multiples of 16 bytes.

    Raises:
        NotImplementedError: they do not, or a page is too long.
    """
    storage = pool.storage
    if storage.stride(0) % 16 or storage.data_ptr() % 16:
        raise NotImplementedError(
            f"{op}: the kernel takes pools whose pages start at multiples of 16 bytes; got a block stride of "
            f"{storage.stride(0)} and address {storage.data_ptr():#x} in {name}. Allocate it with CachePool.allocate."
        )
    if pool.page_bytes >= MAX_PAGE_BYTES:
        raise NotImplementedError(
            f"{op}: the kernel takes pages of less than {MAX_PAGE_BYTES} bytes; got {pool.page_bytes} in {name}. Use "
            f"fewer rows per block."
        )
    return storage
