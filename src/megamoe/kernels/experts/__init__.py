# SPDX-License-Identifier: Apache-2.0
"""Routed experts: pairs of token and expert sorted, two matrix products, slots added up."""
