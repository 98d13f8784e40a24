# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4: configuration, weights, layers and prompt encoding."""
