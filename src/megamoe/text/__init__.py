# SPDX-License-Identifier: Apache-2.0
"""Strings to token ids and back."""
