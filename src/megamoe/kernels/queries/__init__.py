# SPDX-License-Identifier: Apache-2.0
"""Operations on heads of queries: norm, rotation, rounding. A block's heads are of one token and share its angles."""
