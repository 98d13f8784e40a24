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


def architecture_of(name: str) -> str:
    """Return the folder of an architecture named in config.json.

    Raises:
        ValueError: no model of this architecture is implemented.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture: config.json names {name!r}; implemented are {', '.join(sorted(ARCHITECTURES))}. "
            "Pass a checkpoint of one of these."
        )
    return ARCHITECTURES[name]
