# SPDX-License-Identifier: Apache-2.0
"""Operations that write, move and address rows of cache pools. Bytes are those of formats/cache_rows.py."""
