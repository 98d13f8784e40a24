# SPDX-License-Identifier: Apache-2.0
"""What rounding the softmax weights of attention costs, and what it does to splits over keys.

    python tools/attention_contract.py

Random queries and rows of V4's size: unit-variance latent rows stored as 584-byte cache rows, queries scaled so that
the logits have the standard deviation named in the first column (peaked softmaxes have few items that count). Every
figure is a relative L2 distance of y before its rounding to bf16: median and largest over rows (a head of a token).
"""

from __future__ import annotations

import argparse
import math

import torch

from megamoe.formats.cache_rows import RowFormat, decode_rows, encode_rows

TILE = 64
LN2 = math.log(2.0)


def example(num_heads: int, num_items: int, spread: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return logits [H, J] and rows [J, 512], both fp64 of fp32 values."""
    rows = torch.randn(num_items, 512, generator=generator)
    rows = decode_rows(*encode_rows(rows, RowFormat.FP8_ROPE_BF16), RowFormat.FP8_ROPE_BF16, 512)
    q = torch.randn(num_heads, 512, generator=generator) * spread
    return (q @ rows.T).mul(512**-0.5).double(), rows.double()


def exact(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return y in fp64, without a sink."""
    return torch.softmax(logits, -1) @ rows


def rounded(
    logits: torch.Tensor,
    rows: torch.Tensor,
    dtype: torch.dtype,
    *,
    maximum: str,
    num_splits: int = 1,
    sums: str = "unrounded",
) -> torch.Tensor:
    """Return y with weights rounded to `dtype`, everything else in fp64.

    Args:
        logits: [H, J].
        rows: [J, C].
        dtype: of the weights.
        maximum: what is subtracted: "running" maximum over tiles of a split, or the "power of two" above it.
        num_splits: the tiles are dealt out to so many splits, each with a maximum of its own.
        sums: whether the denominator adds "unrounded" or "rounded" weights.
    """
    y = torch.zeros(logits.shape[0], rows.shape[1], dtype=torch.float64)
    total = torch.zeros(logits.shape[0], 1, dtype=torch.float64)
    top_of_all = logits.amax(-1, keepdim=True)
    tiles = range(0, logits.shape[1], TILE)
    per_split = -(-len(tiles) // num_splits)
    for first in range(0, len(tiles), per_split):
        top = torch.full_like(total, -math.inf)
        for start in tiles[first : first + per_split]:
            tile = logits[:, start : start + TILE]
            top = torch.maximum(top, tile.amax(-1, keepdim=True))
            shift = (torch.ceil(top / LN2) - 15) * LN2 if maximum == "power of two" else top
            weights = torch.exp(tile - shift)
            kept = weights.to(dtype).double()
            scale = torch.exp(shift - top_of_all)
            y += kept @ rows[start : start + TILE] * scale
            total += (weights if sums == "unrounded" else kept).sum(-1, keepdim=True) * scale
    return y / total


def distance(got: torch.Tensor, want: torch.Tensor) -> str:
    """Return the median and largest relative L2 distance of rows."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    return f"{float(error.median()):.1e} / {float(error.max()):.1e}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=512, help="rows per case")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    half, brain = torch.float16, torch.bfloat16
    print("| logits' spread | items | fp16 | fp16, sums rounded | bf16 | output's own rounding to bf16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    split_rows = []
    for num_items in (64, 640, 8320):
        for spread in (0.5, 2.0, 6.0):
            logits, rows = example(arguments.heads, num_items, spread, generator)
            want = exact(logits, rows)
            print(
                f"| {spread} | {num_items} "
                f"| {distance(rounded(logits, rows, half, maximum='power of two'), want)} "
                f"| {distance(rounded(logits, rows, half, maximum='power of two', sums='rounded'), want)} "
                f"| {distance(rounded(logits, rows, brain, maximum='power of two'), want)} "
                f"| {distance(want.float().bfloat16().double(), want)} |"
            )
            if num_items > TILE:
                for splits in (2, 5):
                    cells = [
                        distance(
                            rounded(logits, rows, half, maximum=maximum, num_splits=splits),
                            rounded(logits, rows, half, maximum=maximum),
                        )
                        for maximum in ("running", "power of two")
                    ]
                    split_rows.append(f"| {spread} | {num_items} | {splits} | {cells[0]} | {cells[1]} |")
    print("\n| logits' spread | items | splits | running maximum | power of two |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(split_rows))


if __name__ == "__main__":
    main()
