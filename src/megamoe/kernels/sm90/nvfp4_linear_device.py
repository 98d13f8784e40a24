# SPDX-License-Identifier: Apache-2.0
"""Device half of nvfp4_linear."""

from megamoe.kernels.parts.linear_stream_device import program

__all__ = ["program"]
