# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. The table below is the arrows of docs/architecture.md; every import in the package is checked.

Imports are read from the syntax tree, so those inside functions and under TYPE_CHECKING count as well, and so do
`importlib.import_module("megamoe…")` and `__import__`.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import pytest

# Room → rooms it may import. A room may always import itself. verify, bench and cli may import anything.
ALLOWED: dict[str, set[str]] = {
    "formats": set(),
    "kernels": {"formats"},
    "ops": {"formats", "kernels"},
    "cache": {"formats"},
    "checkpoint": {"formats"},
    "parallel": set(),
    "models": {"ops", "cache", "parallel", "checkpoint", "formats"},
    "engine": {"models", "ops", "cache", "parallel", "checkpoint", "formats"},
    "text": {"engine"},
    "server": {"text", "engine"},
    "integrations": {"models", "cache", "ops", "formats", "checkpoint"},  # a second filler of the model's StepPlan
    "__init__": {"text", "engine", "models"},  # the public names
}
ANYTHING = {"verify", "bench", "cli"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: `module` is dotted and absolute, `where` is path:line."""

    importer: str
    module: str
    where: str


def imports_of(root: pathlib.Path) -> Iterator[Import]:
    """Yield every import in the package whose directory is `root`; its name is the directory's."""
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        package = parts[:-1]  # what a relative import starts from; for __init__.py it is the package itself
        importer = ".".join(package if parts[-1] == "__init__" and len(parts) > 2 else parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _modules(node, package):
                yield Import(importer, module, f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 0)}")


def _modules(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        start = ".".join((*base, *([node.module] if node.module else [])))
        return [f"{start}.{alias.name}" for alias in node.names]  # a name or a submodule: both live in the same room
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__"):
            return [str(node.args[0].value)]
    return []


def room_of(module: str, package: str) -> str | None:
    """Return the first part below the package, "__init__" for the package itself, None for another package."""
    parts = module.split(".")
    if parts[0] != package:
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def architecture_of(module: str, root: pathlib.Path) -> str | None:
    """Return the model folder a module lies in, if it lies in one."""
    parts = module.split(".")
    inside = len(parts) > 2 and parts[1] == "models" and (root / "models" / parts[2]).is_dir()
    return parts[2] if inside else None


def violation(found: Import, root: pathlib.Path) -> str | None:
    """Return why an import is not allowed, or None."""
    room = room_of(found.importer, root.name) or ""
    target = room_of(found.module, root.name)
    if target is None:
        top = found.module.split(".")[0]
        if room == "formats" and top != "torch" and top not in sys.stdlib_module_names:
            return "formats may import only torch and the standard library"
        return None
    if target not in {*ALLOWED, *ANYTHING}:
        target = "__init__"  # a name that the package itself offers, such as __version__
    if room in ANYTHING:
        return None
    if room not in ALLOWED:
        return f"{room} is not a room; add it to the table and to docs/architecture.md"
    if target == room:
        ours, theirs = architecture_of(found.importer, root), architecture_of(found.module, root)
        return "models never import each other" if ours and theirs and ours != theirs else None
    if room == "ops" and target == "kernels" and found.importer != f"{root.name}.ops.dispatch":
        return "kernels are imported by ops/dispatch.py only"
    if room == "text" and target == "models" and found.module.split(".")[3:4] == ["chat"]:
        return None
    if target not in ALLOWED[room]:
        return f"{room} may not import {'the package itself' if target == '__init__' else target}"
    return None


def violations(root: pathlib.Path) -> list[str]:
    """Return every violation in a package as `path:line: reason (module)`."""
    found = ((one, violation(one, root)) for one in imports_of(root))
    return [f"{one.where}: {reason} ({one.module})" for one, reason in found if reason]


def test_the_package_follows_the_arrows(repository: pathlib.Path) -> None:
    root = repository / "src" / "megamoe"
    assert len(list(imports_of(root))) > 100, "the walk must find the package"
    assert violations(root) == []


def test_every_room_is_in_the_table(repository: pathlib.Path) -> None:
    rooms = {path.stem for path in (repository / "src" / "megamoe").iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__pycache__"} <= {*ALLOWED, *ANYTHING}


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("formats/nvfp4.py", "import numpy", "formats may import only torch"),
        ("formats/nvfp4.py", "from megamoe.ops import check", "formats may not import ops"),
        ("formats/nvfp4.py", "from ..ops.check import check", "formats may not import ops"),
        ("formats/nvfp4.py", "import megamoe", "formats may not import the package itself"),
        ("formats/__init__.py", "from ..cache import pages", "formats may not import cache"),
        ("kernels/linear/linear_sm90.py", "from megamoe.ops.check import check", "kernels may not import ops"),
        ("ops/linear.py", "from megamoe.kernels import KERNELS", "kernels are imported by ops/dispatch.py only"),
        (
            "ops/linear.py",
            "import importlib\nimportlib.import_module('megamoe.kernels.rows.rms_norm')",
            "kernels are",
        ),
        ("ops/linear.py", "from megamoe.models.recipe import Recipe", "ops may not import models"),
        ("cache/pages.py", "import megamoe.ops.check", "cache may not import ops"),
        ("checkpoint/reader.py", "from megamoe import cache", "checkpoint may not import cache"),
        ("models/deepseek_v4/model.py", "from megamoe.engine import request", "models may not import engine"),
        ("models/deepseek_v4/model.py", "from megamoe.models.other import model", "models never import each other"),
        ("models/deepseek_v4/model.py", "from ..other.model import Model", "models never import each other"),
        ("models/deepseek_v4/model.py", "from megamoe import load", "models may not import the package itself"),
        ("engine/generate.py", "def f():\n    from megamoe.text import llm", "engine may not import text"),
        ("text/llm.py", "from megamoe.ops.sample import sample", "text may not import ops"),
        ("text/llm.py", "from megamoe.models.load import load", "text may not import models"),
        ("server/app.py", "from megamoe.models.load import load", "server may not import models"),
        ("integrations/vllm/moe.py", "from megamoe.engine import engine", "integrations may not import engine"),
        ("engine/generate.py", "from megamoe.verify import compare", "engine may not import verify"),
        ("text/llm.py", "from megamoe.cli import main", "text may not import cli"),
        ("attic/old.py", "from megamoe.formats import nvfp4", "attic is not a room"),
    ],
)
def test_a_bad_import_is_found(tmp_path: pathlib.Path, file: str, line: str, reason: str) -> None:
    found = violations(small_package(tmp_path, file, line))
    assert len(found) == 1 and reason in found[0] and found[0].startswith(f"megamoe/{file}:"), found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("formats/nvfp4.py", "import torch.nn.functional\nimport dataclasses\nfrom . import e2m1"),
        ("ops/dispatch.py", "from megamoe.kernels import KERNELS"),
        ("ops/linear.py", "from ..formats.nvfp4 import NvFp4Tensor"),
        ("kernels/linear/linear_sm90.py", "import cutlass"),
        ("models/deepseek_v4/model.py", "from megamoe.models.recipe import Recipe\nfrom .config import ModelConfig"),
        ("models/load.py", "from megamoe.models.deepseek_v4.model import Model"),
        ("text/llm.py", "from megamoe.models.deepseek_v4.chat import encode"),
        ("server/app.py", "from megamoe.text.llm import LLM"),
        ("cli.py", "import megamoe\nfrom megamoe.kernels import KERNELS"),
        ("verify/ops.py", "from megamoe.ops import linear\nimport numpy"),
        ("__init__.py", "from megamoe.text.llm import LLM"),
    ],
)
def test_an_allowed_import_is_not(tmp_path: pathlib.Path, file: str, line: str) -> None:
    assert violations(small_package(tmp_path, file, line)) == []


def small_package(tmp_path: pathlib.Path, file: str, line: str) -> pathlib.Path:
    """Return a package called megamoe with two model folders and one file."""
    root = tmp_path / "megamoe"
    for folder in ("models/deepseek_v4", "models/other"):
        (root / folder).mkdir(parents=True)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n", encoding="utf-8")
    return root
