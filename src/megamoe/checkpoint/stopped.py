# SPDX-License-Identifier: Apache-2.0
"""Whether a folder is a conversion that was stopped, from its journal alone (manifest.py writes it); without torch."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

MANIFEST_NAME = "convert-manifest.jsonl"


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A conversion that has not come to its end.

    Attributes:
        options: what the user had chosen.
        num_files: files that are finished.
    """

    options: Mapping[str, Any]
    num_files: int


def stopped_conversion(directory: pathlib.Path) -> Stopped | None:
    """Return what the journal of a folder says of an unfinished conversion; None where there is none."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    lines = [line for raw in path.read_bytes().splitlines() if isinstance(line := _line(raw), dict)]
    is_complete = any("complete" in line for line in lines)
    if is_complete and (directory / "config.json").is_file():  # config.json is the last file to be written
        return None
    options = lines[0].get("options") if lines else None
    return Stopped(options if isinstance(options, dict) else {}, sum(1 for line in lines if "shard" in line))


def _line(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None  # a line that was cut off
