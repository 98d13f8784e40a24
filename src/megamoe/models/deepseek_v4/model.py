# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4: embedding, streams, blocks, head; prefill, decode and any chunking through one function.

`forward` is stateless: it takes a plan (token ids, positions, slots) and pools and works on any number of sequences.
`step` is the single-sequence convenience around it that owns a `Cache` and advances it.

Source     DeepSeek-V4 technical report (arXiv 2606.19348) and its inference code; docs/architecture.md
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import torch

from megamoe.cache.pools import CacheSize, CapacityReport, LayerPools, capacity_report
from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.cache import (
    MAX_CHUNK,
    Cache,
    SharedCache,
    backbone_specs,
    layer_cache_spec,
    tokens_per_page,
)
from megamoe.models.deepseek_v4.calls import model_calls, pairs
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.dspark import DSpark
from megamoe.models.deepseek_v4.dspark_drafter import DSparkDrafter, Tapped
from megamoe.models.deepseek_v4.hyper_connection import Unmixed, head_input
from megamoe.models.deepseek_v4.mtp import MtpStage
from megamoe.models.deepseek_v4.mtp_drafter import MtpDrafter
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import ModelWeights
from megamoe.models.recipe import Recipe
from megamoe.models.room import no_room_is_told
from megamoe.ops.embed_streams import embed_streams
from megamoe.ops.linear import linear
from megamoe.ops.rope import rope_table
from megamoe.ops.streams import mean_of_streams


class Model:
    """A loaded DeepSeek-V4.

    Attributes:
        config: the checkpoint's configuration.
        recipe: the numeric choices of every forward pass.
        weights: frozen weights.
        device: where weights, caches and logits live.
        name: what the model was loaded as.
        directory: the checkpoint's directory (tokenizer.json is there).
        load_seconds: phase of loading → how long it took, in order.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        recipe: Recipe,
        device: torch.device,
        *,
        name: str,
        directory: pathlib.Path,
        warnings: tuple[str, ...] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Build blocks over the weights; allocates rotary tables only.

        `warnings` are what loading warned about, `seconds` how long its phases took.
        """
        self.config = config
        self.weights = weights
        self.recipe = recipe
        self.device = device
        self.name = name
        self.directory = directory
        self._warnings = warnings
        self.load_seconds = dict(seconds or {})
        rope_dim = config.qk_rope_head_dim
        window_table = rope_table(rope_dim, config.rope_theta, None, device)
        compressed_table = rope_table(rope_dim, config.compress_rope_theta, config.yarn, device)
        self.blocks = tuple(
            Block(
                block,
                config,
                recipe,
                kind=kind,
                ratio=ratio,
                table=window_table if kind is LayerKind.SWA else compressed_table,
            )
            for block, kind, ratio in zip(weights.blocks, config.layer_kinds, config.ratios, strict=True)
        )
        self.mtp = tuple(MtpStage(stage, config, recipe, window_table) for stage in weights.mtp)
        self.dspark: DSpark | None = None
        if weights.dspark is not None and config.dspark is not None:
            self.dspark = DSpark(weights.dspark, config.dspark, config, recipe, window_table)

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading warned about, and what the checkpoint holds and this model does not use, one line each."""
        notes = list(self._warnings)
        if draft := self.weights.unused_draft:
            notes.append(f"{len(draft)} draft tensors are not used ({draft[0]}, ...)")
        if keys := self.config.unused_keys:
            notes.append(f"config.json keys that are not known and not used: {', '.join(keys)}")
        return tuple(notes)

    @property
    def conversions(self) -> tuple[str, ...]:
        """What was converted when loading, one line each."""
        count = self.weights.num_relaid
        done = f"{count} NVFP4 matrices brought into the order that the kernels of {self.device} take, once"
        return (done,) if count else ()

    def op_calls(self, *, with_drafts: bool) -> list[tuple[str, Mapping[str, int]]]:
        """Return every operation this model calls, with its sizes; see models/deepseek_v4/calls.py."""
        num_mtp = len(self.mtp) if with_drafts else 0
        num_dspark = len(self.dspark.stages) if with_drafts and self.dspark is not None else 0
        formats = self.weights.formats
        calls = model_calls(self.config, formats, self.recipe, num_mtp=num_mtp, num_dspark=num_dspark)
        return list(pairs(calls))

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache for one sequence of at most `max_tokens` tokens.

        Raises:
            ValueError: max_tokens is not in 1 .. max_position_embeddings.
        """
        return Cache(
            self.config, self.recipe, max_tokens=max_tokens, num_draft_stages=len(self.mtp), device=self.device
        )

    # Many sequences at once: what megamoe.engine asks of a model.

    @property
    def tokens_per_page(self) -> int:
        """The smallest page of at least 256 tokens that is whole in every layer."""
        return tokens_per_page(self.config)

    @property
    def num_draft_stages(self) -> int:
        """Draft stages that keep rows of their own."""
        return len(self.mtp) if self.dspark is None else len(self.dspark.stages)

    def capacity(self, size: CacheSize, num_snapshots: int, *, with_drafts: bool) -> CapacityReport:
        """Return what a shared cache costs, draft stages included if they are used."""
        specs = backbone_specs(self.config, self.recipe)
        if with_drafts:
            specs += [layer_cache_spec(self.config, self.recipe, LayerKind.SWA, 0)] * self.num_draft_stages
        return capacity_report(specs, size, num_snapshots)

    def new_shared_cache(
        self, size: CacheSize, num_snapshots: int, *, max_tokens: int, with_drafts: bool
    ) -> SharedCache:
        """Return empty pools for many sequences of at most `max_tokens` tokens, drafts included.

        Raises:
            ValueError: a page is not a whole number of entries of every layer, or memory ran out.
        """
        num_bytes = self.capacity(size, num_snapshots, with_drafts=with_drafts).total_bytes
        remedy = "give the engine fewer pages, sequences or bytes of memory"
        with no_room_is_told(f"cache: model {self.name!r}", num_bytes, "of caches were allocated", remedy):
            return SharedCache(
                self.config,
                self.recipe,
                size,
                max_tokens=max_tokens,
                num_draft_stages=self.num_draft_stages if with_drafts else 0,
                num_snapshots=num_snapshots,
                device=self.device,
            )

    def run(self, plan: StepPlan, cache: SharedCache) -> torch.Tensor | Tapped:
        """Run the tokens of a step; returns the last block's streams [T, X, D], tapped if DSpark is to read them."""
        cache.derive(plan)
        if self.dspark is None or not cache.draft_layers:
            return self.forward(plan, cache.layers)
        layers, hidden = self.dspark.shape.target_layer_ids, self.config.hidden_size
        num_tokens, dtype = plan.token_ids.shape[0], self.recipe.activation_dtype
        taps = torch.empty(num_tokens, len(layers) * hidden, dtype=dtype, device=self.device)
        streams = self.forward(plan, cache.layers, dict(zip(layers, taps.split(hidden, dim=1), strict=True)))
        return Tapped(streams, taps)

    def decode(self, plan: StepPlan, cache: SharedCache) -> tuple[torch.Tensor | Tapped, torch.Tensor]:
        """Run a step that has a bucket; returns what `run` does and the fp32 logits [T, V] of all its tokens."""
        hidden = self.run(plan, cache)
        return hidden, self.logits_of(hidden, None)

    def logits_of(self, hidden: torch.Tensor | Tapped, rows: torch.Tensor | None) -> torch.Tensor:
        """Return fp32 logits [N, V] of some rows (int64 [N]) of what `run` returned, or of all."""
        streams = hidden.streams if isinstance(hidden, Tapped) else hidden
        return self.head(streams, rows)

    def new_drafter(self, cache: SharedCache, num_tokens: int) -> MtpDrafter | DSparkDrafter:
        """Return the drafter of this checkpoint over a shared cache made with drafts: DSpark's, or the classic one.

        Raises:
            ValueError: the checkpoint has no draft stage, or DSpark drafts fewer tokens at once.
        """
        if self.dspark is not None:
            if num_tokens > self.dspark.shape.block_size:
                raise ValueError(
                    f"drafts: model {self.name!r} drafts {self.dspark.shape.block_size} tokens at once; got "
                    f"{num_tokens}. Set speculative_tokens to at most that."
                )
            return DSparkDrafter(self.dspark, self.weights.embed, self.weights.head, cache)
        if not self.mtp:
            raise ValueError(
                f"drafts: model {self.name!r} has no draft weights that can be used. Set speculative_tokens to 0."
            )
        return MtpDrafter(self.mtp[0], self.embed, self.weights.head, cache)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Return fp32 logits [T, V] for every position of `ids` ([T] int64), computed from an empty cache.

        Raises:
            ValueError: an id is outside the vocabulary, or the sequence is longer than the model's context.
        """
        ids = self._check_ids(ids)
        return self.step(ids, self.new_cache(max(1, ids.shape[0])))

    @torch.inference_mode()
    def step(self, ids: torch.Tensor | Sequence[int], cache: Cache) -> torch.Tensor:
        """Append `ids` to the cached sequence and return fp32 logits [T, V] for them.

        Any split of a sequence into steps gives the same numbers as one `logits` call. T may be 0. Work is done in
        chunks of at most MAX_CHUNK tokens; the cache advances chunk by chunk, so that an interrupted step leaves a
        valid cache at a chunk boundary.

        Args:
            ids: [T] int64.
            cache: from `new_cache`; advanced by T.

        Raises:
            ValueError: an id is outside the vocabulary, or the cache is too small for T more tokens.
        """
        ids = self._check_ids(ids)
        cache.check_room(ids.shape[0])
        parts = [self.head(self.advance(chunk, cache)) for chunk in ids.split(MAX_CHUNK) if chunk.shape[0]]
        if not parts:
            return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def advance(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Run at most MAX_CHUNK tokens, advance the cache, and return the last block's streams [T, X, D]."""
        streams = self.forward(cache.plan(ids), cache.layers)
        cache.advance(ids.shape[0])
        return streams

    def forward(
        self, plan: StepPlan, pools: Sequence[LayerPools], taps: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Run all blocks over the tokens of `plan`; returns the streams [T, X, D] in the activation dtype.

        Args:
            plan: the tokens.
            pools: per layer.
            taps: layer number → [T, D], where the mean of the streams after that layer is written.
        """
        streams = self._embed(plan.token_ids, self.config.hc_mult)  # [T, X, D]
        before: torch.Tensor | Unmixed = streams
        for layer, (block, layer_pools) in enumerate(zip(self.blocks, pools, strict=True)):
            after = block(before, plan, layer_pools)
            before = after
            if layer == len(self.blocks) - 1 or (taps is not None and layer in taps):
                before = streams = after.mixed()
                if taps is not None and layer in taps:
                    mean_of_streams(streams, out=taps[layer])
        return streams

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings [T, D] in the activation dtype."""
        return self._embed(ids, 1).squeeze(1)

    def _embed(self, ids: torch.Tensor, num_streams: int) -> torch.Tensor:
        dtype = self.recipe.activation_dtype
        return embed_streams(self.weights.embed, ids, num_streams=num_streams, out_dtype=dtype)

    def head(self, streams: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return fp32 logits [N, V] of some rows (int64 [N], -1 for nobody) of the last block's streams, or of all."""
        h = head_input(streams, rows, self.weights.hc_head, self.weights.norm, self.config)
        return linear(h, self.weights.head, out_dtype=torch.float32)

    @torch.inference_mode()
    def draft(
        self, streams: torch.Tensor, next_ids: torch.Tensor, cache: Cache, stage: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one MTP stage over streams of consecutive positions; at most MAX_CHUNK of them.

        Args:
            streams: [T, X, D] at positions cache.draft_lengths[stage] onwards.
            next_ids: [T] int64, the token after each of those positions.
            cache: the sequence's cache; the stage's part advances by T.
            stage: which MTP stage.

        Returns:
            (logits [T, V] fp32 for the token two after each position, the stage's streams [T, X, D]).

        Raises:
            ValueError: the model has no such stage.
        """
        if not 0 <= stage < len(self.mtp):
            raise ValueError(f"draft: no MTP stage {stage}; this checkpoint has {len(self.mtp)}.")
        plan = cache.draft_plan(next_ids, stage)
        streams = self.mtp[stage](streams, self.embed(next_ids), plan, cache.draft_layers[stage])
        cache.draft_lengths[stage] += next_ids.shape[0]
        return self.mtp[stage].logits(streams, self.weights.head), streams

    def _check_ids(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Return `ids` as int64 [T] on the model's device, refusing what is not a token of this vocabulary."""
        if not isinstance(ids, torch.Tensor):
            ids = torch.tensor(list(ids), dtype=torch.int64)
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token ids: expected int64 [T]; got {ids.dtype} {list(ids.shape)}.")
        ids = ids.to(device=self.device, dtype=torch.int64)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size):
            raise ValueError(
                f"token ids: allowed are 0 to {self.config.vocab_size - 1}; "
                f"got values from {int(ids.min())} to {int(ids.max())}. Encode with this model's tokenizer."
            )
        return ids
