# SPDX-License-Identifier: Apache-2.0
"""A tokenizer and a model that cost nothing, for tests of what stands above the model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import tokenizers
import torch

BOS, EOS, THINK = 0, 1, 2
BYTES = 3  # ids 3 to 258 are the 256 bytes, in the order of the byte-level alphabet
TRAINING_TEXT = ["def add(self, other):\n    return self.value + other.value\n", "naïve café, Größe, 日本語, 😀 👩‍💻"]


def write_tokenizer(directory: pathlib.Path) -> None:
    """Write a small byte-level tokenizer.json: two special tokens, one added token, 256 bytes, some merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<think>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    content = tokenizer.to_str().replace(
        '"content":"<think>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true',
        '"content":"<think>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":false',
    )
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """The fields that text generation reads."""

    vocab_size: int = 330  # more than the tokenizer has, as in released models
    bos_token_id: int | None = BOS
    eos_token_ids: tuple[int, ...] = (EOS,)
    max_position_embeddings: int = 64


@dataclasses.dataclass(frozen=True)
class FakeRecipe:
    """A recipe's name."""

    name: str = "w4a16"


@dataclasses.dataclass
class FakeCache:
    """Remembers the sequence and refuses more than it was made for."""

    max_tokens: int
    ids: list[int] = dataclasses.field(default_factory=list)


def next_after(ids: list[int]) -> int:
    """Return the id the default FakeModel prefers after `ids`: it depends on all of them and is never special."""
    return BYTES + (31 * sum(ids) + 7 * len(ids)) % 256


class FakeModel:
    """Prefers `rule(ids so far)` at every position, and keeps account of what it was asked."""

    def __init__(
        self,
        directory: pathlib.Path,
        rule: Callable[[list[int]], int] = next_after,
        config: FakeConfig | None = None,
    ) -> None:
        self.directory = directory
        self.rule = rule
        self.config = config or FakeConfig()
        self.recipe = FakeRecipe()
        self.device = torch.device("cpu")
        self.name = "fake"
        self.notes: tuple[str, ...] = ()
        self.caches: list[FakeCache] = []
        self.steps: list[int] = []

    def new_cache(self, max_tokens: int) -> FakeCache:
        assert 1 <= max_tokens <= self.config.max_position_embeddings
        self.caches.append(FakeCache(max_tokens))
        return self.caches[-1]

    def step(self, ids: torch.Tensor, cache: FakeCache) -> torch.Tensor:
        assert ids.dtype is torch.int64 and ids.ndim == 1
        self.steps.append(len(ids))
        logits = torch.zeros(len(ids), self.config.vocab_size)
        for position, token_id in enumerate(ids.tolist()):
            cache.ids.append(token_id)
            assert len(cache.ids) <= cache.max_tokens
            logits[position, self.rule(cache.ids)] = 5.0
        return logits
