# SPDX-License-Identifier: Apache-2.0
"""What two or more kernels share. Files ending in _device are for device halves: they import the DSL."""
