# SPDX-License-Identifier: Apache-2.0
"""Kernels that need no instruction of one architecture: they run on sm_90 and everything after it."""
