# SPDX-License-Identifier: Apache-2.0
"""From requests to token ids. Knows no strings."""
