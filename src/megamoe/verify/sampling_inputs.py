# SPDX-License-Identifier: Apache-2.0
"""How the operations over logits are called."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megamoe.ops.penalize import penalize
from megamoe.ops.sample import sample
from megamoe.ops.token_logprobs import token_logprobs
from megamoe.verify.op_inputs import Arguments, OpInputs, scaled

PAIRS = 5  # penalized tokens of a row
NUM_TOP = 5


def _logits(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return logits with ties, the largest one included, and with tokens that are not allowed."""
    logits = scaled(generator, num_tokens, dims["V"], scale=4.0)
    logits[:, 3::5] = -torch.inf
    middle = dims["V"] // 2
    logits[:, middle : middle + 50] = logits[:, :50]
    logits[1::3, 11] = logits[1::3, 40] = 30.0
    return logits


def _sample(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """Return arguments of rows that take the best token, cut by top_k, by top_p, or not at all."""
    device = generator.device
    temperature = torch.rand(num_tokens, generator=generator, device=device) + 0.3
    temperature[3::4] = 0.0
    top_k = torch.randint(1, 60, (num_tokens,), generator=generator, device=device)
    top_k[0::3] = 0
    top_p = torch.rand(num_tokens, generator=generator, device=device) * 0.9 + 0.1
    top_p[0::5] = 1.0
    return {
        "logits": _logits(dims, num_tokens, generator),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "uniform": torch.rand(num_tokens, generator=generator, device=device),
    }


def _sample_min_p(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    min_p = torch.rand(num_tokens, generator=generator, device=generator.device) * 0.2
    min_p[0::2] = 0.0
    return {**_sample(dims, num_tokens, generator), "min_p": min_p}


def _penalize(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    device, vocab_size = generator.device, dims["V"]
    first = torch.randint(vocab_size, (num_tokens, 1), generator=generator, device=device)
    token_ids = (first + torch.arange(PAIRS, device=device) * (vocab_size // (PAIRS + 2))) % vocab_size
    counts = torch.randint(4, (num_tokens * PAIRS,), generator=generator, device=device).float()
    repetition = torch.rand(num_tokens, generator=generator, device=device) + 0.5
    repetition[2::4] = 1.0
    return {
        "logits": scaled(generator, num_tokens, vocab_size, scale=4.0),
        "row_idx": torch.arange(num_tokens, device=device).repeat_interleave(PAIRS),
        "token_ids": token_ids.flatten(),
        "counts": counts,
        "repetition": repetition,
        "presence": scaled(generator, num_tokens, scale=0.5),
        "frequency": scaled(generator, num_tokens, scale=0.5),
    }


def fewer_pairs(arguments: Arguments, index: torch.Tensor) -> Arguments:
    """Return the pairs of some rows, under the numbers that those rows have among themselves."""
    row_idx = arguments["row_idx"]
    place = torch.full((arguments["logits"].shape[0],), -1, dtype=torch.int64, device=row_idx.device)
    place[index.to(row_idx.device)] = torch.arange(len(index), device=row_idx.device)
    rows = place[row_idx]
    is_kept = rows >= 0
    kept = {name: arguments[name][is_kept] for name in ("token_ids", "counts")}
    return {"row_idx": rows[is_kept], **kept}


def _token_logprobs(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "logits": _logits(dims, num_tokens, generator),
        "token_ids": torch.randint(dims["V"], (num_tokens,), generator=generator, device=generator.device),
        "num_top": NUM_TOP,
    }


_PER_ROW = ("logits", "temperature", "top_k", "top_p", "uniform")
SAMPLING_INPUTS: dict[str, tuple[OpInputs, ...]] = {
    "sample": (
        OpInputs(sample, _sample, _PER_ROW),
        OpInputs(sample, _sample_min_p, (*_PER_ROW, "min_p")),
    ),
    "penalize": (
        OpInputs(
            penalize,
            _penalize,
            ("logits", "repetition", "presence", "frequency"),
            written=("logits",),
            cut=fewer_pairs,
            partly=("logits",),
            partly_bytes=lambda arguments: 2 * 4 * int(arguments["row_idx"].shape[0]),  # read and written
        ),
    ),
    "token_logprobs": (OpInputs(token_logprobs, _token_logprobs, ("logits", "token_ids")),),
}
"""Operation → the ways it is called."""
