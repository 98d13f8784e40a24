# SPDX-License-Identifier: Apache-2.0
"""Streams collapsed to one and mixed again: hyper_connection_pre, _pre_norm, _head and _post."""
