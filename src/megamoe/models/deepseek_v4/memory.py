# SPDX-License-Identifier: Apache-2.0
"""How much memory a DeepSeek-V4 takes: weights per GPU, cache that grows with the context, state that does not.

One number for "bytes per token" misleads here, so three things are kept apart. Growing: a CSA layer keeps an entry and
an index key for every 4 tokens, an HCA layer an entry for every 128. Fixed per sequence: the window rows of every
layer. Fixed per sequence as well: the raw rows that compressors still need, in fp32. The latent is one for all heads,
so tensor parallelism does not divide the cache: every GPU that serves a sequence holds all of it.

Rows are counted without the padding of any page size, and without the scratch memory of a step.

Source     docs/checkpoints.md, section "Memory plan"; row sizes are those of megamoe.formats.cache_rows
"""

from __future__ import annotations

import dataclasses
import enum

from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.inventory import Entry, Role


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How cache rows are stored.

    Attributes:
        name: what reports call it.
        fp8_rows: latent and compressed rows as FP8 with bf16 rotary channels, else bf16.
        index_bits: 4, 8 or 16 bits a channel of an index key.
    """

    name: str
    fp8_rows: bool
    index_bits: int

    def entry_bytes(self, config: ModelConfig) -> int:
        """Bytes of one latent or compressed entry: 584 at 512 channels in FP8, 1024 in bf16."""
        if not self.fp8_rows:
            return 2 * config.head_dim
        others = config.head_dim - config.qk_rope_head_dim
        return others + 2 * config.qk_rope_head_dim + others // 64 + 1  # a scale byte per 64 channels and a zero byte

    def index_bytes(self, config: ModelConfig) -> int:
        """Bytes of one index key: 68, 132 or 256 at 128 channels."""
        channels = config.index_head_dim
        return {4: channels // 2 + channels // 32, 8: channels + 4, 16: 2 * channels}[self.index_bits]


CACHE_FORMATS = (
    CacheFormat("FP8, FP8 index", True, 8),
    CacheFormat("FP8, FP4 index", True, 4),
    CacheFormat("bf16", False, 16),
)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What one sequence takes in the caches.

    Attributes:
        format: how rows are stored.
        bytes_per_token: growth over all layers; an average, as entries come every 4 and every 128 tokens.
        window_bytes: fixed, latents of the sliding windows of the backbone.
        draft_window_bytes: fixed, the same of the draft's layers.
        compressor_bytes: fixed, raw fp32 rows of the compressors.
        grown: (bytes of one row, tokens per row) for every kind of row that grows, summed over layers.
    """

    format: CacheFormat
    bytes_per_token: float
    window_bytes: int
    draft_window_bytes: int
    compressor_bytes: int
    grown: tuple[tuple[int, int], ...]

    @property
    def fixed_bytes(self) -> int:
        """Bytes a sequence takes before its first token."""
        return self.window_bytes + self.draft_window_bytes + self.compressor_bytes

    def growing_bytes(self, num_tokens: int) -> int:
        """Bytes of all entries after `num_tokens` tokens."""
        return sum(row_bytes * (num_tokens // ratio) for row_bytes, ratio in self.grown)

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of `num_tokens` tokens."""
        return self.fixed_bytes + self.growing_bytes(num_tokens)


def cache_plan(config: ModelConfig, form: CacheFormat, *, num_draft_layers: int = 0) -> CachePlan:
    """Return what one sequence takes.

    Args:
        config: sizes.
        form: how rows are stored.
        num_draft_layers: sliding-window layers of an MTP or DSpark draft.
    """
    entry, index = form.entry_bytes(config), form.index_bytes(config)
    grown: dict[int, int] = {}
    compressor_bytes = 0
    for kind, ratio in zip(config.layer_kinds, config.ratios, strict=True):
        if kind is LayerKind.SWA:
            continue
        grown[ratio] = grown.get(ratio, 0) + entry
        overlap = 2 if kind is LayerKind.CSA else 1
        rows = overlap * ratio
        compressor_bytes += rows * overlap * config.head_dim * 2 * 4  # values and scores, fp32
        if kind is LayerKind.CSA:
            grown[ratio] += index
            compressor_bytes += rows * overlap * config.index_head_dim * 2 * 4
    window = config.sliding_window * entry
    rows_that_grow = tuple((row_bytes, ratio) for ratio, row_bytes in sorted(grown.items()))
    return CachePlan(
        format=form,
        bytes_per_token=sum(row_bytes / ratio for row_bytes, ratio in rows_that_grow),
        window_bytes=config.num_hidden_layers * window,
        draft_window_bytes=num_draft_layers * window,
        compressor_bytes=compressor_bytes,
        grown=rows_that_grow,
    )


class Split(enum.Enum):
    """How weights are divided over the GPUs of one replica; routed experts always by expert."""

    DATA = "experts divided, everything else on every GPU"  # each GPU serves sequences of its own
    TENSOR = "experts divided, attention by heads"  # all GPUs serve every sequence


# Divided by heads, groups, rows of the vocabulary or inner channels; everything else is on every GPU.
_DIVIDED = (
    "attn.wq_b",
    "attn.wo_a",
    "attn.wo_b",
    "attn.attn_sink",
    "ffn.shared_experts.w1",
    "ffn.shared_experts.w2",
    "ffn.shared_experts.w3",
)


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Bytes of all weights by how they can be divided.

    Attributes:
        experts: routed experts, the draft's among them.
        divided: what tensor parallelism divides: query and output projections, shared experts, embedding and head.
        replicated: everything else: down-projections, compressors, indexer, gates, norms, hyper-connections.
    """

    experts: int
    divided: int
    replicated: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.experts + self.divided + self.replicated

    def per_gpu(self, num_gpus: int, split: Split) -> int:
        """Bytes on the GPU that holds most."""
        experts = -(-self.experts // num_gpus)
        if split is Split.TENSOR:
            return experts + -(-self.divided // num_gpus) + self.replicated
        return experts + self.divided + self.replicated


def kind_of_weight(entry: Entry) -> str:
    """Return the field of WeightBytes an entry's bytes count to."""
    if entry.role is Role.EXPERT:
        return "experts"
    if entry.name in ("embed.weight", "head.weight") or entry.name.partition(".")[2].partition(".")[2] in _DIVIDED:
        return "divided"
    return "replicated"


def can_split(config: ModelConfig, num_gpus: int, split: Split) -> bool:
    """Say whether experts, and output groups where they are divided, come out even."""
    if config.n_routed_experts % num_gpus:
        return False
    return split is Split.DATA or config.o_groups % num_gpus == 0
