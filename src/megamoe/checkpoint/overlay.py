# SPDX-License-Identifier: Apache-2.0
"""Put original weights back over a quantized checkpoint.

The bundled model is stored twice without storing anything twice: the package holds the NVFP4 checkpoint, and the source
tree holds only the bf16 weights that NVFP4 replaced. Everything else is byte-identical in both, so the two
together are the bf16 master.
"""

from __future__ import annotations

import json
import os
import pathlib

from megamoe.checkpoint.reader import CheckpointError, CheckpointReader
from megamoe.checkpoint.writer import write_json, write_safetensors

QUANTIZATION_LEAVES = ("weight_scale", "weight_scale_2", "input_scale")


def write_overlay(
    quantized: str | os.PathLike[str], originals: str | os.PathLike[str], target: str | os.PathLike[str]
) -> None:
    """Write the checkpoint `quantized` with every quantized weight replaced by its original.

    Args:
        quantized: checkpoint directory in NVIDIA's NVFP4 layout.
        originals: directory with the original tensors, named as in `quantized`.
        target: directory to write; created when missing.

    Raises:
        CheckpointError: an original has no place in `quantized`, or a quantized weight has no original.
    """
    source, out = pathlib.Path(quantized), pathlib.Path(target)
    with CheckpointReader(source) as base, CheckpointReader(originals) as over:
        replaced = {name.removesuffix(".weight_scale_2") + ".weight" for name in base.names if "weight_scale_2" in name}
        problems = [f"{name}: quantized, but not among the originals" for name in sorted(replaced - set(over.names))]
        problems += [f"{name}: an original, but not quantized" for name in sorted(set(over.names) - replaced)]
        if problems:
            raise CheckpointError.listing(f"overlay of {originals} on {quantized}", problems)
        tensors = {name: over.tensor(name) for name in over.names}
        for name in base.names:
            if name not in replaced and name.rsplit(".", 1)[-1] not in QUANTIZATION_LEAVES:
                tensors[name] = base.tensor(name)
        out.mkdir(parents=True, exist_ok=True)
        write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("expert_dtype", None)
    write_json(out / "config.json", config)
    tokenizer = source / "tokenizer.json"
    if tokenizer.exists():
        (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
