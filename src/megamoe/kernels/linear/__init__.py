# SPDX-License-Identifier: Apache-2.0
"""y = x w^T with NVFP4 or bf16 weights, one matrix or one a group."""
