# SPDX-License-Identifier: Apache-2.0
"""Is it right? Bounds and comparisons for operations, layers and whole models."""
