# SPDX-License-Identifier: Apache-2.0
"""y = x w^T with FP8 weights, as they are loaded."""
