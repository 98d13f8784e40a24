# SPDX-License-Identifier: Apache-2.0
"""megamoe bench engine: requests through an engine, as a server makes them, without the server.

For every batch so many requests with prompts of one length are added at once and run to their end. Time to first token
is from then to the step that brings a request's first token, so it includes waiting for the prompts ahead. Time per
token is from a request's first to its last token. Throughput is all new tokens over the time from start to end; decode
throughput leaves out the time until every request has its first token.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from megamoe.bench.step import write_csv
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.model import BatchModel
from megamoe.engine.request import NewRequest
from megamoe.engine.sampling_params import SamplingParams

HEADER = (
    "| batch | prompt | new | first token ms (median, last) | a token ms (median, worst) | tokens/s | decode only |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclasses.dataclass(frozen=True)
class EngineRow:
    """One batch.

    Attributes:
        batch, prompt_tokens, new_tokens: what was asked for.
        first_ms, last_first_ms: time to first token, the median request's and the last one's.
        token_ms, worst_token_ms: time per token, the median request's and the slowest one's.
        tokens_per_second, decode_tokens_per_second: of all requests.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    first_ms: float
    last_first_ms: float
    token_ms: float
    worst_token_ms: float
    tokens_per_second: float
    decode_tokens_per_second: float

    def line(self) -> str:
        """Return one line of the table."""
        return (
            f"| {self.batch} | {self.prompt_tokens} | {self.new_tokens} "
            f"| {self.first_ms:.1f}, {self.last_first_ms:.1f} "
            f"| {self.token_ms:.3f}, {self.worst_token_ms:.3f} | {self.tokens_per_second:,.1f} "
            f"| {self.decode_tokens_per_second:,.1f} |"
        )


def engine_config(
    model: BatchModel, num_sequences: int, num_tokens: int, chunk: int = EngineConfig.prefill_chunk
) -> EngineConfig:
    """Return a configuration in which so many sequences of so many tokens run at once, without a prefix cache.

    `chunk` is the most tokens of one prompt in a step.
    """
    return EngineConfig(
        max_sequences=num_sequences,
        max_waiting=num_sequences,
        max_step_tokens=max(EngineConfig.max_step_tokens, num_sequences + chunk),
        prefill_chunk=chunk,
        num_pages=num_sequences * -(-num_tokens // model.tokens_per_page),
        max_sequence_tokens=min(num_tokens, model.config.max_position_embeddings),
        prefix_cache=False,
    )


def measure(engine: Engine, batch: int, prompt_tokens: int, new_tokens: int) -> EngineRow:
    """Run one batch to its end.

    Raises:
        ValueError: a request does not fit the engine.
    """
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    vocab_size = engine.model.config.vocab_size
    requests = [
        NewRequest(
            f"{number}", [(number * 65537 + place * 7919 + 1) % vocab_size for place in range(prompt_tokens)], params
        )
        for number in range(batch)
    ]
    times: dict[str, list[float]] = {request.request_id: [] for request in requests}
    start = time.perf_counter()
    engine.add_all(requests)
    while engine.has_work():
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
            times[output.request_id] += [now] * len(output.token_ids)
    end = time.perf_counter() - start
    firsts = sorted(one[0] for one in times.values())
    per_token = sorted((one[-1] - one[0]) / max(1, len(one) - 1) for one in times.values())
    total = sum(map(len, times.values()))
    after = sum(sum(moment > firsts[-1] for moment in one) for one in times.values())
    return EngineRow(
        batch,
        prompt_tokens,
        new_tokens,
        1e3 * statistics.median(firsts),
        1e3 * firsts[-1],
        1e3 * statistics.median(per_token),
        1e3 * per_token[-1],
        total / end,
        after / (end - firsts[-1]) if end > firsts[-1] else 0.0,
    )


def run(
    engine: Engine,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    csv_path: pathlib.Path | None,
    about: dict[str, Any],
    as_json: bool,
) -> int:
    """Measure every batch and print; the last line is JSON.

    Raises:
        ValueError: a request does not fit the engine.
    """
    found = []
    if not as_json:
        print(HEADER)
    for batch in batches:
        found.append(measure(engine, batch, prompt_tokens, new_tokens))
        engine.reset_prefix_cache()
        if not as_json:
            print(found[-1].line(), flush=True)
    rows = [
        {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(one).items()
        }
        for one in found
    ]
    if csv_path is not None:
        write_csv(csv_path, rows)
    print(json.dumps({**about, "engine": rows}))
    return 0
