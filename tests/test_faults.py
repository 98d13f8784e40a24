# SPDX-License-Identifier: Apache-2.0
"""docs/faults.md names a test file for every fault, and each of them deals with it."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
REQUIRED = {
    "F1",
    "F2",
    "F3",
    "F4",
    "F5",
    "F6",
    "F7",
    "F8",
    "F9",
    "F10",
    "F11",
    "F12",
    "F13",
    "F14",
    "F15",
    "F16",
    "F17",
    "F18",
    "F19",
    "F20",
    "F21",
    "F22",
    *(f"C{number}" for number in range(1, 17)),
}


def test_every_fault_has_tests_that_exist_and_mention_it() -> None:
    rows = re.findall(r"^\| ([FC]\d+) \|.*?\| (`tests/.*`) \|$", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    assert {fault for fault, _ in rows} >= REQUIRED
    problems = []
    for fault, cell in rows:
        for name in re.findall(r"`([^`]+)`", cell):
            path = ROOT / name
            if not path.is_file():
                problems.append(f"{fault}: {name} does not exist")
            elif not re.search(rf"\b{fault}\b|test_{fault.lower()}_", path.read_text()):
                problems.append(f"{fault}: {name} does not mention it")
    assert not problems, "\n".join(problems)
