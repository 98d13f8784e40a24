# SPDX-License-Identifier: Apache-2.0
"""write_block_tables: change single pages of the block tables that live on the device.

Math       tables[request, column] = block        for each change (request, column, block); nothing where request is -1
Numerics   integers
Tolerance  none: exact
Kernels    a thread a change; a change outside the tables changes nothing
Source     docs/architecture.md, section "A step"
"""

from __future__ import annotations

import torch

from megamoe.ops.check import check
from megamoe.ops.dispatch import pick

INT32: tuple[torch.dtype, ...] = (torch.int32,)


def write_block_tables(tables: torch.Tensor, changes: torch.Tensor) -> None:
    """Change block tables in place.

    Args:
        tables: [R, n] int32.
        changes: [N, 3] int32: request, column, block; a request of -1 changes nothing. A place named twice gets one of
            its blocks, so callers name it once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape does not fit, or a change lies outside the tables.
    """
    check("write_block_tables", tables=(tables, "R n", INT32), changes=(changes, "N 3", INT32))
    pick("write_block_tables", tables.device, reference)(tables, changes)


def reference(tables: torch.Tensor, changes: torch.Tensor) -> None:
    """Compute the operation's meaning in plain torch."""
    changes = changes[changes[:, 0] >= 0].to(torch.int64)
    if not changes.shape[0]:
        return
    request, column, block = changes.unbind(1)
    if int(request.max()) >= tables.shape[0] or int(column.min()) < 0 or int(column.max()) >= tables.shape[1]:
        raise ValueError(
            f"write_block_tables: changes must lie in the tables {list(tables.shape)}; got requests up to "
            f"{int(request.max())} and columns {int(column.min())} to {int(column.max())}. Tables are as wide as the "
            f"longest sequence."
        )
    tables[request, column] = block.to(torch.int32)
