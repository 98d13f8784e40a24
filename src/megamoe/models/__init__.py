# SPDX-License-Identifier: Apache-2.0
"""Architectures, one folder each; models never import each other."""

from __future__ import annotations

import os
import pathlib

from megamoe.checkpoint.problem import CheckpointError

# Models that come with the package: name -> checkpoint directory.
BUNDLED = {"tiny": pathlib.Path(__file__).parent / "deepseek_v4" / "tiny"}


def find_checkpoint(model: str | os.PathLike[str], command: str) -> pathlib.Path:
    """Return the checkpoint directory that a user's words stand for.

    Args:
        model: name of a bundled model, or a directory; "~" is the home directory, also where no shell has expanded it.
        command: who asks, for messages.

    Raises:
        CheckpointError: nothing was named, there is no such directory, or it is a hub cache around checkpoints.
    """
    words = os.fspath(model)
    if not words.strip():
        raise CheckpointError(f"{command}: no model named (got {words!r}). Pass {' or '.join(BUNDLED)} or a directory.")
    if words in BUNDLED:
        return BUNDLED[words]
    directory = pathlib.Path(words).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"{command}: no model {words!r}: {directory} is not a directory, and bundled are {', '.join(BUNDLED)}. "
            "Pass a directory with config.json and safetensors files."
        )
    if not (directory / "config.json").exists() and (inner := _in_hub_cache(directory)):
        shown = ", ".join(map(str, inner[:_MAX_SHOWN]))
        more = f" (or one of {len(inner) - _MAX_SHOWN} more)" if len(inner) > _MAX_SHOWN else ""
        raise CheckpointError(f"{command}: {directory} is a hub cache; the checkpoints lie in it. Pass {shown}{more}.")
    return directory


_MAX_SHOWN = 3


def _in_hub_cache(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the snapshots in a hub cache, or in one repository of it, the one that main names first."""
    repositories = [directory, *sorted(directory.glob("models--*"))]
    found = []
    for repository in repositories:
        main = repository / "refs" / "main"
        first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        snapshots = sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir())
        found += sorted(snapshots, key=lambda path: path.name != first)
    return found


# Name in config.json's `architectures` -> folder.
ARCHITECTURES: dict[str, str] = {
    "DeepseekV4ForCausalLM": "deepseek_v4",
}
