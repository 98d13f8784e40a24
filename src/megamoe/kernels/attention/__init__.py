# SPDX-License-Identifier: Apache-2.0
"""Attention: queries against window rows and compressed entries, gathered from pools by number."""
