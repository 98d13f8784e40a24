# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of the tiny model as a DeepSeek-native directory: config.json, tokenizer.json, model.safetensors.

python export_master.py --checkpoint <ckpt.pt> --tokenizer <tokenizer.json> --out <directory>
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
FP32_LEAVES = ("_fn", "_base", "_scale", "attn_sink", ".ape", "gate.bias")


def native_tensors(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Give each tensor the dtype it has in DeepSeek's checkpoints (matrices and norms in `dtype`)."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("tid2eid"):
            out[name] = tensor.to(torch.int64).cpu().contiguous()
        elif name.endswith(FP32_LEAVES):
            out[name] = tensor.float().cpu().contiguous()
        else:
            out[name] = tensor.to(dtype).cpu().contiguous()
    return out


def export(
    state: dict[str, torch.Tensor], tokenizer: Path | None, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the directory file by file, each under a temporary name first."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        temporary = Path(scratch)
        save_file(native_tensors(state, dtype), temporary / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(HERE / "config.json", temporary / "config.json")
        names = ["config.json", "model.safetensors"]
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
            names.append("tokenizer.json")
        for name in names:
            (temporary / name).chmod(0o644)
            os.replace(temporary / name, out / name)


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=HERE / "tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)["model"]
    export(state, args.tokenizer, args.out)
    print(f"wrote {args.out} ({sum(t.numel() for t in state.values()):,} values)")


if __name__ == "__main__":
    main()
