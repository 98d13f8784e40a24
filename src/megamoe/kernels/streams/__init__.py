# SPDX-License-Identifier: Apache-2.0
"""Operations on residual streams that only move or add: rows go in, streams come out, or the other way round."""
