# SPDX-License-Identifier: Apache-2.0
"""Kernels for Hopper (compute capability 9.0)."""
