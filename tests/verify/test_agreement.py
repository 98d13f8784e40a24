# SPDX-License-Identifier: Apache-2.0
"""inspect, load, serve and convert run one list of rules: over every damaged checkpoint they say the same.

Row C2 of docs/faults.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import pytest
import tokenizers

import megamoe
from megamoe.checkpoint.problem import CheckpointError
from megamoe.cli import main
from megamoe.engine import engine
from megamoe.models.deepseek_v4.convert import ConvertOptions, plan
from megamoe.models.deepseek_v4.rules import RULES, Level
from megamoe.verify.checkpoint import inspect_checkpoint

from ..fake_files import Files
from .test_checkpoint import FAULTS, FILE_FAULTS, layouts

__all__ = ["layouts"]  # a fixture


@dataclasses.dataclass(frozen=True)
class Said:
    """What a command made of a checkpoint.

    Attributes:
        refused: rules it was refused by.
        text: everything that was said, in one line.
    """

    refused: tuple[str, ...]
    text: str


def line(text: str) -> str:
    """Return a text as one line."""
    return " ".join(text.split())


def by_load(directory: pathlib.Path) -> Said:
    """Load it in a recipe that mixes formats freely."""
    try:
        model = megamoe.load(directory, recipe="exact")
    except CheckpointError as error:
        return Said(error.rules, line(str(error)))
    return Said((), line("\n".join(model.notes)))


def by_convert(directory: pathlib.Path) -> Said:
    """Plan a conversion of everything that is not NVFP4 yet."""
    options = ConvertOptions(experts="requantize", attention="nvfp4", draft="convert")
    try:
        planned = plan(directory, options)
    except CheckpointError as error:
        return Said(error.rules, line(str(error)))
    return Said((), line("\n".join(f"{one.rule}: {one}" for one in planned.warnings)))


class Loaded(Exception):
    """Raised in place of building an engine, with the loaded model."""


def by_serve(directory: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Begin to serve it, up to the loaded model."""
    try:
        status = main(["serve", "--model", str(directory), "--recipe", "exact"])
    except Loaded as loaded:
        return Said((), line("\n".join(loaded.args[0].notes)))
    assert status == 2
    return Said(("?",), line(capsys.readouterr().err))  # a command prints no names of rules


def stop(model: object, config: object) -> None:
    """Stand for the engine."""
    raise Loaded(model)


def write_words(directory: pathlib.Path) -> None:
    """Write a tokenizer small enough for the small model."""
    words = {word: index for index, word in enumerate(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "word"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word")).save(str(directory / "tokenizer.json"))


DAMAGED: list[tuple[str, str, Callable[[Files], None] | None, Callable[[pathlib.Path], object] | None]] = [
    *((row[0], row[1], row[2], None) for row in FAULTS),
    *((row[0], "preview", None, row[1]) for row in FILE_FAULTS),
]


@pytest.mark.parametrize(
    ("layout", "inject", "break_files"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED]
)
def test_all_commands_say_the_same(layouts, tmp_path, capsys, monkeypatch, layout, inject, break_files):
    monkeypatch.setattr(engine, "Engine", stop)
    files = Files.read(layouts[layout])
    if inject is not None:
        inject(files)
    directory = files.write(tmp_path / "damaged")
    write_words(directory)
    if break_files is not None:
        break_files(directory)
    findings = inspect_checkpoint(directory).findings
    assert findings
    stopping = [one for one in findings if RULES[one.rule].level is not Level.WARNED]
    told = stopping or findings
    for said in (by_load(directory), by_convert(directory), by_serve(directory, capsys)):
        assert bool(said.refused) is bool(stopping), said
        if said.refused and said.refused != ("?",):
            assert set(said.refused) == {one.rule for one in stopping}, said
        for one in told[:20]:
            assert line(one.text) in said.text, (one.rule, said)
