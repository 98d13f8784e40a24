# SPDX-License-Identifier: Apache-2.0
"""Vocabulary of kernels of several rooms: copies, barriers, codecs, reductions. No kernel is here.

Files ending in _device are for device halves: they import the DSL.
"""
