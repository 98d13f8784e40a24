# SPDX-License-Identifier: Apache-2.0
"""Architectures, one folder each; models never import each other."""

from __future__ import annotations

import pathlib

# Models that come with the package: name -> checkpoint directory.
BUNDLED = {"tiny": pathlib.Path(__file__).parent / "deepseek_v4" / "tiny"}

# Name in config.json's `architectures` -> folder.
ARCHITECTURES: dict[str, str] = {
    "DeepseekV4ForCausalLM": "deepseek_v4",
}
