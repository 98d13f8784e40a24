# SPDX-License-Identifier: Apache-2.0
"""Turn a trained bf16 master into what is shipped: the NVFP4 checkpoint in the package, the overlay in the tree.

    python package.py --master <directory> --tokens <data>/train.bin

Writes into src/megamoe/models/deepseek_v4/tiny (NVFP4 checkpoint, tokenizer, a held-out text sample for verify) and
tools/tiny_model/master (only the bf16 weights that NVFP4 replaced; see docs/decisions/0004-overlay-master.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from calibrate import calibrate, training_windows
from megamoe import __version__
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.writer import write_json, write_safetensors
from megamoe.models.deepseek_v4.convert import ConvertOptions, SearchChoice, convert
from megamoe.models.load import BUNDLED

HERE = Path(__file__).parent
SHIPPED = ("config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json")
SAMPLE_CHARS = 1500  # of each of two held-out documents, code and prose


def write_quantized(master: Path, amax: dict[str, float], search: SearchChoice, target: Path) -> float:
    """Convert every linear to NVFP4 and replace what is shipped in `target`; returns the mean relative L2 error."""
    options = ConvertOptions(
        experts="requantize",
        attention="nvfp4",
        draft="convert",
        scale_search=search,
        calibration=amax,
        producer=("megamoe", __version__),
    )
    with tempfile.TemporaryDirectory() as scratch:
        _, result = convert(master, Path(scratch) / "nvfp4", options)
        for name in SHIPPED:
            shutil.copyfile(Path(scratch) / "nvfp4" / name, target / name)
    errors = [record["relative_l2"] for record in result.records]
    return sum(errors) / len(errors)


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
    # Training rounded by the maximum, and the model has learned with that; only its shared experts gain by searching.
    parser.add_argument("--scale-search", type=SearchChoice.parse, default="max,shared=mse", metavar="SEARCH")
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()

    amax = calibrate(args.master, training_windows(args.tokens, args.num_windows, args.window))
    write_json(HERE / "calibration.json", amax)
    target = BUNDLED["tiny"]
    error = write_quantized(args.master, amax, args.scale_search, target)
    num_bytes = write_originals(args.master, target, HERE / "master")
    documents = [json.loads(line) for line in (HERE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [next(d["text"] for d in documents if d["path"].startswith(kind)) for kind in ("code/", "docs/")]
    (target / "sample.txt").write_text("".join(text[:SAMPLE_CHARS] for text in kinds), encoding="utf-8")
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {size:,} bytes, mean relative error of a weight {error:.4f}")
    print(f"{HERE / 'master'}: {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
