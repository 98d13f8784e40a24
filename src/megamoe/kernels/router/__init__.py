# SPDX-License-Identifier: Apache-2.0
"""From tokens to experts and their weights: scores, then a selection."""
