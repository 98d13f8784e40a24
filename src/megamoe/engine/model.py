# SPDX-License-Identifier: Apache-2.0
"""What the engine needs of a model, and the way to get one.

The engine drives any architecture through this protocol; it never looks inside a model or its cache.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megamoe.cache.batch import Batch
from megamoe.cache.pools import CacheSize, CapacityReport
from megamoe.engine.drafter import Drafter

if TYPE_CHECKING:  # config.py needs BatchModel
    from megamoe.engine.config import EngineConfig


class NamedRecipe(Protocol):
    """The numeric choices of a forward pass, by name."""

    @property
    def name(self) -> str:
        """What users type and what records store."""
        ...


class LanguageModelConfig(Protocol):
    """The configuration fields that generating text depends on."""

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The id every sequence starts with, if the model has one."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """The context: most tokens a cache can hold."""
        ...


class LanguageModel(Protocol):
    """A loaded model."""

    @property
    def config(self) -> LanguageModelConfig:
        """Its configuration."""
        ...

    @property
    def recipe(self) -> NamedRecipe:
        """Its numeric choices."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights, caches and logits live."""
        ...

    @property
    def name(self) -> str:
        """What it was loaded as."""
        ...

    @property
    def directory(self) -> pathlib.Path:
        """Its checkpoint's directory."""
        ...

    @property
    def load_seconds(self) -> Mapping[str, float]:
        """Phase of loading → how long it took."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What its checkpoint holds and it does not use, one line each."""
        ...

    def new_cache(self, max_tokens: int) -> Any:
        """Return an empty cache for one sequence."""
        ...

    def step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append `ids` (int64 [T]) to the cached sequence and return their logits (fp32 [T, V])."""
        ...


class StepPlan(Protocol):
    """What a cache and its model say to each other about a step."""

    @property
    def bucket(self) -> int | None:
        """The number of its tokens, nobody's included, if all plans of as many have one set of shapes and addresses.

        `BatchModel.decode` takes these, and what it does on the device for one serves for all others. None for a step
        of its own shape.
        """
        ...


class SharedCache(Protocol):
    """The storage of all sequences. Ring and page numbers are the engine's; what lies behind them is the model's."""

    def set_pages(self, ring_idx: int, pages: Sequence[int], first: int = 0) -> None:
        """Say which pages the sequence of a ring has, from its page `first` on; it has no more than these."""
        ...

    def plan(self, batch: Batch) -> StepPlan:
        """Return what a model needs to know of a step, on its way to the device; the next call overwrites it."""
        ...

    def finish(self, plan: Any) -> None:
        """Keep the rows at the page boundaries of a step (`Batch.saves`) that has run."""
        ...

    def save(self, ring_idx: int, length: int, snapshot_idx: int) -> None:
        """Keep what continues a sequence of `length` tokens (whole pages), the end of which ran in the last step."""
        ...

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Let a ring continue where `save` was called with the same length."""
        ...


class BatchModel(LanguageModel, Protocol):
    """A loaded model that runs many sequences in one step.

    What a token gets must not depend on the other tokens of a step: the engine's promise that a request's tokens are
    the same in any company rests on it.
    """

    @property
    def tokens_per_page(self) -> int:
        """The page the model would choose; other pages must be multiples of the same unit."""
        ...

    @property
    def conversions(self) -> tuple[str, ...]:
        """What was converted when it was loaded, one line each."""
        ...

    def op_calls(self, *, with_drafts: bool) -> Sequence[tuple[str, Mapping[str, int]]]:
        """Return every operation it calls, with the sizes of its named dimensions."""
        ...

    def capacity(self, size: CacheSize, num_snapshots: int, *, with_drafts: bool) -> CapacityReport:
        """Return what a shared cache would cost."""
        ...

    def new_shared_cache(
        self, size: CacheSize, num_snapshots: int, *, max_tokens: int, with_drafts: bool
    ) -> SharedCache:
        """Return empty storage for many sequences of at most `max_tokens` tokens, drafts included."""
        ...

    def run(self, plan: Any, cache: Any) -> Any:
        """Run the tokens of a step, from its plan as it was sent.

        A step without a bucket keeps the rows at its page boundaries (`Batch.saves`) on the way.

        Returns:
            What `logits_of` and the drafter read: one row per token, and rows of nobody after them.
        """
        ...

    def decode(self, plan: Any, cache: Any) -> tuple[Any, torch.Tensor]:
        """Run a step that has a bucket: the same launches on the same addresses for all steps of its bucket.

        It asks the device nothing, and whatever depends on the tokens is read on the device.

        Returns:
            What `run` does, and fp32 logits [T, V] of every token, nobody's included.
        """
        ...

    def logits_of(self, hidden: Any, rows: torch.Tensor | None) -> torch.Tensor:
        """Return fp32 logits [N, V] of some rows (int64 [N]) of what `run` returned, or of all."""
        ...

    def new_drafter(self, cache: Any, num_tokens: int) -> Drafter:
        """Return the checkpoint's drafter for up to `num_tokens` tokens a step.

        Raises:
            ValueError: the checkpoint has no draft weights, or drafts fewer tokens.
        """
        ...


def model_directory(model: str | os.PathLike[str], load_format: str = "safetensors") -> pathlib.Path:
    """Return where a model's files lie, before it is loaded; errors are those of `megamoe.load`."""
    from megamoe.models import find_checkpoint  # imported late: importing the engine loads no architecture
    from megamoe.models.deepseek_v4.dummy import dummy_directory
    from megamoe.models.deepseek_v4.examine import refuse_stopped

    if load_format == "dummy":
        return dummy_directory(os.fspath(model))
    directory = find_checkpoint(model, "load")
    refuse_stopped(directory)
    return directory


def load_model(
    model: str | os.PathLike[str],
    *,
    recipe: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    pack: str | os.PathLike[str] | None = None,
    accept: Iterable[str] = (),
    memory: tuple[int, EngineConfig] | None = None,
    load_format: str = "safetensors",
    num_layers: int | None = None,
) -> BatchModel:
    """Load a model; arguments and errors are those of `megamoe.load`.

    `memory` is the device memory for everything, and the engine that it has to hold beside the weights.
    """
    from megamoe.models.load import load  # imported late: importing the engine loads no architecture
    from megamoe.models.room import Budget

    budget = None
    if memory is not None:
        num_bytes, config = memory
        each, per_page = 1 + config.speculative_tokens, config.tokens_per_page
        budget = Budget(num_bytes, config.max_sequences, each, config.step_tokens, per_page)
    return load(
        model,
        recipe=recipe,
        device=device,
        dtype=dtype,
        pack=pack,
        accept=accept,
        budget=budget,
        load_format=load_format,
        num_layers=num_layers,
    )
