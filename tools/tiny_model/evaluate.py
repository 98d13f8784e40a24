# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint of the tiny model on held-out text.

    python evaluate.py --checkpoint <ckpt.pt or export folder> --data <work folder of data.py> [--json out.json]

Prints and optionally writes as JSON, all over the same held-out tokens (rows of 2048, each starting with BOS):

- next-token loss and perplexity when ratio-4 layers attend to the indexer's top-k, to as many random visible entries,
  to all visible entries, and when no layer sees any compressed entry; and the top-k case with fake quantisation
- the same for positions whose ratio-4 entries exceed the top-k (where the choice matters)
- unigram and interpolated Kneser-Ney trigram baselines fitted on the training tokens
- MTP: how often its top-1 equals the main model's top-1 for the same token, and its loss
- two short generations
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from export_master import HERE
from model import Config, Mode, Model
from train import Batches

CONTEXT = 2048
DISCOUNT = 0.75
PROMPTS = ("import os\n\n\ndef ", "The :mod:`json` module ")


def load_model(path: Path) -> Model:
    """Read a training checkpoint or an export folder into an fp32 model."""
    model = Model(Config.load(HERE / "config.json"))
    if path.is_dir():
        state = load_file(path / "model.safetensors")
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    model.load_state_dict(state)
    return model.eval()


class Counts:
    """Occurrences of integer keys, looked up in bulk."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Counts of the given keys, 0 where unseen."""
        index = np.minimum(np.searchsorted(self.keys, keys), self.keys.size - 1)
        return np.where(self.keys[index] == keys, self.counts[index], 0).astype(np.float64)


def baseline_losses(train: np.ndarray, rows: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Mean loss in nats of n-gram models fitted on `train`, over the tokens rows[:, 1:-1] with their true contexts."""
    stream = train.astype(np.int64)
    pair_keys = stream[:-1] * vocab_size + stream[1:]
    triple_keys = pair_keys[:-1] * vocab_size + stream[2:]
    unigram, triples = Counts(stream), Counts(triple_keys)
    contexts = Counts(pair_keys)
    pair_types = np.unique(pair_keys)
    triple_types = triples.keys
    followers_of_pair = Counts(triple_types // vocab_size)  # distinct w after (u, v)
    pair_continuations = Counts(triple_types % vocab_size**2)  # distinct u before (v, w)
    middle_types = pair_continuations.keys
    continuation_total = np.bincount(triple_types // vocab_size % vocab_size, minlength=vocab_size)  # distinct (u, w)
    followers_of_middle = np.bincount(middle_types // vocab_size, minlength=vocab_size)
    word_continuations = np.bincount(pair_types % vocab_size, minlength=vocab_size)  # distinct v before w

    word = rows[:, 1:-1]
    before = rows[:, :-2]
    before2 = np.concatenate([np.full_like(before[:, :1], -1), before[:, :-1]], 1)
    word, before, before2 = word.ravel(), before.ravel(), before2.ravel()
    p_uniform = 1.0 / vocab_size
    p_unigram = (unigram(word) + 1.0) / (stream.size + vocab_size)
    p1 = np.maximum(word_continuations[word] - DISCOUNT, 0) / pair_types.size
    p1 = p1 + DISCOUNT * np.count_nonzero(word_continuations) / pair_types.size * p_uniform

    def interpolate(count: np.ndarray, total: np.ndarray, followers: np.ndarray, lower: np.ndarray) -> np.ndarray:
        safe = np.maximum(total, 1)
        mixed = np.maximum(count - DISCOUNT, 0) / safe + DISCOUNT * followers / safe * lower
        return np.where(total > 0, mixed, lower)

    pair = before * vocab_size + word
    p2 = interpolate(
        pair_continuations(pair),
        continuation_total[before].astype(float),
        followers_of_middle[before].astype(float),
        p1,
    )
    context = before2 * vocab_size + before
    known = before2 >= 0
    total = np.where(known, contexts(context), 0.0)
    p3 = interpolate(triples(context * vocab_size + word), total, followers_of_pair(context), p2)
    return {"unigram": float(-np.log(p_unigram).mean()), "trigram_kneser_ney": float(-np.log(p3).mean())}


@torch.no_grad()
def token_losses(model: Model, rows: torch.Tensor, mode: Mode) -> torch.Tensor:
    """Loss of every token rows[:, 1:-1]. [B, T]"""
    out = []
    for row in rows.split(1):
        logits = model.logits(row[:, :-2], mode)
        out.append(F.cross_entropy(logits.transpose(1, 2), row[:, 1:-1], reduction="none"))
    return torch.cat(out)


@torch.no_grad()
def mtp_agreement(model: Model, rows: torch.Tensor) -> dict[str, float]:
    """Teacher-forced: does the MTP layer's top-1 equal the main model's, and its loss on the true token."""
    same, right, loss, count = 0, 0, 0.0, 0
    for row in rows.split(1):
        mode = Mode(select="topk")
        ids, labels = row[:, :-2], row[:, 1:-1]
        streams = model.streams(ids, mode)
        main = F.linear(model.collapse(streams, model.config), model.head.weight).argmax(-1)  # token i+1 from i
        hidden = model.mtp[0].hidden(streams, F.embedding(labels, model.embed.weight), labels, mode)
        logits = F.linear(hidden, model.head.weight)  # token i+2 from i
        draft = logits.argmax(-1)[:, :-1]
        same += (draft == main[:, 1:]).sum().item()
        right += (draft == row[:, 2:-1]).sum().item()
        loss += F.cross_entropy(logits[0, :-1], row[0, 2:-1], reduction="sum").item()
        count += draft.numel()
    return {"top1_equals_main": same / count, "top1_equals_text": right / count, "loss": loss / count}


@torch.no_grad()
def generate(model: Model, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float) -> str:
    """Continue a prompt; recomputes the whole sequence for every token."""
    generator = torch.Generator().manual_seed(0)
    ids = [0, *tokenizer.encode(prompt).ids]
    for _ in range(num_tokens):
        logits = model.logits(torch.tensor([ids]), Mode(select="topk"))[0, -1]
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == 1:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load_model(args.checkpoint)
    config = model.config
    heldout = np.fromfile(args.data / "heldout.bin", dtype=np.uint16)
    rows = Batches(heldout, CONTEXT, seed=1).rows(0, min(args.rows, (heldout.size - CONTEXT - 2) // CONTEXT))
    result: dict[str, object] = {"checkpoint": args.checkpoint.name, "rows": len(rows), "context": CONTEXT}
    result["tokens"] = rows[:, 1:-1].numel()

    cases = {name: Mode(select=name) for name in ("topk", "random", "all", "none")}
    cases["topk, fake-quantised"] = Mode(select="topk", quantized=True)
    first_dropped = 4 * (config.index_topk + 1) - 1  # first query that sees more entries than the top-k keeps
    losses = {}
    for name, mode in cases.items():
        per_token = token_losses(model, rows, mode)
        loss, late = per_token.mean().item(), per_token[:, first_dropped:].mean().item()
        losses[name] = {"loss": loss, "perplexity": math.exp(loss), "loss_where_entries_drop": late}
        print(
            f"{name:22s} loss {loss:.4f}  perplexity {math.exp(loss):8.3f}  where entries drop {late:.4f}", flush=True
        )
    result["model"] = losses
    train = np.fromfile(args.data / "train.bin", dtype=np.uint16)
    baselines = baseline_losses(train, rows.numpy(), config.vocab_size)
    for name, loss in baselines.items():
        print(f"{name:22s} loss {loss:.4f}  perplexity {math.exp(loss):8.3f}", flush=True)
    result["baselines"] = {name: {"loss": loss, "perplexity": math.exp(loss)} for name, loss in baselines.items()}
    result["mtp"] = mtp_agreement(model, rows)
    print("mtp", json.dumps(result["mtp"]), flush=True)
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    result["samples"] = [
        generate(model, tokenizer, prompt, 96, t) for prompt, t in zip(PROMPTS, (0.0, 0.7), strict=True)
    ]
    for text in result["samples"]:
        print("-" * 40, text, sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
