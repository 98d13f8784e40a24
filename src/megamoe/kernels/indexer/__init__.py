# SPDX-License-Identifier: Apache-2.0
"""The indexer: scores of index keys, and the selection of the best entries."""
