# SPDX-License-Identifier: Apache-2.0
"""A tokenizer and a model that cost nothing, for tests of what stands above the model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
import torch

from megamoe.cache.batch import Batch, Commit
from megamoe.cache.buckets import bucket_of
from megamoe.cache.pools import CacheSize, CapacityReport, LayerCacheSpec, capacity_report
from megamoe.formats.cache_rows import RowFormat

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


@dataclasses.dataclass(frozen=True, eq=False)
class FakePlan(Batch):
    """A batch, and whether it is a decode step."""

    bucket: int | None = None


class FakeSharedCache:
    """Keeps token ids where a model keeps rows: the newest in rings, all in pages. Mixing them up shows.

    As in a model, a step of more tokens of a sequence than its ring has to spare leaves only its last ones there, and a
    page boundary inside it is kept while it runs or never.
    """

    def __init__(self, size: CacheSize, num_snapshots: int) -> None:
        self.size = size
        self.capacity = FAKE_WINDOW + size.ring_tokens
        self.tables: list[list[int]] = [[] for _ in range(size.num_sequences)]
        self.rings = np.full((size.num_sequences, self.capacity), -1)
        self.pages = np.full((size.num_pages, size.tokens_per_page), -1)
        self.snapshots = np.full((num_snapshots, FAKE_WINDOW), -1)

    def set_pages(self, ring_idx: int, pages: Sequence[int], first: int = 0) -> None:
        assert first <= len(self.tables[ring_idx]), "a gap in the pages of a sequence"
        self.tables[ring_idx][first:] = pages

    def plan(self, batch: Batch) -> FakePlan:
        assert len(batch.token_ids) == batch.counts.sum() and (batch.counts > 0).all()
        assert len(set(batch.rings.tolist())) == len(batch.rings)
        longest, num_tokens = int(batch.counts.max()), len(batch.token_ids)
        assert longest <= self.size.ring_tokens or num_tokens <= self.size.step_tokens
        bucket = bucket_of(num_tokens) if longest <= self.size.ring_tokens else None
        return FakePlan(batch.token_ids, batch.starts, batch.counts, batch.rings, batch.saves, bucket)

    def finish(self, plan: FakePlan) -> None:
        assert plan.bucket is not None, "a step of its own shape keeps rows while it runs"
        for save in plan.saves:
            self.save(save.ring, save.length, save.snapshot_idx)

    def write(self, ring_idx: int, position: int, token_id: int) -> None:
        self.rings[ring_idx, position % self.capacity] = token_id
        page = self.tables[ring_idx][position // self.size.tokens_per_page]
        self.pages[page, position % self.size.tokens_per_page] = token_id

    def read(self, ring_idx: int, length: int) -> list[int]:
        size, pages = self.size.tokens_per_page, self.tables[ring_idx]
        split = max(0, length - FAKE_WINDOW)
        old = [int(self.pages[pages[at // size], at % size]) for at in range(split)]
        return old + [int(self.rings[ring_idx, at % self.capacity]) for at in range(split, length)]

    def save(self, ring_idx: int, length: int, snapshot_idx: int) -> None:
        assert length % self.size.tokens_per_page == 0
        self.snapshots[snapshot_idx] = self.rings[ring_idx, np.arange(length - FAKE_WINDOW, length) % self.capacity]

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        self.rings[ring_idx] = -2  # nothing of whoever had the ring before
        self.rings[ring_idx, np.arange(length - FAKE_WINDOW, length) % self.capacity] = self.snapshots[snapshot_idx]


FAKE_WINDOW = 3


class FakeDrafter:
    """Guesses what the model prefers, or something else at every `wrong_every`-th length. Checks what it is shown."""

    def __init__(self, model: FakeModel, cache: FakeSharedCache) -> None:
        self.model = model
        self.known: dict[int, list[int]] = {}  # by ring: all tokens before the newest
        self.saved: dict[int, list[int]] = {}

    def start(self, ring_idx: int) -> None:
        self.known[ring_idx] = []

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        self.known[ring_idx] = list(self.saved[snapshot_idx])
        assert len(self.known[ring_idx]) == length

    def observe(
        self, hidden: torch.Tensor, commit: Commit, num_tokens: int, choose: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        assert commit.counts.sum() == len(commit.rows) == len(commit.next_ids) and (commit.counts > 0).all()
        ends = commit.counts.cumsum()
        histories = []
        for idx, (ring, start, end) in enumerate(zip(commit.rings.tolist(), ends - commit.counts, ends, strict=True)):
            known = self.known[ring]
            assert len(known) == commit.starts[idx], "the drafter missed tokens, or saw some twice"
            next_ids = commit.next_ids[start:end].tolist()
            known += [int(commit.first_ids[idx]), *next_ids[:-1]]
            for save in commit.saves:
                if save.ring == ring:
                    assert len(known) >= save.length
                    self.saved[save.snapshot_idx] = known[: save.length]
            if commit.wants_drafts[idx]:
                histories.append([*known, next_ids[-1]])
        drafts = torch.empty(len(histories), num_tokens, dtype=torch.int64)
        for ahead in range(num_tokens if histories else 0):
            logits = torch.stack([self.model.draft_logits(history) for history in histories])
            drafts[:, ahead] = choose(logits, ahead)
            for history, token_id in zip(histories, drafts[:, ahead].tolist(), strict=True):
                history.append(token_id)
        return drafts


class FakeModel:
    """Prefers `rule(ids so far)` at every position, and keeps account of what it was asked.

    A rule may also return logits. Drafts are right but at every `wrong_every`-th length.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        rule: Callable[[list[int]], int | torch.Tensor] = next_after,
        config: FakeConfig | None = None,
        *,
        wrong_every: int = 3,
        tokens_per_page: int = 8,
    ) -> None:
        self.directory = directory
        self.rule = rule
        self.config = config or FakeConfig()
        self.wrong_every = wrong_every
        self.tokens_per_page = tokens_per_page
        self.recipe = FakeRecipe()
        self.device = torch.device("cpu")
        self.name = "fake"
        self.notes: tuple[str, ...] = ()
        self.conversions: tuple[str, ...] = ()
        self.load_seconds: dict[str, float] = {}
        self.steps: list[int] = []  # number of tokens of every call of run or step
        self.fed: list[list[int]] = []  # and the tokens

    def logits_after(self, ids: list[int]) -> torch.Tensor:
        """Return the logits [V] after `ids`."""
        wanted = self.rule(ids)
        if isinstance(wanted, torch.Tensor):
            return wanted
        logits = torch.zeros(self.config.vocab_size)
        logits[wanted] = 5.0
        return logits

    def draft_logits(self, ids: list[int]) -> torch.Tensor:
        """Return the drafter's logits [V] after `ids`."""
        return self.logits_after(ids).roll(1) if len(ids) % self.wrong_every == 0 else self.logits_after(ids)

    def new_cache(self, max_tokens: int) -> FakeCache:
        assert 1 <= max_tokens <= self.config.max_position_embeddings
        return FakeCache(max_tokens)

    def step(self, ids: torch.Tensor, cache: FakeCache) -> torch.Tensor:
        assert ids.dtype is torch.int64 and ids.ndim == 1
        self.steps.append(len(ids))
        self.fed.append(ids.tolist())
        logits = []
        for token_id in ids.tolist():
            cache.ids.append(token_id)
            assert len(cache.ids) <= cache.max_tokens
            logits.append(self.logits_after(cache.ids))
        return torch.stack(logits)

    def op_calls(self, *, with_drafts: bool) -> list[tuple[str, dict[str, int]]]:
        return [("rms_norm", {"K": 256})]

    def capacity(self, size: CacheSize, num_snapshots: int, *, with_drafts: bool) -> CapacityReport:
        spec = LayerCacheSpec(1, RowFormat.FP32, FAKE_WINDOW, ratio=1, index_width=1, index_format=RowFormat.FP32)
        return capacity_report([spec], size, num_snapshots)

    def new_shared_cache(
        self, size: CacheSize, num_snapshots: int, *, max_tokens: int, with_drafts: bool
    ) -> FakeSharedCache:
        return FakeSharedCache(size, num_snapshots)

    def new_drafter(self, cache: FakeSharedCache, num_tokens: int) -> FakeDrafter:
        return FakeDrafter(self, cache)

    def run(self, plan: FakePlan, cache: FakeSharedCache) -> torch.Tensor:
        self.steps.append(len(plan.token_ids))
        self.fed.append(plan.token_ids.tolist())
        logits, row = [], 0
        for ring, start, count in zip(plan.rings.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            for position in range(start, start + count):
                cache.write(ring, position, int(plan.token_ids[row]))
                logits.append(self.logits_after(cache.read(ring, position + 1)))
                for save in plan.saves:
                    if (save.ring, save.length) != (ring, position + 1):
                        continue
                    assert save.row == row, "a boundary names another row of the step"
                    if plan.bucket is None:
                        cache.save(ring, save.length, save.snapshot_idx)
                row += 1
        return torch.stack(logits)

    def decode(self, plan: FakePlan, cache: FakeSharedCache) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.run(plan, cache)
        return hidden, self.logits_of(hidden, None)

    def logits_of(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return hidden if rows is None else hidden[rows]
