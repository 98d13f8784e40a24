# SPDX-License-Identifier: Apache-2.0
"""docs/serving.md: its examples run as printed, its tables of options and metrics are complete. And the example."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from megamoe.cli import cli

from .test_run import Process, serving

ADDRESS = "http://127.0.0.1:8000"
SENDS_JSON = ("v1", "ready")


@pytest.fixture(scope="module")
def document(repository: pathlib.Path) -> str:
    return (repository / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundled() -> Iterator[Process]:
    with serving() as process:
        yield process


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def test_the_start_as_printed(document: str, bundled: Process) -> None:
    printed = blocks(document, "text")[0].splitlines()
    assert printed[0] == bundled.lines[0].strip()
    pattern = re.escape(printed[1]).replace(re.escape(ADDRESS), r"\S+").replace(r"0\.2", r"[\d.]+")
    assert re.fullmatch(pattern, bundled.lines[1].strip())


def test_curl(document: str, bundled: Process) -> None:
    assert shutil.which("curl"), "curl is not installed"
    lines = [line for block in blocks(document, "bash") for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) == 5
    for line in lines:
        command = shlex.split(line.replace(ADDRESS, bundled.url))
        done = subprocess.run([*command, "--fail-with-body"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("[DONE]" in done.stdout) == ('"stream": true' in line) and done.stdout


def test_python(document: str, bundled: Process) -> None:
    code = "\n".join(blocks(document, "python")).replace(ADDRESS, bundled.url)
    assert "openai.OpenAI(" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_is_in_the_table(document: str) -> None:
    command = cli.commands["serve"]
    options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    listed = set(re.findall(r"`(--[a-z-]+)`", document.split("## Options")[1].split("## How")[0]))
    assert options == listed


def test_every_metric_is_in_the_table(document: str, bundled: Process) -> None:
    text = httpx2.get(f"{bundled.url}/metrics").text
    shown = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)}
    shown = {name for name in shown if not name.endswith("_created")}
    listed = set(re.findall(r"`(megamoe_\w+)`", document.split("## Metrics")[1]))
    assert shown == listed


def test_every_path_is_in_the_table(document: str, bundled: Process) -> None:
    paths = set(httpx2.get(f"{bundled.url}/openapi.json").json()["paths"])
    listed = set(re.findall(r"`(?:GET|POST) (/[^`]*)`", document))
    assert {path.replace("{model}", "{id}") for path in paths} | {"/", "/docs", "/openapi.json"} == listed


def test_the_example(repository: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/serve_and_ask.py"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ready at" in done.stdout and "'language'" in done.stdout and "exit code 0" in done.stdout
