# SPDX-License-Identifier: Apache-2.0
"""Inspect a checkpoint: what it is, whether it is whole, what is wrong with it. Headers and a few scale bytes only.

What is found comes from models/deepseek_v4/examine.py, which `load` and `convert` begin with too; here it is counted
and put into words. docs/checkpoints.md describes every rule.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from megamoe.checkpoint.hashing import Hashed
from megamoe.checkpoint.headers import ITEM_BYTES
from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.examine import Examined, examine
from megamoe.models.deepseek_v4.inventory import Entry, Role
from megamoe.models.deepseek_v4.layout import FLOATS, Format, StoredHeaders
from megamoe.models.deepseek_v4.memory import WeightBytes, kind_of_weight
from megamoe.models.deepseek_v4.observed import DraftFound
from megamoe.models.deepseek_v4.releases import release_of
from megamoe.models.deepseek_v4.rules import Finding, group
from megamoe.models.deepseek_v4.samples import Sampled
from megamoe.verify.vllm_view import VllmView, vllm_view


class Verdict(enum.Enum):
    """What the exit code says."""

    GOOD = 0
    FINDINGS = 1
    UNREADABLE = 2


@dataclasses.dataclass
class GroupCount:
    """Tensors of one kind of module.

    Attributes:
        formats: how many modules are stored in each format.
        num_tensors: stored tensors.
        num_bytes: their bytes.
    """

    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_tensors: int = 0
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything found out about a checkpoint.

    Attributes:
        directory: its folder.
        architecture: name in config.json, or "unknown".
        release: which release it looks like, in words.
        layout: how weights are stored and spelled, in words.
        draft: MTP or DSpark, in words.
        num_tensors: tensors stored.
        num_bytes: their bytes.
        expected_tensors: tensors of the inventory in the formats found, None where it could not be worked out.
        expected_bytes: their bytes.
        published: (tensors, bytes) of the release it looks like, where they are known.
        groups: by kind of module.
        findings: rules broken.
        notes: what is worth knowing.
        sampled: how many scales were looked at, or None.
        config: with what the tensors say in place of what contradicts them; None where config.json is not usable.
        num_draft_layers: sliding-window layers of the draft.
        weights: bytes by how they can be divided over GPUs.
        verdict: good, findings or unreadable.
        hashed: what hashes prove, where they were asked for.
        vllm: how vLLM reads it, where it could be compared with an inventory.
    """

    directory: pathlib.Path
    architecture: str
    release: str
    layout: str
    draft: str
    num_tensors: int
    num_bytes: int
    expected_tensors: int | None
    expected_bytes: int | None
    published: tuple[int, int] | None
    groups: Mapping[str, GroupCount]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    sampled: Sampled | None
    config: ModelConfig | None
    num_draft_layers: int
    weights: WeightBytes | None
    verdict: Verdict
    hashed: Hashed | None = None
    vllm: VllmView | None = None


def inspect_checkpoint(directory: str | os.PathLike[str]) -> Inspection:
    """Inspect a checkpoint directory.

    Args:
        directory: folder with config.json and *.safetensors.

    Raises:
        CheckpointError: `directory` is not a directory.
        OSError: a file cannot be read.
    """
    return _Inspector(examine(directory)).result()


# Published totals, by (model, experts' format, draft).
_PUBLISHED: dict[tuple[str, str, str], tuple[str, int, int]] = {
    ("Flash", "mxfp4", "mtp"): ("DeepSeek-V4-Flash (preview)", 69_187, 159_609_485_896),
    ("Pro", "mxfp4", "mtp"): ("DeepSeek-V4-Pro (preview)", 145_116, 864_704_792_696),
    ("Flash", "mxfp4", "dspark"): ("DeepSeek-V4-Flash-0731 (DSpark)", 72_317, 166_878_536_440),
    ("Pro", "mxfp4", "dspark"): ("DeepSeek-V4-Pro-0813 (DSpark)", 149_782, 892_727_580_904),
    ("Flash", "nvfp4", "mtp"): ("NVIDIA DeepSeek-V4-Flash-NVFP4", 135_235, 168_266_793_544),
    ("Pro", "nvfp4", "mtp"): ("NVIDIA DeepSeek-V4-Pro-NVFP4", 285_660, 913_061_485_688),
}


class _Inspector:
    """Puts what was found into words and numbers."""

    def __init__(self, examined: Examined) -> None:
        self.examined = examined
        self.headers = examined.headers
        self.config, self.draft, self.stored, self.claims = (
            examined.config,
            examined.draft,
            examined.stored,
            examined.claims,
        )
        self.formats: Mapping[str, Format] = examined.claims.formats if examined.claims is not None else {}
        self.groups: dict[str, GroupCount] = {}
        self.expected: tuple[int, int] | None = None
        self.weights: WeightBytes | None = None
        if examined.claims is not None and examined.stored is not None:
            self.count(examined.stored, examined.claims.entries)

    def count(self, stored: StoredHeaders, entries: Iterable[Entry]) -> None:
        """Count tensors and bytes by kind of module, and what the inventory comes to in the formats found."""
        usual: dict[str, collections.Counter[Format]] = {}
        for entry in entries:
            if entry.name in self.formats:
                usual.setdefault(_group(entry), collections.Counter())[self.formats[entry.name]] += 1
        expected_tensors = expected_bytes = 0
        by_split = {"experts": 0, "divided": 0, "replicated": 0}
        owners: dict[str, Entry] = {}
        for entry in entries:
            found = self.formats.get(entry.name)
            likely = usual.get(_group(entry))
            leaves = _expected(stored, entry, found or (likely.most_common(1)[0][0] if likely else Format.PLAIN))
            expected_tensors += len(leaves)
            expected_bytes += sum(leaves.values())
            owners.update(dict.fromkeys(leaves, entry))
            if entry.role in (Role.LINEAR, Role.EXPERT) and found is not None:
                self.groups.setdefault(_group(entry), GroupCount()).formats[_format_name(stored, entry, found)] += 1
        seen: set[str] = set()
        for native in stored.names:
            source = stored.source(native)
            if source.name in seen:
                continue
            seen.add(source.name)
            num_bytes = self.headers.infos[source.name].num_bytes
            owner = owners.get(native)
            group_count = self.groups.setdefault(_group(owner) if owner else "not in the inventory", GroupCount())
            if owner is not None and owner.role not in (Role.LINEAR, Role.EXPERT):
                group_count.formats[self.headers.infos[source.name].dtype.lower()] += 1
            group_count.num_tensors += 1
            group_count.num_bytes += num_bytes
            by_split[kind_of_weight(owner) if owner else "replicated"] += num_bytes
        fused = {stored.source(name).name for name in stored.names if stored.source(name).expert is not None}
        if fused:  # one stored tensor stands for many of the inventory
            in_fused = sum(1 for name in stored.names if stored.source(name).expert is not None)
            expected_tensors += len(fused) - in_fused
        self.expected = (expected_tensors, expected_bytes)
        self.weights = WeightBytes(**by_split)

    # Words.

    def result(self) -> Inspection:
        examined = self.examined
        raw, other, findings = examined.raw, examined.other, group(examined.problems)
        verdict = Verdict.UNREADABLE if examined.is_unreadable else Verdict.FINDINGS if findings else Verdict.GOOD
        names = raw.get("architectures") if raw is not None else None
        release, published = ("unknown", None) if self.config is None else self.release(raw or {})
        draft = self.draft
        return Inspection(
            directory=self.headers.directory,
            architecture=str(names[0]) if isinstance(names, list) and names else "unknown",
            release=other or release,
            layout=self.layout(),
            draft=_draft_words(draft, raw or {}) if draft is not None else "unknown",
            num_tensors=len(self.headers.infos),
            num_bytes=self.headers.num_bytes,
            expected_tensors=self.expected[0] if self.expected else None,
            expected_bytes=self.expected[1] if self.expected else None,
            published=published,
            groups=dict(sorted(self.groups.items(), key=lambda item: _ORDER.index(item[0]))),
            findings=tuple(findings),
            notes=examined.notes,
            sampled=examined.sampled,
            config=self.config,
            num_draft_layers=draft.num_mtp + draft.num_dspark if draft is not None else 0,
            weights=self.weights,
            verdict=verdict,
            vllm=vllm_view(examined),
        )

    def release(self, raw: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
        """Return which release this looks like, and its published totals."""
        assert self.config is not None and self.draft is not None and self.stored is not None
        config = self.config
        known = release_of(config)
        size = known.name if known is not None else ""
        draft = "dspark" if self.draft.num_dspark else "mtp" if self.draft.num_mtp else "none"
        kinds = _kinds(self.formats)
        experts, linears = kinds["experts"], kinds["linears"]
        model = f"DeepSeek-V4-{size}" if size else "a DeepSeek-V4 of another size"
        if experts == {"nvfp4"} and linears == {"nvfp4"}:
            packed = any(name.endswith("_packed") for name in self.headers.infos)
            return f"{model}, every linear in NVFP4 ({'compressed-tensors' if packed else 'megamoe'})", None
        if any(name.endswith(".weight_packed") for name in self.headers.infos):
            return f"{model}, converted by compressed-tensors", None
        if experts == {"fp8"} and linears == {"fp8"}:
            float_scales = any(
                self.stored.dtype(self.stored.scales_name(module, found)) == "F32"
                for module, found in self.formats.items()
                if found is Format.FP8
            )
            return (
                f"{model}, Base (FP8 experts, fp32 scales)" if float_scales else f"{model}, experts converted to FP8",
                None,
            )
        if any(name.startswith("model.") for name in self.headers.infos):
            version = raw.get("transformers_version")
            return f"{model}, re-saved by transformers{f' {version}' if version else ''}", None
        if experts <= {"bf16", "f32"} and linears <= {"bf16", "f32"}:
            return f"{model}, unquantized", None
        released = _PUBLISHED.get((size, next(iter(experts), ""), draft)) if len(experts) == 1 else None
        if released is not None and linears == {"fp8"}:
            return released[0], released[1:]
        if experts == {"nvfp4"} and linears == {"fp8"}:
            return f"{model}, NVFP4 experts in NVIDIA's layout{', DSpark draft' if draft == 'dspark' else ''}", None
        if experts == {"mxfp4"} and linears == {"fp8"}:
            words = {"dspark": "as the 0731 and 0813 releases (DSpark)", "mtp": "as the preview", "none": "no draft"}
            return f"{model}, {words[draft]}", None
        return f"{model}, mixed formats", None

    def layout(self) -> str:
        """Return how tensors are spelled and which metadata says so."""
        names = self.headers.infos
        if any(".self_attn." in name for name in names):
            spelling = "module names of transformers"
        elif any(name.startswith("model.") for name in names):
            spelling = "DeepSeek's names behind model. (save_pretrained)"
        else:
            spelling = "DeepSeek's names"
        count = len(self.headers.shards)
        return f"{spelling}, {count} {'shard' if count == 1 else 'shards'}"


_ORDER = [
    "embedding and head",
    "attention projections",
    "compressors",
    "indexer",
    "router",
    "shared experts",
    "routed experts",
    "norms and hyper-connections",
    "draft linears",
    "draft experts",
    "draft, other",
    "not in the inventory",
]


def _group(entry: Entry) -> str:
    """Return the kind of module an entry belongs to."""
    name = entry.name
    if name.startswith("mtp."):
        if entry.role is Role.EXPERT:
            return "draft experts"
        return "draft linears" if entry.role is Role.LINEAR else "draft, other"
    if entry.role is Role.EXPERT:
        return "routed experts"
    if name in ("embed.weight", "head.weight"):
        return "embedding and head"
    for part, kind in (
        (".shared_experts.", "shared experts"),
        (".indexer.", "indexer"),
        (".compressor.", "compressors"),
    ):
        if part in name:
            return kind
    if ".ffn.gate." in name:
        return "router"
    return "attention projections" if entry.role is Role.LINEAR else "norms and hyper-connections"


def _format_name(stored: StoredHeaders, entry: Entry, found: Format) -> str:
    if found is Format.PLAIN:
        return stored.dtype(f"{entry.name}.weight").lower()
    if found is Format.FP8:
        scales = stored.dtype(stored.scales_name(entry.name, found))
        return f"fp8 ({'fp32' if scales in FLOATS else 'e8m0'} scales)"
    return str(found.value)


def _expected(stored: StoredHeaders, entry: Entry, found: Format) -> dict[str, int]:
    """Return native names and bytes of the tensors an entry takes in a format."""
    count = 1
    for size in entry.shape:
        count *= size
    if entry.role not in (Role.LINEAR, Role.EXPERT):
        width = {Role.PLAIN: 2, Role.FLOAT32: 4, Role.TABLE: 8}[entry.role]
        return {entry.name: count * (ITEM_BYTES[stored.dtype(entry.name)] if entry.name in stored else width)}
    codes = stored.codes_name(entry.name)
    rows, columns = entry.shape
    if found is Format.PLAIN:
        return {codes: count * (ITEM_BYTES[stored.dtype(codes)] if codes in stored else 2)}
    scales = stored.scales_name(entry.name, found)
    width = ITEM_BYTES[stored.dtype(scales)] if scales in stored else 1
    if found is Format.FP8:
        return {codes: count, scales: -(-rows // 128) * -(-columns // 128) * width}
    if found is Format.MXFP4:
        return {codes: count // 2, scales: count // 32}
    ours = not codes.endswith("_packed")
    tensor_scale, input_scale = (
        ("weight_scale_2", "input_scale") if ours else ("weight_global_scale", "input_global_scale")
    )
    leaves = {codes: count // 2, scales: count // 16, f"{entry.name}.{tensor_scale}": 4}
    if f"{entry.name}.{input_scale}" in stored:
        leaves[f"{entry.name}.{input_scale}"] = 4
    return leaves


def _kinds(formats: Mapping[str, Format]) -> dict[str, set[str]]:
    """Return the formats of backbone experts and of all other backbone linears."""
    out: dict[str, set[str]] = {"experts": set(), "linears": set()}
    for module, found in formats.items():
        if module.startswith("layers."):
            kind = "bf16" if found is Format.PLAIN else found.value
            out["experts" if ".ffn.experts." in module else "linears"].add(kind)
    return out


def _draft_words(draft: DraftFound, raw: Mapping[str, Any]) -> str:
    if draft.num_dspark:
        words = "" if "dspark_block_size" in raw else " (not run: config.json has no dspark_* fields)"
        return f"DSpark, {draft.num_dspark} stages{words}"
    if draft.num_mtp:
        return f"classic MTP, {draft.num_mtp} stage{'s' if draft.num_mtp > 1 else ''}"
    claimed = raw.get("num_nextn_predict_layers")
    return f"none (config.json claims {claimed})" if claimed else "none"
