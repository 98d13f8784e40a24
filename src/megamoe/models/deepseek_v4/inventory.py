# SPDX-License-Identifier: Apache-2.0
"""What a DeepSeek-V4 checkpoint holds: every tensor with its logical shape, worked out from the configuration.

Nothing here depends on how a weight is stored (layout.py) or needs torch, so that a checkpoint can be compared with its
inventory in seconds on any machine.

Source     the released model.safetensors.index.json files; 69,187 and 145,116 tensors for the first Flash and Pro
           releases, 72,317 and 149,782 for the ones with a DSpark draft
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator

from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig

# What may stand after the name of a weight, in any format.
COMPANIONS = (
    "weight",
    "scale",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
)


class Role(enum.Enum):
    """What a checkpoint entry is, and so which forms it may be stored in."""

    LINEAR = "linear"  # a weight in any format
    EXPERT = "expert"  # the same, one of a stack
    PLAIN = "plain"  # BF16 or F32
    FLOAT32 = "float32"  # BF16 or F32, used in FP32
    TABLE = "table"  # I64 or I32


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing a checkpoint must hold.

    Attributes:
        name: native tensor name; for LINEAR and EXPERT without ".weight" and its companions.
        shape: logical shape.
        role: which forms it may be stored in.
    """

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclasses.dataclass(frozen=True)
class DSparkDraft:
    """What the tensors of a DSpark draft depend on besides the model's sizes.

    Attributes:
        num_stages: blocks under mtp.0, mtp.1, …
        num_targets: backbone layers whose outputs feed the draft.
        markov_rank: rank of the token-to-token table.
    """

    num_stages: int
    num_targets: int
    markov_rank: int

    @classmethod
    def of(cls, config: ModelConfig, num_stages: int) -> DSparkDraft:
        """Return the draft that a configuration with DSpark keys describes."""
        assert config.dspark is not None
        return cls(num_stages, len(config.dspark.target_layer_ids), config.dspark.markov_rank)


def inventory(config: ModelConfig, *, num_mtp: int = 0, dspark: DSparkDraft | None = None) -> tuple[Entry, ...]:
    """Return everything a checkpoint of this model holds.

    Args:
        config: sizes.
        num_mtp: classic MTP stages.
        dspark: a DSpark draft; excludes classic stages.
    """
    if dspark is not None:
        assert num_mtp == 0
    return (*_backbone(config), *_drafts(config, num_mtp, dspark))


def _drafts(config: ModelConfig, num_mtp: int, dspark: DSparkDraft | None) -> Iterator[Entry]:
    for stage in range(num_mtp):
        yield from mtp_stage(config, f"mtp.{stage}")
    if dspark is not None:
        for stage in range(dspark.num_stages):
            yield from _dspark_stage(config, dspark, stage)


def _backbone(config: ModelConfig) -> Iterator[Entry]:
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Entry("embed.weight", (vocab, hidden), Role.PLAIN)
    yield Entry("head.weight", (vocab, hidden), Role.PLAIN)
    yield Entry("norm.weight", (hidden,), Role.PLAIN)
    yield from _hyper_connection(config, "hc_head", config.hc_mult, 1)
    layers = zip(config.layer_kinds, config.ratios, config.hash_routed, strict=True)
    for layer, (kind, ratio, hash_routed) in enumerate(layers):
        yield from _block(config, f"layers.{layer}", kind, ratio, hash_routed)


def mtp_stage(config: ModelConfig, prefix: str) -> Iterator[Entry]:
    """Yield what one classic multi-token-prediction stage holds."""
    yield from _block(config, prefix, LayerKind.SWA, 0, False)
    for name in ("enorm", "hnorm", "norm"):
        yield Entry(f"{prefix}.{name}.weight", (config.hidden_size,), Role.PLAIN)
    for name in ("e_proj", "h_proj"):
        yield Entry(f"{prefix}.{name}", (config.hidden_size, config.hidden_size), Role.LINEAR)
    yield from _hyper_connection(config, f"{prefix}.hc_head", config.hc_mult, 1)


def _dspark_stage(config: ModelConfig, dspark: DSparkDraft, stage: int) -> Iterator[Entry]:
    """Only the first stage takes the backbone in, only the last one has heads."""
    prefix, hidden = f"mtp.{stage}", config.hidden_size
    yield from _block(config, prefix, LayerKind.SWA, 0, False)
    if stage == 0:
        yield Entry(f"{prefix}.main_proj", (hidden, dspark.num_targets * hidden), Role.LINEAR)
        yield Entry(f"{prefix}.main_norm.weight", (hidden,), Role.PLAIN)
    if stage == dspark.num_stages - 1:
        yield Entry(f"{prefix}.norm.weight", (hidden,), Role.PLAIN)
        yield from _hyper_connection(config, f"{prefix}.hc_head", config.hc_mult, 1)
        for name in ("markov_w1", "markov_w2"):
            yield Entry(f"{prefix}.markov_head.{name}.weight", (config.vocab_size, dspark.markov_rank), Role.PLAIN)
        yield Entry(f"{prefix}.confidence_head.proj.weight", (1, hidden + dspark.markov_rank), Role.PLAIN)


def _hyper_connection(config: ModelConfig, prefix: str, num_rows: int, num_scales: int) -> Iterator[Entry]:
    yield Entry(f"{prefix}_fn", (num_rows, config.hc_mult * config.hidden_size), Role.FLOAT32)
    yield Entry(f"{prefix}_base", (num_rows,), Role.FLOAT32)
    yield Entry(f"{prefix}_scale", (num_scales,), Role.FLOAT32)


def _compressor(config: ModelConfig, prefix: str, ratio: int, channels: int, overlap: bool) -> Iterator[Entry]:
    width = channels * (2 if overlap else 1)
    yield Entry(f"{prefix}.wkv.weight", (width, config.hidden_size), Role.PLAIN)
    yield Entry(f"{prefix}.wgate.weight", (width, config.hidden_size), Role.PLAIN)
    yield Entry(f"{prefix}.ape", (ratio, width), Role.FLOAT32)
    yield Entry(f"{prefix}.norm.weight", (channels,), Role.PLAIN)


def _attention(config: ModelConfig, prefix: str, kind: LayerKind, ratio: int) -> Iterator[Entry]:
    hidden, latent = config.hidden_size, config.q_lora_rank
    all_heads = config.num_attention_heads * config.head_dim
    low_rank = config.o_groups * config.o_lora_rank
    yield Entry(f"{prefix}.wq_a", (latent, hidden), Role.LINEAR)
    yield Entry(f"{prefix}.q_norm.weight", (latent,), Role.PLAIN)
    yield Entry(f"{prefix}.wq_b", (all_heads, latent), Role.LINEAR)
    yield Entry(f"{prefix}.wkv", (config.head_dim, hidden), Role.LINEAR)
    yield Entry(f"{prefix}.kv_norm.weight", (config.head_dim,), Role.PLAIN)
    yield Entry(f"{prefix}.wo_a", (low_rank, all_heads // config.o_groups), Role.LINEAR)
    yield Entry(f"{prefix}.wo_b", (hidden, low_rank), Role.LINEAR)
    yield Entry(f"{prefix}.attn_sink", (config.num_attention_heads,), Role.FLOAT32)
    if kind is not LayerKind.SWA:
        yield from _compressor(config, f"{prefix}.compressor", ratio, config.head_dim, kind is LayerKind.CSA)
    if kind is LayerKind.CSA:
        yield Entry(f"{prefix}.indexer.wq_b", (config.index_n_heads * config.index_head_dim, latent), Role.LINEAR)
        yield Entry(f"{prefix}.indexer.weights_proj.weight", (config.index_n_heads, hidden), Role.PLAIN)
        yield from _compressor(config, f"{prefix}.indexer.compressor", ratio, config.index_head_dim, True)


def _block(config: ModelConfig, prefix: str, kind: LayerKind, ratio: int, hash_routed: bool) -> Iterator[Entry]:
    hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield Entry(f"{prefix}.attn_norm.weight", (hidden,), Role.PLAIN)
    yield Entry(f"{prefix}.ffn_norm.weight", (hidden,), Role.PLAIN)
    for name in ("hc_attn", "hc_ffn"):
        yield from _hyper_connection(config, f"{prefix}.{name}", (2 + config.hc_mult) * config.hc_mult, 3)
    yield from _attention(config, f"{prefix}.attn", kind, ratio)
    yield Entry(f"{prefix}.ffn.gate.weight", (num_experts, hidden), Role.PLAIN)
    if hash_routed:
        yield Entry(f"{prefix}.ffn.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), Role.TABLE)
    else:
        yield Entry(f"{prefix}.ffn.gate.bias", (num_experts,), Role.FLOAT32)
    projections = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    for name, shape in projections.items():
        yield Entry(f"{prefix}.ffn.shared_experts.{name}", shape, Role.LINEAR)
    for expert in range(num_experts):
        for name, shape in projections.items():
            yield Entry(f"{prefix}.ffn.experts.{expert}.{name}", shape, Role.EXPERT)


def draft_names(config: ModelConfig, prefix: str) -> Iterator[str]:
    """Yield every tensor name a classic or DSpark stage may have, in any format."""
    for entry in mtp_stage(config, prefix):
        if entry.role in (Role.LINEAR, Role.EXPERT):
            yield from (f"{entry.name}.{companion}" for companion in COMPANIONS)
        else:
            yield entry.name
    yield from (f"{prefix}.main_proj.{companion}" for companion in COMPANIONS)
    for name in ("main_norm", "markov_head.markov_w1", "markov_head.markov_w2", "confidence_head.proj"):
        yield f"{prefix}.{name}.weight"
