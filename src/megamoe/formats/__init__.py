# SPDX-License-Identifier: Apache-2.0
"""What bytes mean: the number formats of checkpoints, activations and caches.

Imports torch only; everything else in the package may import this room, and this room imports nothing of the package.

e2m1          4-bit codes: values, rounding, packing
e4m3, e8m0    8-bit codes and 8-bit power-of-two scales
nvfp4         NvFp4Tensor: E2M1 codes, E4M3 scale per 16, fp32 scale per tensor or row
mxfp4         MxFp4Tensor: E2M1 codes, E8M0 scale per 32; exact conversion to and from NVFP4
fp8           Fp8BlockTensor (128 x 128 blocks) and Fp8RowTensor (groups along a row)
division      by a number, with the same bits on every device
scale_layout  row-major and tiled 128x4 block scales
cache_rows    the rows of the key-value caches and the paged pool that holds them

Two rules hold in every file. A scale multiplies codes to give values; a reciprocal is never stored. Arithmetic is fp32
and rounds once, to the same bytes on every device; NaN and infinity are refused by name where values become codes or
codes become values.

Source     docs/numerics.md
"""
