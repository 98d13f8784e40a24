# SPDX-License-Identifier: Apache-2.0
"""Attention over window rows and compressed entries."""
