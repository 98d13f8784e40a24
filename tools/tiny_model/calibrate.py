# SPDX-License-Identifier: Apache-2.0
"""Record the largest magnitude that reaches every weight NVFP4 replaces, on text the model was trained on.

    python calibrate.py --master <directory> --tokens <data>/train.bin --out amax.json

The bf16 master runs in recipe `exact`; the linears of the model are wrapped for this process only. The result is a file
for `megamoe convert --calibration`, which makes input_scale of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe.checkpoint.writer import write_json
from megamoe.models.deepseek_v4 import linear as model_linear
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.load import load
from megamoe.ops.swiglu import clamped_swiglu

ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
SHARED = {"shared_w1": "w1", "shared_w2": "w2", "shared_w3": "w3"}


def weight_names(model: Model) -> dict[int, str]:
    """Return the checkpoint's name of every weight to calibrate, by address; stacked experts by their layer."""
    names: dict[int, str] = {}
    blocks = [(f"layers.{i}", block) for i, block in enumerate(model.weights.blocks)]
    blocks += [(f"mtp.{i}", stage.block) for i, stage in enumerate(model.weights.mtp)]
    for prefix, block in blocks:
        for leaf in ATTENTION:
            names[getattr(block.attention, leaf).data_ptr()] = f"{prefix}.attn.{leaf}"
        if block.attention.indexer is not None:
            names[block.attention.indexer.wq_b.data_ptr()] = f"{prefix}.attn.indexer.wq_b"
        for leaf, native in SHARED.items():
            names[getattr(block.moe, leaf).data_ptr()] = f"{prefix}.ffn.shared_experts.{native}"
        names[block.moe.w1.data_ptr()] = f"{prefix}.ffn.experts"
    for i, stage in enumerate(model.weights.mtp):
        names[stage.e_proj.data_ptr()] = f"mtp.{i}.e_proj"
        names[stage.h_proj.data_ptr()] = f"mtp.{i}.h_proj"
    return names


class Recorder:
    """Stands in for the operations that multiply by weights, and notes the amax of what they are given."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.amax: dict[str, float] = {}
        self.names: dict[int, str] = {}
        self._linear = model_linear.linear
        self._grouped = model_linear.grouped_linear
        self._experts = model_linear.experts

    def note(self, name: str | None, x: torch.Tensor) -> None:
        """Raise the amax of `name` to that of x."""
        if name is not None and x.numel():
            self.amax[name] = max(self.amax.get(name, 0.0), float(x.abs().amax()))

    def linear(self, x: torch.Tensor, w: torch.Tensor, **options: Any) -> torch.Tensor:
        """Linear."""
        self.note(self.names.get(w.data_ptr()), x)
        return self._linear(x, w, **options)

    def grouped_linear(self, x: torch.Tensor, w: torch.Tensor, **options: Any) -> torch.Tensor:
        """Grouped linear."""
        self.note(self.names.get(w.data_ptr()), x)
        return self._grouped(x, w, **options)

    def experts(
        self,
        x: torch.Tensor,
        route_weights: torch.Tensor,
        expert_ids: torch.Tensor,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Experts; the input of w2 is worked out here."""
        prefix = self.names[w1.data_ptr()]
        for expert in expert_ids.unique().tolist():
            tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
            rows = x[tokens]
            hidden = clamped_swiglu(
                rows @ w1[expert].T,
                rows @ w3[expert].T,
                limit=options["swiglu_limit"],
                row_weight=route_weights[tokens, slots],
            )
            self.note(f"{prefix}.{expert}.w1", rows)
            self.note(f"{prefix}.{expert}.w3", rows)
            self.note(f"{prefix}.{expert}.w2", hidden)
        return self._experts(x, route_weights, expert_ids, w1, w3, w2, **options)


def calibrate(master: Path, windows: torch.Tensor) -> dict[str, float]:
    """Return the amax by weight over `windows` [N, T] of token ids."""
    recorder = Recorder()
    model_linear.linear = recorder.linear  # type: ignore[assignment]
    model_linear.grouped_linear = recorder.grouped_linear  # type: ignore[assignment]
    model_linear.experts = recorder.experts  # type: ignore[assignment]
    try:
        model = load(master, recipe="exact")
        recorder.names = weight_names(model)
        with torch.inference_mode():
            for part in windows:
                cache = model.new_cache(max_tokens=part.shape[0])
                for chunk, following in zip(part[:-1].split(256), part[1:].split(256), strict=True):
                    streams = model.advance(chunk, cache)
                    for stage in range(len(model.mtp)):
                        streams = model.draft(streams, following, cache, stage)[1]
    finally:
        model_linear.linear = recorder._linear
        model_linear.grouped_linear = recorder._grouped
        model_linear.experts = recorder._experts
    return dict(sorted(recorder.amax.items()))


def training_windows(tokens: Path, count: int, length: int) -> torch.Tensor:
    """Return `count` windows [count, length] of token ids, spread evenly over the training stream."""
    stream = np.fromfile(tokens, dtype=np.uint16)
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int64))


def main() -> None:
    """Calibrate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="train.bin of data.py: uint16 token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    args = parser.parse_args()
    amax = calibrate(args.master, training_windows(args.tokens, args.num_windows, args.window))
    write_json(args.out, amax)
    print(f"wrote {args.out}: {len(amax)} weights")


if __name__ == "__main__":
    main()
