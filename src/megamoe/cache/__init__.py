# SPDX-License-Identifier: Apache-2.0
"""Where keys and values live: page numbers, ring positions, and the storage of every layer.

    pages.py              which pages a sequence owns (integers only)
    ring.py               where a position lives in a ring of fixed capacity
    compressor_state.py   which raw rows a finished compression block needs
    pools.py              what a layer keeps, how much that costs, and its allocation

Nothing here knows a model: models pass numbers in and read slots out.
"""
