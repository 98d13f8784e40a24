# SPDX-License-Identifier: Apache-2.0
"""What is computed: one file per operation with its contract, its checks, its plain-torch meaning and its dispatch.

Import an operation from the file with its name: `from megamoe.ops.rms_norm import rms_norm`. The package itself offers
`use`, the switch that runs references everywhere.
"""

from megamoe.ops.dispatch import use

__all__ = ["use"]
