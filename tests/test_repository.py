# SPDX-License-Identifier: Apache-2.0
"""What the repository says about itself is true: commands exist, links lead somewhere, files have headers."""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import click
import pytest

import megamoe
from megamoe.cli import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    "tools/tiny_model/README.md",
]
MIB = 2**20
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def files(repository: pathlib.Path) -> list[pathlib.Path]:
    """Every file that belongs to the repository: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.decode().split("\0")
        return [path for name in names if name and (path := repository / name).is_file()]
    hidden = {".venv", ".git"}  # an unpacked archive
    return [path for path in repository.rglob("*") if path.is_file() and not hidden & set(path.parts)]


def blocks(repository: pathlib.Path, language: str) -> list[str]:
    """Return the fenced blocks of a language in all documents."""
    texts = [(repository / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    return [body for text in texts for found, body in BLOCK.findall(text) if found == language]


# documents


@pytest.mark.parametrize("name", [*DOCUMENTS, "LICENSE", "Makefile", "constraints.txt", ".ci/run"])
def test_files_exist(repository: pathlib.Path, name: str) -> None:
    assert (repository / name).stat().st_size > 200 or name == ".ci/run"


def test_links_lead_somewhere(repository: pathlib.Path) -> None:
    broken = []
    for name in DOCUMENTS:
        path = repository / name
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{name}: {target}")
    assert broken == []


def test_commands_in_documents_exist(repository: pathlib.Path) -> None:
    lines = [line for block in blocks(repository, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    commands = [words for words in commands if words]
    assert len(commands) > 5
    problems = [f"{shlex.join(words)}: {why}" for words in commands if (why := problem(words, repository))]
    assert problems == []


def problem(words: list[str], repository: pathlib.Path) -> str | None:
    """Return why a command in a document cannot work, or None."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        missing = [word for word in arguments if "=" not in word and word not in targets]
        return f"the Makefile has no target {missing}" if missing or not arguments else None
    if program == "megamoe":
        return megamoe_problem(arguments)
    if program in ("python", "python3"):
        paths = [word.split("::")[0] for word in arguments if word.split("::")[0].endswith(".py")]
        missing = [path for path in paths if not (repository / path).exists()]
        return f"no file {missing}" if missing else None
    if program in ("apt-get", "cd", "curl", "export", "git", "jq", "pip", "source"):  # nothing of ours to check
        return None
    return f"unknown program {program!r}"


def megamoe_problem(arguments: list[str]) -> str | None:
    """Return why the command line would be refused, without running it."""
    if "|" in arguments:
        arguments = arguments[: arguments.index("|")]
    if arguments in (["--help"], ["--version"]):
        return None
    try:
        with cli.make_context("megamoe", list(arguments)) as context:
            command = cli.get_command(context, arguments[0])
            if command is None:
                return f"No such command {arguments[0]!r}"
            command.make_context(arguments[0], arguments[1:], parent=context)
    except click.ClickException as error:
        return error.format_message()
    return None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("make dmeo", "no target"),
        ("megamoe genrate --prompt x", "No such command"),
        ("megamoe generate --promt x", "No such option"),
        ("megamoe generate", "Missing option"),
        ("python tools/no_such_file.py", "no file"),
        ("frobnicate", "unknown program"),
    ],
)
def test_a_wrong_command_is_found(repository: pathlib.Path, line: str, reason: str) -> None:
    assert reason in (problem(shlex.split(line), repository) or "")


def test_python_in_the_readme_runs(repository: pathlib.Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    code = "\n".join(body for language, body in BLOCK.findall(readme) if language == "python")
    assert "megamoe.load" in code and "megamoe.LLM" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# the package


def test_version(repository: pathlib.Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", megamoe.__version__)
    assert importlib.metadata.version("megamoe") == megamoe.__version__
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    released = megamoe.__version__.split(".dev")[0]
    assert f"## {released}" in changelog


def test_public_names() -> None:
    assert set(megamoe.__all__) == {"LLM", "SamplingParams", "__version__", "load"}
    assert set(megamoe.__all__) <= set(dir(megamoe))
    for name in megamoe.__all__:
        assert getattr(megamoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Llm'; it offers LLM"):
        _ = megamoe.Llm


def test_importing_the_package_is_free(repository: pathlib.Path) -> None:
    code = "import sys, megamoe; sys.exit(bool({'torch', 'tokenizers', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0


def test_dependencies_are_constrained(repository: pathlib.Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[<>=\[ ]", one)[0].lower() for one in wanted} - {project["name"]}  # an extra of ours
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert names <= pinned, names - pinned
    assert "torch==2.13.0" in lines and all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines)


def test_dependencies_are_used(repository: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Every runtime dependency is imported by the package; numpy by torch, when a tensor becomes a buffer."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=\[ ]", one)[0] for one in project["dependencies"]}
    source = "\n".join(path.read_text(encoding="utf-8") for path in (repository / "src").rglob("*.py"))
    unused = {name for name in names if not re.search(rf"^\s*(import|from) {name}\b", source, re.MULTILINE)}
    assert unused <= {"numpy"} and (".numpy()" in source or "numpy" not in names)


# files


def test_python_files_have_a_header(files: list[pathlib.Path], repository: pathlib.Path) -> None:
    bare = []
    for path in files:
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            if not text.startswith("# SPDX-License-Identifier: Apache-2.0\n") or not ast.get_docstring(ast.parse(text)):
                bare.append(str(path.relative_to(repository)))
    assert bare == []


def test_nothing_is_caught_to_choose_a_path(files: list[pathlib.Path], repository: pathlib.Path) -> None:
    wide = []
    for path in files:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ExceptHandler):
                    names = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)} if node.type else {""}
                    if names & {"", "Exception", "BaseException"}:
                        wide.append(f"{path.relative_to(repository)}:{node.lineno}")
    assert wide == []


def test_no_home_directories_in_texts(files: list[pathlib.Path], repository: pathlib.Path) -> None:
    home = re.compile(r"/(home|Users)/\w")
    found = [
        str(path.relative_to(repository))
        for path in files
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".yml"}
        and path.parent.name not in {"tiny", "master"}
        and "heldout" not in path.name
        and path.name != "tokenizer.json"
        and home.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_tree_stays_small(files: list[pathlib.Path], repository: pathlib.Path) -> None:
    assert sum(path.stat().st_size for path in files) <= 40 * MIB
    bundled = repository / "src/megamoe/models/deepseek_v4/tiny"
    names = {path.name for path in bundled.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in bundled.iterdir()) <= 16 * MIB
    tracked = {path for path in files if path.parent == bundled}
    assert tracked == set(bundled.iterdir()), "git ignores a part of the bundled model"


def test_the_bundled_model_is_package_data(repository: pathlib.Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["package-data"]["megamoe.models.deepseek_v4"] == ["tiny/*"]


def test_ci_runs_tests_and_lint(repository: pathlib.Path) -> None:
    path = repository / ".ci/run"
    assert path.stat().st_mode & 0o111
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines.index("make test") < lines.index("make lint") and "set -euo pipefail" in lines
    assert "make test-kernels" in lines  # every kernel is compiled where there is no GPU
