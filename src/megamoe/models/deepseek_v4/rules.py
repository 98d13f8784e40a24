# SPDX-License-Identifier: Apache-2.0
"""The rules that every command checks a checkpoint by, and what they make of a broken one.

There is one list. examine.py applies it to headers, config.json and samples; `inspect` prints what it finds, `load`,
`serve` and `convert` refuse or warn by the same findings, in the same sentences. What a command does about a rule is
part of the rule (`Level`), so that no two commands can disagree.

A note is worth knowing and breaks no rule: what was checked only in part, or is spelled in a way that this package
reads and others may not.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Collection, Iterable
from typing import Any

from megamoe.checkpoint.problem import CheckpointError, Problem


class Level(enum.Enum):
    """What follows from a broken rule. For `inspect` all of them are findings."""

    REFUSED = "refused"  # nothing loads or converts it
    UNLESS_ACCEPTED = "refused unless accepted"  # --accept RULE goes on: the numbers may be meant
    WARNED = "warned about"  # this package computes the right thing, or cannot know; other readers may not


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        fault: fault of docs/faults.md that breaks it, or "".
        holds_when: what it demands.
        level: what commands do when it is broken.
    """

    fault: str
    holds_when: str
    level: Level


def _refused(fault: str, holds_when: str) -> Rule:
    return Rule(fault, holds_when, Level.REFUSED)


def _unless_accepted(fault: str, holds_when: str) -> Rule:
    return Rule(fault, holds_when, Level.UNLESS_ACCEPTED)


def _warned(fault: str, holds_when: str) -> Rule:
    return Rule(fault, holds_when, Level.WARNED)


RULES: dict[str, Rule] = {
    # files
    "shard-truncated": _refused("", "every shard is as long as its header says"),
    "shard-overlap": _refused("", "no byte of a shard belongs to two tensors"),
    "shard-gap": _refused("", "every byte of a shard belongs to a tensor"),
    "shard-header": _refused("", "every shard starts with a readable safetensors header"),
    "shard-missing": _refused("", "every shard is there"),
    "index-unreadable": _refused("", "the index is a map of tensor names to shards in the same folder"),
    "index-disagrees": _refused("F14", "index and shards list the same tensors in the same places"),
    "file-hash": _refused("", "a file that a hub cache names by its hash has that hash (looked at by inspect --hash)"),
    "conversion-unfinished": _refused("", "a conversion has come to its end"),
    "tensor-twice": _refused("", "a tensor is stored once, under one spelling of its name"),
    # tensors
    "tensor-missing": _refused("F14", "every tensor of the inventory is there"),
    "tensor-unknown": _refused("F14", "every tensor is in the inventory"),
    "tensor-shape": _refused("", "a tensor has the shape the configuration gives it"),
    "tensor-transposed": _refused("", "a tensor is stored [out, in]"),
    "tensor-dtype": _refused("", "a tensor has a dtype the loader can read"),
    "codes-orientation": _refused("F5", "FP4 codes are packed along the input dimension"),
    "scales-transposed": _refused("F4", "block scales are stored [out, in / block]"),
    "scale-dtype": _refused("F20", "block scales have the dtype of their format; E8M0 bytes are not numbers"),
    "experts-mixed": _warned("F16", "the routed experts of a layer share one format"),
    "kv-norm-renamed": _warned("F17", "the norm of the latent is called kv_norm"),
    # configuration
    "config-unreadable": _refused("", "config.json is there and is JSON"),
    "config-invalid": _refused("", "config.json describes a model this package computes"),
    "config-layers": _refused("", "config.json and tensors have the same number of layers"),
    "config-attention": _refused("", "config.json and tensors agree on what each layer attends to"),
    "config-fallback-layer-types": _refused("", "layer_types is not the fallback pattern of transformers"),
    "config-hash-layers": _refused("", "config.json and tensors agree on which layers are routed by token id"),
    "config-experts": _refused("", "config.json and tensors have the same number of experts"),
    "config-size": _refused("", "config.json and tensors agree on the model's dimensions"),
    "config-draft": _refused("", "config.json and tensors agree on the DSpark draft"),
    "config-draft-unannounced": _warned("", "config.json has the dspark_* fields of the DSpark draft that is stored"),
    "config-release": _warned("", "a released model's config.json has the release's values where no tensor shows them"),
    "config-format": _warned("F16", "config.json declares the formats the tensors have, module by module"),
    "quant-config-disagrees": _warned("F16", "hf_quant_config.json and config.json declare the same"),
    # scales
    "scale-nan": _refused("F7", "no block scale is NaN, negative or infinite"),
    "scale-cast": _unless_accepted("F20", "block scales have the size of scales: E8M0 bytes were not cast as numbers"),
    "scale-zero": _unless_accepted("", "block scales over codes that are not zero are not all zero"),
    "scalar-invalid": _refused("", "a tensor or input scale is positive and finite"),
    "input-scale-reciprocal": _unless_accepted(
        "F3", "an input scale multiplies: activation amax / 2688, or its reciprocal by name"
    ),
    "tensor-scale-reciprocal": _unless_accepted(
        "F3", "a tensor scale multiplies: weight amax / 2688, or its reciprocal by name"
    ),
    "input-scale-near-zero": _warned(
        "F15", "the input scale of a weight that calibration never reached is a usable one"
    ),
    "gate-up-scales-differ": _warned("F2", "gate and up of an expert share their tensor scale"),
    # values
    "values-zero": _unless_accepted("", "no matrix, norm, embedding or head is all zero"),
    "values-not-finite": _refused("", "no value is NaN or infinite"),
    "expert-table": _refused("", "a table of experts names experts that exist"),
    "draft-copy": _refused("", "a draft's copy of the embedding or the head equals it"),
    "not-exact": _refused(
        "", "every block has an equal in the form it is loaded in: MXFP4 in NVFP4, FP8 of wo_a in its groups"
    ),
}


MAX_NAMED = 4  # subjects of a finding that a line names


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
        return RULES[self.rule].fault if self.rule in RULES else ""

    @property
    def level(self) -> Level | None:
        """What commands do about it; None for a note."""
        return RULES[self.rule].level if not self.is_note else None

    def __str__(self) -> str:
        """Return the line that errors and warnings print: the first subject's sentence, and how many are like it."""
        others = self.subjects[1 : 1 + MAX_NAMED]
        rest = len(self.subjects) - 1 - len(others)
        more = f" (so are {', '.join(others)}{f' and {rest:,} more' if rest else ''})" if others else ""
        return f"{self.text}{more} {self.remedy}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON content, with all subjects."""
        return {
            "rule": self.rule,
            "fault": self.fault or None,
            "level": self.level.value if self.level is not None else None,
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


def refuse(where: str, problems: Iterable[Problem], accept: Collection[str] = ()) -> tuple[Finding, ...]:
    """Refuse a checkpoint that breaks rules, and return what there is to warn about.

    Args:
        where: what is being read, for the message.
        problems: everything that was found.
        accept: rules that may be broken; `check_accept` has looked at them.

    Returns:
        The findings that do not stop anything: warnings, and what was accepted.

    Raises:
        CheckpointError: a rule is broken that must not be; all of them are listed, alike ones together.
    """
    problems = tuple(problems)
    stopping = [problem for problem in problems if _stops(problem.rule, accept)]
    if stopping:
        raise refusal(where, stopping)
    return tuple(group(problems))


def refusal(where: str, problems: Iterable[Problem]) -> CheckpointError:
    """Return the error that lists problems, alike ones together, and says what can be accepted."""
    problems = tuple(problems)
    findings = group(problems)
    lines = []
    for finding in findings:
        is_acceptable = finding.level is Level.UNLESS_ACCEPTED
        lines.append(f"{finding}{f' To go on all the same: --accept {finding.rule}.' if is_acceptable else ''}")
    error = CheckpointError.listing(where, lines)
    error.problems = tuple(str(problem) for problem in problems)
    error.rules = tuple(dict.fromkeys(finding.rule for finding in findings))
    return error


def _stops(rule: str, accept: Collection[str]) -> bool:
    level = RULES[rule].level
    return level is Level.REFUSED or (level is Level.UNLESS_ACCEPTED and rule not in accept)


def check_accept(accept: Iterable[str]) -> tuple[str, ...]:
    """Return the rules to accept, sorted, without repetition.

    Raises:
        ValueError: a name is no rule, or the rule cannot be accepted.
    """
    allowed = [name for name, rule in RULES.items() if rule.level is Level.UNLESS_ACCEPTED]
    for name in accept:
        if name not in allowed:
            raise ValueError(f"accept: {name!r} is no rule that can be accepted; these can: {', '.join(allowed)}.")
    return tuple(sorted(set(accept)))
