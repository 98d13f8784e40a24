# SPDX-License-Identifier: Apache-2.0
"""How often a draft is right: in the engine, and against what other ways of accepting would give.

    OMP_NUM_THREADS=1 python tools/draft_acceptance.py

First table: the engine over prompts cut from a text, acceptance and steps saved. Second table: model and drafter over
the same text, position by position; p is the model's distribution and q the drafter's. `best guess` drafts the most
probable token of q, which is what the engine does; `same number` draws draft and token by one random number;
`rejection` draws the draft from q by a number of its own and accepts as often as any scheme can: sum of min(p, q). The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import torch

import megamoe
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.ops.sample import sample
from megamoe.text.tokenizer import Tokenizer

TEMPERATURES = (0.0, 0.7, 1.0)


def engine_acceptance(
    model: Any, ids: list[int], num_drafts: int, temperature: float, batch: int
) -> tuple[float, float, float]:
    """Return (share of drafts that were right, tokens per sequence and step, processor seconds per token)."""
    engine = Engine(model, EngineConfig(speculative_tokens=num_drafts, num_pages=64))
    steps = tokens = 0
    for idx in range(batch):
        prompt = [0, *ids[idx * 40 : idx * 40 + 60]]
        params = SamplingParams(max_tokens=64, temperature=temperature, seed=idx, ignore_eos=True)
        engine.add(str(idx), prompt, params)
    engine.step()  # the prompts
    start = time.process_time()
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error
            steps += 1
            tokens += len(output.token_ids)
    return engine.stats().acceptance_rate, tokens / steps, (time.process_time() - start) / tokens


@torch.inference_mode()
def scheme_acceptance(model: Any, ids: list[int], temperature: float) -> dict[str, float]:
    """Return the expected acceptance of one draft at the positions of a text."""
    cache = model.new_cache(max_tokens=len(ids))
    streams, p, q = [], [], []
    for chunk in torch.tensor(ids).split(128):
        streams.append(model.advance(chunk, cache))
        p.append(model.head(streams[-1]))
    start = 0
    for part in streams:
        following = torch.tensor(ids[start + 1 : start + 1 + len(part)])
        q.append(model.draft(part[: len(following)], following, cache)[0])
        start += len(part)
    target, draft = torch.cat(p)[1:], torch.cat(q)  # both guess the token after the same prefix
    if temperature == 0:
        same = float((target.argmax(1) == draft.argmax(1)).float().mean())
        return {"best guess": same, "same number": same, "rejection": same}
    one = torch.ones(len(target))
    agree, generator = 0.0, torch.Generator().manual_seed(0)
    for _ in range(16):
        options = {
            "temperature": one * temperature,
            "top_k": one.long() * 0,
            "top_p": one,
            "uniform": torch.rand(len(target), generator=generator),
        }
        agree += float((sample(target, **options) == sample(draft, **options)).float().mean()) / 16
    target, draft = (target / temperature).softmax(1), (draft / temperature).softmax(1)
    return {
        "best guess": float(target.gather(1, draft.argmax(1, keepdim=True)).mean()),
        "same number": agree,
        "rejection": float(torch.minimum(target, draft).sum(1).mean()),
    }


def main() -> None:
    """Print both tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--text", type=pathlib.Path, help="a text file; default: the sample beside the weights")
    arguments = parser.parse_args()
    model = megamoe.load(arguments.model, recipe=arguments.recipe)
    path = arguments.text or model.directory / "sample.txt"
    ids = Tokenizer(model.directory).encode(path.read_text(encoding="utf-8"))[:450]
    result: dict[str, dict[str, float]] = {}
    print(f"model {model.name}, recipe {model.recipe.name}, {len(ids)} tokens of {path.name}")
    print("| batch | drafts a step | temperature | right | tokens per step | ms per token |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch, num_drafts in ((1, 0), (1, 1), (1, 2), (8, 0), (8, 1), (8, 2), (8, 3)):
        for temperature in TEMPERATURES:
            right, speed, seconds = engine_acceptance(model, ids, num_drafts, temperature, batch)
            result[f"batch {batch}, {num_drafts} drafts, {temperature}"] = {
                "right": round(right, 3),
                "tokens": round(speed, 2),
                "ms": round(seconds * 1e3, 1),
            }
            print(f"| {batch} | {num_drafts} | {temperature} | {right:.1%} | {speed:.2f} | {seconds * 1e3:.1f} |")
    print("\n| temperature | best guess | same number | rejection |\n| --- | --- | --- | --- |")
    for temperature in TEMPERATURES:
        found = scheme_acceptance(model, [0, *ids], temperature)
        result[f"schemes {temperature}"] = {name: round(value, 3) for name, value in found.items()}
        print(f"| {temperature} | " + " | ".join(f"{value:.1%}" for value in found.values()) + " |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
