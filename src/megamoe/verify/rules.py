# SPDX-License-Identifier: Apache-2.0
"""The rules `megamoe inspect` checks a checkpoint by, and what it reports: findings, grouped where they repeat.

A finding breaks a rule and makes the exit code 1. A note is worth knowing and changes nothing: what was checked only in
part, or is spelled in a way that this package reads and others may not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from megamoe.checkpoint.problem import Problem

# Rule -> (fault of docs/faults.md or "", what the rule is).
RULES: dict[str, tuple[str, str]] = {
    # files
    "shard-truncated": ("", "every shard is as long as its header says"),
    "shard-overlap": ("", "no byte of a shard belongs to two tensors"),
    "shard-gap": ("", "every byte of a shard belongs to a tensor"),
    "shard-header": ("", "every shard starts with a readable safetensors header"),
    "shard-missing": ("", "every shard is there"),
    "index-unreadable": ("", "the index is a map of tensor names to shards in the same folder"),
    "index-disagrees": ("F14", "index and shards list the same tensors in the same places"),
    "tensor-twice": ("", "a tensor is stored once, under one spelling of its name"),
    # tensors
    "tensor-missing": ("F14", "every tensor of the inventory is there"),
    "tensor-unknown": ("F14", "every tensor is in the inventory"),
    "tensor-shape": ("", "a tensor has the shape the configuration gives it"),
    "tensor-transposed": ("", "a tensor is stored [out, in]"),
    "tensor-dtype": ("", "a tensor has a dtype the loader can read"),
    "codes-orientation": ("F5", "FP4 codes are packed along the input dimension"),
    "scales-transposed": ("F4", "block scales are stored [out, in / block]"),
    "scale-dtype": ("F20", "block scales have the dtype of their format; E8M0 bytes are not numbers"),
    "experts-mixed": ("F16", "the routed experts of a layer share one format"),
    "kv-norm-renamed": ("F17", "the norm of the latent is called kv_norm"),
    # configuration
    "config-unreadable": ("", "config.json is there and is JSON"),
    "config-invalid": ("", "config.json describes a model this package computes"),
    "config-layers": ("", "config.json and tensors have the same number of layers"),
    "config-attention": ("", "config.json and tensors agree on what each layer attends to"),
    "config-fallback-layer-types": ("", "layer_types is not the fallback pattern of transformers"),
    "config-hash-layers": ("", "config.json and tensors agree on which layers are routed by token id"),
    "config-experts": ("", "config.json and tensors have the same number of experts"),
    "config-size": ("", "config.json and tensors agree on the model's dimensions"),
    "config-draft": ("", "config.json and tensors agree on the DSpark draft"),
    "config-format": ("F16", "config.json declares the formats the tensors have, module by module"),
    "quant-config-disagrees": ("F16", "hf_quant_config.json and config.json declare the same"),
    # scales
    "scale-nan": ("F7", "no block scale is NaN, negative or infinite"),
    "scale-cast": ("F20", "block scales have the size of scales: E8M0 bytes were not cast as numbers"),
    "scalar-invalid": ("", "a tensor or input scale is positive and finite"),
    "input-scale-reciprocal": ("F3", "an input scale multiplies: activation amax / 2688, or its reciprocal by name"),
    "tensor-scale-reciprocal": ("F3", "a tensor scale multiplies: weight amax / 2688, or its reciprocal by name"),
    "input-scale-near-zero": ("F15", "the input scale of a weight that calibration never reached is a usable one"),
    "gate-up-scales-differ": ("F2", "gate and up of an expert share their tensor scale"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule broken in the same way by one or more tensors, files or fields.

    Attributes:
        rule: key of RULES, or a short name for a note.
        subjects: what it is about, as stored.
        text: the first one's sentence: what, found, allowed.
        remedy: what to do.
        got: what was found (of the first), where that is one thing.
        allowed: what would have been right (for the first).
        is_note: worth knowing, but breaks no rule.
    """

    rule: str
    subjects: tuple[str, ...]
    text: str
    remedy: str = ""
    got: str = ""
    allowed: str = ""
    is_note: bool = False

    @property
    def fault(self) -> str:
        """Fault of docs/faults.md this rule catches, or ""."""
        return RULES[self.rule][0] if self.rule in RULES else ""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON content, with all subjects."""
        return {
            "rule": self.rule,
            "fault": self.fault or None,
            "text": self.text,
            "got": self.got or None,
            "allowed": self.allowed or None,
            "remedy": self.remedy or None,
            "count": len(self.subjects),
            "tensors": list(self.subjects),
        }


_NUMBER = re.compile(r"\d+")


def group(problems: Iterable[Problem]) -> list[Finding]:
    """Put problems together that differ only in the names and numbers of layers and experts, in order of appearance."""
    groups: dict[tuple[str, str, str, str], list[Problem]] = {}
    for problem in problems:
        layerless = _NUMBER.sub("#", problem.subject)
        said = _NUMBER.sub("#", problem.text.replace(problem.subject, ""))
        key = (problem.rule, layerless.rpartition(".")[2], said, _NUMBER.sub("#", problem.remedy))
        groups.setdefault(key, []).append(problem)
    findings = []
    for members in groups.values():
        first = members[0]
        subjects = tuple(dict.fromkeys(member.subject for member in members))
        findings.append(Finding(first.rule, subjects, first.text, first.remedy, first.got, first.allowed))
    return findings
