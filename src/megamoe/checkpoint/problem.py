# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a checkpoint, as data: a rule, a subject and a sentence, and the error made of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

MAX_LISTED = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        rule: short name of the rule that was broken, for example "shard-truncated"; docs/checkpoints.md lists all.
        subject: the tensor, file or config.json key it is about, as stored.
        text: the sentence that says what, what was found and what is allowed.
        remedy: what to do about it, a sentence of its own.
        got: what was found, where that is one thing.
        allowed: what would have been right.
    """

    rule: str
    subject: str
    text: str
    remedy: str = ""
    got: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        """Return the line that error messages print."""
        return f"{self.text} {self.remedy}".rstrip()


class CheckpointError(ValueError):
    """A checkpoint or its config.json cannot be used; the message names every offender.

    Attributes:
        problems: one line each, all of them; empty where the error was not made by `listing`.
        rules: names of the rules that were broken, where rules were what refused it.
    """

    problems: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @classmethod
    def listing(cls, where: str, problems: Iterable[str | Problem]) -> CheckpointError:
        """Make one error of all problems.

        Args:
            where: what was being read.
            problems: one line each, at least one. The first 20 are printed, the others counted.
        """
        lines = [str(problem) for problem in problems]
        if len(lines) == 1:
            error = cls(f"{where}: {lines[0]}")
        else:
            shown = [f"\n  {line}" for line in lines[:MAX_LISTED]]
            more = f"\n  and {len(lines) - MAX_LISTED} more." if len(lines) > MAX_LISTED else ""
            error = cls(f"{where}: {len(lines)} problems:{''.join(shown)}{more}")
        error.problems = tuple(lines)
        return error
