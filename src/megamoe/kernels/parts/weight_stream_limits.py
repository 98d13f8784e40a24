# SPDX-License-Identifier: Apache-2.0
"""What the kernels that stream a weight once past a few tokens (weight_stream.py) have registers and memory for."""

from __future__ import annotations

from megamoe.formats.fragment_layout import TILE_COLUMNS
from megamoe.kernels.parts.weight_stream import SHARED_BYTES, THREADS, WARPS, StreamPlan

MAX_SLICE_CHUNKS = 8
MAX_COLUMNS = WARPS * MAX_SLICE_CHUNKS * TILE_COLUMNS


def is_possible(plan: StreamPlan, more_bytes: int = 0) -> bool:
    """Return whether registers and shared memory suffice.

    Args:
        plan: how a product is shared out.
        more_bytes: shared memory that the kernel needs behind the plan's.
    """
    return (
        plan.num_columns % TILE_COLUMNS == 0
        and 0 < plan.num_columns <= MAX_COLUMNS
        and plan.num_slots >= 2
        and plan.outputs_per_unit <= plan.row_groups * THREADS
        and plan.shared_bytes + more_bytes <= SHARED_BYTES
    )
