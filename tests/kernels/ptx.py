# SPDX-License-Identifier: Apache-2.0
"""Reading PTX: which instructions are there, and whether a whole-warp instruction stands where lanes part ways."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"^\s*(?:@!?(?P<predicate>%p\d+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<operands>[^;]*);")
LABEL = re.compile(r"^\s*(\$?L?_*\w+):")
REGISTER = re.compile(r"%[a-z]+\d+|%tid\.[xyz]|%laneid")
DIVERGENT_SOURCES = {"%tid.x", "%tid.y", "%tid.z", "%laneid"}
WHOLE_WARP = ("shfl.sync", "bar.sync", "bar.warp", "vote.sync", "mma.sync", "barrier.")


def instructions(text: str) -> list[str]:
    """Return the names of all instructions."""
    return [found["name"] for line in text.splitlines() if (found := INSTRUCTION.match(line))]


def divergent_whole_warp_instructions(text: str) -> list[str]:
    """Return the whole-warp instructions between a branch that lanes may take differently and its label.

    A register differs between lanes if it is computed from the thread or lane index; a broadcast from one lane
    (shfl.sync.idx of lane 0) makes it alike again, and so does what is loaded from memory, for want of better
    knowledge. Only forward branches are looked at: a loop whose bounds differ between lanes would be missed.
    """
    lines = text.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := LABEL.match(line))}
    parsed = [INSTRUCTION.match(line) for line in lines]
    tainted = set(DIVERGENT_SOURCES)
    for _ in range(2):  # twice: a loop carries a register back
        for found in parsed:
            if found and not found["name"].startswith(("bra", "st.", "ld.", "bar")):
                registers = REGISTER.findall(found["operands"])
                broadcast = found["name"].startswith("shfl.sync.idx") and ", 0, 31" in found["operands"]
                if registers and not broadcast and tainted & set(registers[1:]):
                    tainted.add(registers[0])
    problems = []
    for number, found in enumerate(parsed):
        if found and found["name"].startswith("bra") and found["predicate"] in tainted:
            target = labels.get(found["operands"].strip(), -1)
            for inside in _regions(parsed, labels, number, target):
                here = parsed[inside]
                if here and here["name"].startswith(WHOLE_WARP):
                    problems.append(
                        f"line {inside + 1}: {lines[inside].strip()} inside the branch at line {number + 1}"
                    )
    return problems


def _regions(parsed: list[re.Match[str] | None], labels: dict[str, int], branch: int, target: int) -> list[int]:
    """Return the lines that only some lanes run: up to the label, and the other arm if there is one."""
    if target <= branch:
        return []
    lines = list(range(branch + 1, target))
    last = next((parsed[line] for line in reversed(lines) if parsed[line]), None)
    if last and last["name"].startswith("bra") and not last["predicate"]:
        join = labels.get(last["operands"].strip(), -1)
        lines += range(target, join)
    return lines
