# SPDX-License-Identifier: Apache-2.0
"""Where keys and values live: page numbers, ring positions, and the storage of every layer.

    pages.py              which pages a sequence owns (integers only)
    batch.py              which tokens of which sequences a step runs
    buckets.py            the numbers of tokens that decode steps are filled up to
    compressor_state.py   how many raw rows a finished compression block needs
    pools.py              what a layer keeps, how much that costs, and its allocation
    prefix.py             which pages can be reused

Nothing here knows a model: models pass numbers in. Where a row lies is said by `ops.row_slots`.
"""
