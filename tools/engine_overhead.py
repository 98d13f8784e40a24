# SPDX-License-Identifier: Apache-2.0
"""What a decode step costs beside the model: the engine's own Python, and batch 8 against batch 1.

    OMP_NUM_THREADS=1 python tools/engine_overhead.py

The engine's own part is everything in `Engine.step` but the model's forward pass, its logits and the sampling
operation: scheduling, the plan of the step, random numbers, outputs, bookkeeping. Processor time of this process,
medians of steps; batch sizes take turns, so that whatever else the machine does meets all of them. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import megamoe
from megamoe.engine import sampler
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams

NUM_PROMPT = 200


class Stopwatch:
    """Adds up the processor time spent inside wrapped functions."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.spent_s += time.process_time() - start

        return timed


class NoModel:
    """Stands for a model whose forward pass costs nothing; caches and plans are the real ones."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._logits = torch.zeros(64, model.config.vocab_size)
        self._logits[:, 7] = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, plan: Any, cache: Any) -> torch.Tensor:
        """Return nothing of interest."""
        return plan.positions

    def logits_of(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Return logits that prefer token 7."""
        return self._logits[: len(hidden) if rows is None else len(rows)]


def make_engine(model: Any, batch: int, *, temperature: float = 0.0, num_drafts: int = 0) -> Engine:
    """Return an engine with `batch` sequences that decode."""
    engine = Engine(model, EngineConfig(max_sequences=batch, speculative_tokens=num_drafts, num_pages=40 * batch))
    generator = torch.Generator().manual_seed(batch)
    for idx in range(batch):
        prompt = [0, *torch.randint(2, model.config.vocab_size, (NUM_PROMPT + idx,), generator=generator).tolist()]
        params = SamplingParams(max_tokens=5000, temperature=temperature, seed=idx, ignore_eos=True)
        engine.add(str(idx), prompt, params)
    while engine.stats().generated_tokens < batch:
        engine.step()
    for _ in range(5):
        engine.step()
    return engine


def step_seconds(engines: dict[int, Engine], rounds: int) -> dict[int, list[float]]:
    """Return the processor time of every step, batch sizes taking turns."""
    seconds: dict[int, list[float]] = {batch: [] for batch in engines}
    for _ in range(rounds):
        for batch, engine in engines.items():
            start = time.process_time()
            engine.step()
            seconds[batch].append(time.process_time() - start)
    return seconds


def overhead_seconds(model: Any, batch: int, rounds: int, temperature: float) -> float:
    """Return the engine's own seconds per step: the step without the model and without the sampling operation."""
    engine = make_engine(NoModel(model), batch, temperature=temperature)
    watch, original = Stopwatch(), sampler.sample
    sampler.sample = watch.wrap(original)  # type: ignore[assignment]
    try:
        own = []
        for _ in range(rounds):
            watch.spent_s, start = 0.0, time.process_time()
            engine.step()
            own.append(time.process_time() - start - watch.spent_s)
    finally:
        sampler.sample = original
    return statistics.median(own)


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--rounds", type=int, default=60, help="decode steps per batch size")
    parser.add_argument("--profile", action="store_true", help="show where the engine's own time goes")
    arguments = parser.parse_args()
    model = megamoe.load(arguments.model, recipe=arguments.recipe)
    gc.collect()
    gc.freeze()  # as `megamoe serve` does
    batches = (1, 2, 4, 8)
    own = {
        (batch, kind): overhead_seconds(model, batch, 400, temperature)
        for batch in batches
        for kind, temperature in (("greedy", 0.0), ("sampled", 0.8))
    }
    steps = step_seconds({batch: make_engine(model, batch) for batch in batches}, arguments.rounds)
    medians = {batch: statistics.median(times) for batch, times in steps.items()}
    speed = {batch: batch / seconds for batch, seconds in medians.items()}
    print(f"model {model.name}, recipe {model.recipe.name}, {torch.get_num_threads()} thread(s), processor time")
    print("| batch | step, ms | tokens/s | against batch 1 | engine's own, greedy | sampled, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in batches:
        print(
            f"| {batch} | {medians[batch] * 1e3:.1f} | {speed[batch]:.0f} | {speed[batch] / speed[1]:.2f}x "
            f"| {own[batch, 'greedy'] * 1e6:.0f} | {own[batch, 'sampled'] * 1e6:.0f} |"
        )
    if arguments.profile:
        engine = make_engine(NoModel(model), 8)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(400):
            engine.step()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    result = {
        "tokens_per_second": {str(batch): round(value, 1) for batch, value in speed.items()},
        "batch_8_over_1": round(speed[8] / speed[1], 2),
        "engine_us_per_step": {f"{batch}_{kind}": round(value * 1e6) for (batch, kind), value in own.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
