# SPDX-License-Identifier: Apache-2.0
"""Turn a trained bf16 master into what is shipped: the NVFP4 checkpoint in the package, the overlay in the tree.

    python package.py --master <directory> --tokens <data>/train.bin

Writes into src/megamoe/models/deepseek_v4/tiny (NVFP4 checkpoint, tokenizer, a held-out text sample for verify) and
tools/tiny_model/master (only the bf16 weights that NVFP4 replaced; see docs/decisions/0004-overlay-master.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from calibrate import calibrate, training_windows
from export_nvfp4 import export
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.writer import write_json, write_safetensors
from megamoe.models.load import BUNDLED

HERE = Path(__file__).parent
SAMPLE_CHARS = 1500  # of each of two held-out documents, code and prose


def write_originals(master: Path, quantized: Path, out: Path) -> int:
    """Write the weights of `master` that `quantized` replaced; returns bytes."""
    with CheckpointReader(master) as source, CheckpointReader(quantized) as target:
        names = [n.removesuffix(".weight_scale_2") + ".weight" for n in target.names if n.endswith(".weight_scale_2")]
        out.mkdir(parents=True, exist_ok=True)
        return write_safetensors(
            out / "model.safetensors", {name: source.tensor(name) for name in names}, {"format": "pt"}
        )


def main() -> None:
    """Package from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="train.bin of data.py, for calibration")
    parser.add_argument("--block-scale", choices=("amax", "mse", "mixed"), default="mixed")
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()

    amax = calibrate(args.master, training_windows(args.tokens, args.num_windows, args.window))
    write_json(HERE / "calibration.json", amax)
    target = BUNDLED["tiny"]
    result = export(args.master, amax, target, args.block_scale)
    num_bytes = write_originals(args.master, target, HERE / "master")
    documents = [json.loads(line) for line in (HERE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [next(d["text"] for d in documents if d["path"].startswith(kind)) for kind in ("code/", "docs/")]
    (target / "sample.txt").write_text("".join(text[:SAMPLE_CHARS] for text in kinds), encoding="utf-8")
    print(f"{target}: {result['bytes']:,.0f} bytes, relative weight error {result['error']:.4f}")
    print(f"{HERE / 'master'}: {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
