# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's tensors say about the model, so that config.json can be held against them.

A config.json that belongs to another model would make every tensor wrong. Here the tensors are asked first: how many
layers, which of them compress, how many experts, which sizes. Where config.json says otherwise that is one finding, and
the comparison with the inventory goes on with what the tensors say. A size counts as said by the tensors when more
than half of its witnesses (one tensor a layer, mostly) agree; a single damaged tensor does not outvote config.json.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megamoe.checkpoint.headers import TensorInfo
from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.config import MAX_EXPERTS, MAX_LAYERS, LayerKind, ModelConfig
from megamoe.models.deepseek_v4.inventory import DSparkDraft
from megamoe.models.deepseek_v4.layout import StoredHeaders, dspark_shape
from megamoe.models.deepseek_v4.names import fused_experts, native_name

_BELONGS = "Use the config.json that belongs to the weights."
_LAYER = re.compile(r"(layers|mtp)\.([0-9]{1,4})\.(.+)")
_EXPERT = re.compile(r"ffn\.experts\.([0-9]{1,5})\.")
_OF_EVERY_LAYER = ("attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight")  # a stray name makes no layer
_DSPARK = ("main_proj.", "main_norm.", "markov_head.", "confidence_head.")
_LINEARS_OF_A_STAGE = ("attn.", "ffn.", "e_proj.", "h_proj.")

# Field of ModelConfig, tensor of every layer (or of the top) that shows it, and the dimension.
_WITNESSES = (
    ("vocab_size", "embed.weight", 0),
    ("vocab_size", "head.weight", 0),
    ("hidden_size", "attn_norm.weight", 0),
    ("q_lora_rank", "attn.q_norm.weight", 0),
    ("head_dim", "attn.kv_norm.weight", 0),
    ("num_attention_heads", "attn.attn_sink", 0),
    ("index_n_heads", "attn.indexer.weights_proj.weight", 0),
    ("index_head_dim", "attn.indexer.compressor.norm.weight", 0),
    ("moe_intermediate_size", "ffn.shared_experts.w1.weight", 0),
    ("num_experts_per_tok", "ffn.gate.tid2eid", 1),
)


@dataclasses.dataclass(frozen=True)
class DraftFound:
    """Which draft the tensors hold.

    Attributes:
        num_mtp: classic stages, mtp.0 and so on.
        num_dspark: DSpark stages; 0 with classic ones.
        stripped: names left of a stage whose linears are gone.
        copies: the draft's copies of embedding and head.
    """

    num_mtp: int
    num_dspark: int
    stripped: tuple[str, ...]
    copies: tuple[str, ...]


class Observed:
    """Names and shapes of a checkpoint, by layer, under DeepSeek's names."""

    def __init__(self, infos: Mapping[str, TensorInfo], natives: Mapping[str, str], unavailable: Iterable[str]) -> None:
        """Sort every tensor by layer.

        Args:
            infos: stored name -> header entry.
            natives: stored name -> native name.
            unavailable: stored names of tensors whose header cannot be read; they count as present.
        """
        self.top: dict[str, TensorInfo | None] = {}
        self.layers: dict[int, dict[str, TensorInfo | None]] = {}
        self.stages: dict[int, dict[str, TensorInfo | None]] = {}
        self.num_experts = 0
        sources: list[tuple[str, TensorInfo | None]] = [(natives[name], info) for name, info in infos.items()]
        for native, info in [*sources, *((native_name(name), None) for name in unavailable)]:
            match = _LAYER.fullmatch(native)
            if match is None:
                self.top[native] = info
                continue
            group = self.layers if match[1] == "layers" else self.stages
            expert = _EXPERT.match(match[3])
            if expert:
                self._note_experts(int(expert[1]) + 1)
                group.setdefault(int(match[2]), {}).setdefault("ffn.experts.", None)
                continue
            if fused_experts(native) is not None and info is not None and info.shape:
                self._note_experts(info.shape[0])
            group.setdefault(int(match[2]), {})[match[3]] = info

    def _note_experts(self, count: int) -> None:
        if count <= MAX_EXPERTS:  # more is damage, and nothing is counted to for it
            self.num_experts = max(self.num_experts, count)

    @property
    def num_layers(self) -> int:
        """One more than the highest layer that has what every layer has."""
        whole = [layer for layer, names in self.layers.items() if any(name in names for name in _OF_EVERY_LAYER)]
        return max((layer for layer in whole if layer < MAX_LAYERS), default=-1) + 1

    def layer_kind(self, layer: int, said: tuple[LayerKind, int]) -> tuple[LayerKind, int]:
        """Return what a layer's tensors say it attends to; `said` (by config.json) where they are silent.

        A compressor with overlapping windows has a table of positions twice as wide as its norm. It is a CSA layer
        even if its indexer is missing: that is then a missing tensor, not another kind of layer.
        """
        names = self.layers.get(layer)
        if not names:
            return said
        has_indexer = any(name.startswith("attn.indexer.") for name in names)
        if not has_indexer and not any(name.startswith("attn.compressor.") for name in names):
            return LayerKind.SWA, 0
        ape, norm = names.get("attn.compressor.ape"), names.get("attn.compressor.norm.weight")
        if ape is None or norm is None or len(ape.shape) != 2 or len(norm.shape) != 1:
            kind = LayerKind.CSA if has_indexer else said[0] if said[0] is not LayerKind.SWA else LayerKind.HCA
            return (kind, said[1]) if kind is said[0] else (kind, 4 if kind is LayerKind.CSA else 128)
        if ape.shape[1] not in (norm.shape[0], 2 * norm.shape[0]):
            return said
        overlaps = ape.shape[1] == 2 * norm.shape[0]
        return (LayerKind.CSA if overlaps or has_indexer else LayerKind.HCA), ape.shape[0]

    def is_hash_routed(self, layer: int, said: bool) -> bool:
        """Return whether a layer's tensors route by token id; `said` where they are silent or say both."""
        names = self.layers.get(layer, {})
        has_table, has_bias = "ffn.gate.tid2eid" in names, "ffn.gate.bias" in names
        return said if has_table == has_bias else has_table

    def witnesses(self, leaf: str) -> list[TensorInfo]:
        """Return the header entries of a tensor in all layers, or at the top."""
        found = [names.get(leaf) for names in (self.top, *self.layers.values())]
        return [info for info in found if info is not None]

    def draft(self) -> DraftFound:
        """Return which draft there is."""
        is_dspark = any(name.startswith(_DSPARK) for names in self.stages.values() for name in names)
        copies, stripped, stages = [], [], []
        for stage, names in sorted(self.stages.items()):
            copies += [f"mtp.{stage}.{name}" for name in names if name in ("embed.weight", "head.weight")]
            own = [name for name in names if name not in ("embed.weight", "head.weight")]
            if is_dspark or any(name.startswith(_LINEARS_OF_A_STAGE) for name in own):
                stages.append(stage)
            else:
                stripped += [f"mtp.{stage}.{name}" for name in own]
        count = max(stages, default=-1) + 1
        return DraftFound(
            num_mtp=0 if is_dspark else count,
            num_dspark=count if is_dspark else 0,
            stripped=tuple(sorted(stripped)),
            copies=tuple(sorted(copies)),
        )


def reconcile(observed: Observed, config: ModelConfig, raw: Mapping[str, Any]) -> tuple[ModelConfig, list[Problem]]:
    """Hold config.json against the tensors.

    Args:
        observed: what the tensors say.
        config: what config.json says.
        raw: its content.

    Returns:
        The configuration with what the tensors say in place of what contradicts them, and the contradictions.
    """
    problems: list[Problem] = []
    changes: dict[str, Any] = {}
    _compare_sizes(observed, config, changes, problems)
    gates = [info.shape[0] for info in observed.witnesses("ffn.gate.weight") if len(info.shape) == 2]
    num_experts = collections.Counter(gates).most_common(1)[0][0] if gates else observed.num_experts
    if 0 < num_experts <= MAX_EXPERTS and num_experts != config.n_routed_experts:
        changes["n_routed_experts"] = num_experts
        problems.append(contradiction("config-experts", "n_routed_experts", config.n_routed_experts, num_experts))
    num_layers = observed.num_layers
    if num_layers and num_layers != config.num_hidden_layers:
        changes["num_hidden_layers"] = num_layers
        problems.append(contradiction("config-layers", "num_hidden_layers", config.num_hidden_layers, num_layers))
    _compare_layers(observed, config, raw, num_layers or config.num_hidden_layers, changes, problems)
    return dataclasses.replace(config, **changes), problems


def contradiction(rule: str, field: str, said: object, shown: object) -> Problem:
    """Return the problem that config.json says one thing of a field and the tensors another."""
    text = f"config.json: {field} is {said}, but the tensors show {shown}."
    remedy = f"{_BELONGS} If it does, tensors were dropped or added."
    return Problem(rule, field, text, remedy, str(said), str(shown))


def _compare_sizes(observed: Observed, config: ModelConfig, changes: dict[str, Any], problems: list[Problem]) -> None:
    sizes: dict[str, list[int]] = {}
    for field, leaf, dimension in _WITNESSES:
        infos = observed.witnesses(leaf)
        sizes.setdefault(field, []).extend(info.shape[dimension] for info in infos if len(info.shape) > dimension)
    for field, found in sizes.items():
        said = getattr(config, field)
        size, count = collections.Counter(found).most_common(1)[0] if found else (said, 0)
        if size != said and count > 1 and 2 * count > len(found):
            changes[field] = size
            problems.append(contradiction("config-size", field, said, size))


def _compare_layers(
    observed: Observed,
    config: ModelConfig,
    raw: Mapping[str, Any],
    num_layers: int,
    changes: dict[str, Any],
    problems: list[Problem],
) -> None:
    beyond = num_layers - config.num_hidden_layers
    said = [*zip(config.layer_kinds, config.ratios, strict=True), *[(LayerKind.SWA, 0)] * beyond][:num_layers]
    shown = [observed.layer_kind(layer, said[layer]) for layer in range(num_layers)]
    hash_said = [*config.hash_routed, *[False] * beyond][:num_layers]
    hash_shown = [observed.is_hash_routed(layer, hash_said[layer]) for layer in range(num_layers)]
    changes |= {
        "layer_kinds": tuple(kind for kind, _ in shown),
        "ratios": tuple(ratio for _, ratio in shown),
        "hash_routed": tuple(hash_shown),
    }
    wrong = [layer for layer in range(min(num_layers, config.num_hidden_layers)) if said[layer] != shown[layer]]
    if wrong and "layer_types" in raw and list(config.layer_kinds) == fallback_kinds(config.num_hidden_layers):
        text = (
            "config.json: layer_types is the pattern transformers falls back to, which no release has; the "
            f"tensors show another in {len(wrong)} of {num_layers} layers."
        )
        remedy = "Take compress_ratios (or layer_types) from the original config.json."
        problems.append(Problem("config-fallback-layer-types", "layer_types", text, remedy))
    else:
        field = "compress_ratios" if "compress_ratios" in raw else "layer_types"
        for layer in wrong:
            (kind, ratio), (other_kind, other_ratio) = said[layer], shown[layer]
            text = (
                f"layers.{layer}.attn.compressor: {field} calls layer {layer} {kind.name} (ratio {ratio}), but its "
                f"tensors are those of {other_kind.name} (ratio {other_ratio})."
            )
            remedy = f"{_BELONGS} If it does, compressor tensors of the layer were dropped or added."
            got, allowed = f"{kind.name} {ratio}", f"{other_kind.name} {other_ratio}"
            problems.append(Problem("config-attention", f"layers.{layer}.attn.compressor", text, remedy, got, allowed))
    for layer in range(min(num_layers, config.num_hidden_layers)):
        if hash_said[layer] != hash_shown[layer]:
            leaf = "tid2eid" if hash_shown[layer] else "bias"
            text = (
                f"layers.{layer}.ffn.gate.{leaf}: stored, but config.json says layer {layer} is routed by "
                f"{'scores' if hash_shown[layer] else 'token id'}."
            )
            problems.append(Problem("config-hash-layers", f"layers.{layer}.ffn.gate.{leaf}", text, _BELONGS))


def fallback_kinds(num_layers: int) -> list[LayerKind]:
    """Return the pattern that transformers' DeepseekV4Config fills in for an absent layer_types."""
    rest = [LayerKind.CSA if layer % 2 else LayerKind.HCA for layer in range(max(num_layers - 2, 0))]
    return [LayerKind.HCA] * min(num_layers, 2) + rest


def reconcile_draft(draft: DraftFound, stored: StoredHeaders, config: ModelConfig) -> tuple[ModelConfig, list[Problem]]:
    """Hold config.json against a draft's tensors.

    Args:
        draft: which draft the tensors hold.
        stored: the tensors.
        config: what config.json says.

    Returns:
        The configuration with what the tensors say in place of what contradicts them, and the contradictions.
    """
    said = config.dspark
    shape = dspark_shape(stored, config, draft.num_dspark) if draft.num_dspark else None
    problems = check_draft(draft, shape, config)
    if said is None or not problems:
        return config, problems
    if shape is None:
        return dataclasses.replace(config, dspark=None), problems
    targets = said.target_layer_ids if len(said.target_layer_ids) == shape.num_targets else (0,) * shape.num_targets
    shown = dataclasses.replace(said, markov_rank=shape.markov_rank, target_layer_ids=targets)
    return dataclasses.replace(config, dspark=shown), problems


def check_draft(draft: DraftFound, shape: DSparkDraft | None, config: ModelConfig) -> list[Problem]:
    """Return contradictions between config.json and a draft's tensors.

    Args:
        draft: which draft the tensors hold.
        shape: its shape, where it is a DSpark draft.
        config: what config.json says.
    """
    said = config.dspark
    if shape is None:
        if said is None or not draft.num_mtp:
            return []
        text = (
            f"config.json: dspark_block_size is {said.block_size}, but the tensors under mtp are those of a classic "
            f"draft ({draft.num_mtp} stage{'s' if draft.num_mtp > 1 else ''}, no main_proj and no markov_head)."
        )
        remedy = f"{_BELONGS} The fields dspark_* belong to the releases with a DSpark draft."
        return [Problem("config-draft", "dspark_block_size", text, remedy, "DSpark", "classic MTP")]
    if said is None:
        text = (
            "config.json: no dspark_* field, but the tensors under mtp are those of a DSpark draft, which is not run."
        )
        return [Problem("config-draft-unannounced", "dspark_block_size", text, _BELONGS)]
    problems: list[Problem] = []
    if shape.markov_rank != said.markov_rank:
        problems.append(contradiction("config-draft", "dspark_markov_rank", said.markov_rank, shape.markov_rank))
    if shape.num_targets != len(said.target_layer_ids):
        shown = f"{shape.num_targets} layers"
        problems.append(contradiction("config-draft", "dspark_target_layer_ids", list(said.target_layer_ids), shown))
    return problems
