# SPDX-License-Identifier: Apache-2.0
"""Operations on rows: norms, quantizers, products of two rows. A row lies in registers, and is read once."""
