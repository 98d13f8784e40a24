# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of the bundled model: bf16 master, w4a16 and w4a4, over whole held-out documents.

    python tools/tiny_model/perplexity.py            # table
    python tools/tiny_model/perplexity.py --json
    python tools/tiny_model/perplexity.py --scale-searches    # what each block-scale search of megamoe convert buys

Every document starts with BOS and is cut into windows of `--window` tokens; each window is one pass from an empty cache
and every token but the first of a window counts. The bf16 master is the recipe `exact` on the original weights.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import megamoe
from megamoe.checkpoint.overlay import write_overlay
from megamoe.formats.scale_search import ScaleSearch
from megamoe.models.deepseek_v4.convert import ConvertOptions, convert
from megamoe.models.load import BUNDLED
from megamoe.text.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent


def windows(path: pathlib.Path, tokenizer: Tokenizer, bos: int, eos: int, window: int) -> list[torch.Tensor]:
    """Return the held-out documents as token windows of at least two tokens."""
    parts: list[torch.Tensor] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([bos, *tokenizer.encode(json.loads(line)["text"]), eos])
        parts += [part for part in ids.split(window) if part.shape[0] > 1]
    return parts


def mean_loss(model: megamoe.models.deepseek_v4.model.Model, parts: list[torch.Tensor]) -> tuple[float, int]:
    """Return the mean negative log likelihood in nats per token, and the tokens counted."""
    total, count = 0.0, 0
    for ids in parts:
        logits = model.logits(ids[:-1])
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        count += ids.shape[0] - 1
    return total / count, count


def searched(master: pathlib.Path, work: pathlib.Path, recipes: list[str]) -> Iterator[tuple[str, pathlib.Path, str]]:
    """Yield the master converted with each search: a name that says its mean relative error, the folder, the recipe."""
    for search in ScaleSearch:
        options = ConvertOptions(experts="requantize", attention="nvfp4", draft="convert", scale_search=search)
        _, result = convert(master, work / search.value, options)
        error = sum(record["relative_l2"] for record in result.records) / len(result.records)
        for recipe in recipes:
            yield f"{search.value} (relative L2 {error:.4f}), {recipe}", work / search.value, recipe


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=0, help="0 means all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scale-searches", action="store_true", help="convert the bf16 master with each search")
    parser.add_argument("--recipes", default="exact,w4a4", help="for --scale-searches")
    arguments = parser.parse_args()

    model = megamoe.load("tiny")
    tokenizer = Tokenizer(BUNDLED["tiny"])
    parts = windows(
        HERE / "heldout.jsonl",
        tokenizer,
        model.config.bos_token_id,
        model.config.eos_token_ids[0],
        arguments.window,
    )
    if arguments.max_windows:
        parts = parts[: arguments.max_windows]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        master = pathlib.Path(work) / "master"
        write_overlay(BUNDLED["tiny"], HERE / "master", master)
        cases = [("bf16 master", master, "exact")]
        if arguments.scale_searches:
            cases += list(searched(master, pathlib.Path(work), arguments.recipes.split(",")))
        else:
            cases += [(f"NVFP4, {recipe}", BUNDLED["tiny"], recipe) for recipe in ("exact", "w4a16", "w4a4")]
        for name, directory, recipe in cases:
            started = time.perf_counter()
            loss, count = mean_loss(megamoe.load(directory, recipe=recipe), parts)
            rows.append(
                {
                    "weights": name,
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "tokens": count,
                    "seconds": time.perf_counter() - started,
                }
            )
    for row in rows:
        row["over_bf16_percent"] = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| weights, recipe | held-out loss (nats/token) | perplexity | over bf16 | tokens |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['weights']} | {row['loss']:.4f} | {row['perplexity']:.2f} | {row['over_bf16_percent']:+.2f} % "
            f"| {row['tokens']} |"
        )


if __name__ == "__main__":
    main()
