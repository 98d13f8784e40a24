# SPDX-License-Identifier: Apache-2.0
"""How a cluster shares a row of logits, for host and device halves."""

CLUSTER = 8
THREADS = 512
WARPS = THREADS // 32
HELD = 16384
"""Logits that a block keeps in shared memory."""
