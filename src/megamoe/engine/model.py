# SPDX-License-Identifier: Apache-2.0
"""What the engine needs of a model, and the way to get one.

The engine drives any architecture through this protocol; it never looks inside a model or its cache.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, Protocol

import torch


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
    def notes(self) -> tuple[str, ...]:
        """What its checkpoint holds and it does not use, one line each."""
        ...

    def new_cache(self, max_tokens: int) -> Any:
        """Return an empty cache for one sequence."""
        ...

    def step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append `ids` (int64 [T]) to the cached sequence and return their logits (fp32 [T, V])."""
        ...


def load_model(
    model: str | os.PathLike[str], *, recipe: str, device: str | torch.device, dtype: torch.dtype | None
) -> LanguageModel:
    """Load a model; arguments and errors are those of `megamoe.load`."""
    from megamoe.models.load import load  # imported late: importing the engine loads no architecture

    return load(model, recipe=recipe, device=device, dtype=dtype)
