# SPDX-License-Identifier: Apache-2.0
"""How a cluster shares a row of logits, for host and device halves."""

CLUSTER = 8
THREADS = 512
WARPS = THREADS // 32
HELD = 16384
"""Logits that a block keeps in shared memory."""
MAX_COLUMNS = CLUSTER * HELD


def require_columns(op: str, num_columns: int) -> None:
    """Refuse rows that a cluster cannot hold."""
    if num_columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"{op}: the kernel takes up to {MAX_COLUMNS} columns; got {num_columns}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )
