# SPDX-License-Identifier: Apache-2.0
"""Compile keys: what names an object, what makes it stale, and what is refused before anything is compiled."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
import shutil

import pytest

from megamoe.kernels import KERNELS
from megamoe.kernels import compile as compiling
from megamoe.kernels.compile import CompileError, Request, compile_objects, num_workers, source_hash
from megamoe.kernels.rows.rms_norm_config import Config
from megamoe.models.deepseek_v4.shapes import op_shapes

CONFIG = Config(4096, "bf16", "bf16", "bf16")


# keys


def test_a_request_names_module_and_every_field() -> None:
    request = Request.of(CONFIG)
    assert str(request) == "rows.rms_norm[width=4096,x=bf16,weight=bf16,out=bf16]"
    assert request.config() == CONFIG
    assert request.symbol == Request.of(Config(4096, "bf16", "bf16", "bf16")).symbol


def test_f6_another_value_is_another_object() -> None:
    """A kernel compiled for one size or dtype is never taken for another."""
    requests = {Request.of(CONFIG)}
    for field, value in (("width", 4104), ("x", "f32"), ("weight", None), ("out", "f32")):
        requests.add(Request.of(dataclasses.replace(CONFIG, **{field: value})))
    requests.add(Request("rows.quantize_nvfp4", Request.of(CONFIG).values))
    assert len({one.symbol for one in requests}) == 6


# source hash


@pytest.fixture
def copied(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A copy of kernels/ that source_hash looks at."""
    root = tmp_path / "kernels"
    shutil.copytree(pathlib.Path(compiling.__file__).parent, root)
    monkeypatch.setattr(compiling, "__file__", str(root / "compile.py"))
    source_hash.cache_clear()
    yield root
    source_hash.cache_clear()


def hash_after(path: pathlib.Path) -> str:
    path.write_text(path.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    source_hash.cache_clear()
    return source_hash("rows.rms_norm")


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("rows/rms_norm.py", False),  # chooses and launches
        ("rows/rms_norm_config.py", True),
        ("rows/rms_norm_device.py", True),
        ("parts/launch.py", False),
        ("parts/rows.py", True),  # imported by the device half
        ("parts/rows_device.py", True),
        ("parts/mma_device.py", False),
        ("rows/quantize_nvfp4_device.py", False),
        ("store.py", False),
    ],
)
def test_source_hash_follows_imports(copied: pathlib.Path, file: str, counts: bool) -> None:
    before = source_hash("rows.rms_norm")
    assert (hash_after(copied / file) != before) is counts


def test_source_hash_reaches_through_imports(copied: pathlib.Path) -> None:
    before = source_hash("rows.quantize_nvfp4")
    path = copied / "parts/ptx_device.py"  # quantize_nvfp4_device -> nvfp4_device -> ptx_device
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    source_hash.cache_clear()
    assert source_hash("rows.quantize_nvfp4") != before


# refusals


def test_refusals(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request.of(CONFIG)
    with pytest.raises(ValueError, match="--arch must be one of"):
        compile_objects([request], "sm_90a", tmp_path)
    monkeypatch.setattr(compiling, "dsl_version", lambda: None)
    with pytest.raises(
        CompileError, match=r"nvidia-cutlass-dsl is not installed here\. Install megamoe\[cuda\], or build"
    ):
        compile_objects([request], "sm90a", tmp_path)
    monkeypatch.setattr(compiling, "dsl_version", lambda: "1")
    monkeypatch.setattr(compiling, "_c_compiler", lambda: None)
    with pytest.raises(CompileError, match="no C compiler"):
        compile_objects([request], "sm90a", tmp_path)


def test_a_kernel_that_does_not_compile_is_told_with_the_compilers_words(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_require_tools", lambda: None)
    with pytest.raises(CompileError, match=r"(?s)for sm90a does not compile.*rows\.no_such_kernel"):
        compile_objects([Request("rows.no_such_kernel", ())], "sm90a", tmp_path)


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_COMPILE_WORKERS", "3")
    assert (num_workers(0), num_workers(2), num_workers(9)) == (1, 2, 3)
    monkeypatch.setenv("MEGAMOE_COMPILE_WORKERS", "many")
    with pytest.raises(ValueError, match="MEGAMOE_COMPILE_WORKERS must be a positive number; got 'many'"):
        num_workers(2)
    monkeypatch.delenv("MEGAMOE_COMPILE_WORKERS")
    assert 1 <= num_workers(100) <= 8


def test_device_halves_exist_for_every_request_module() -> None:
    for module in ("rows.rms_norm", "router.route_scores", "hyper_connection.hyper_connection_pre"):
        assert importlib.util.find_spec(f"megamoe.kernels.{module}_device") is not None


def test_nothing_else_compiles(repository: pathlib.Path) -> None:
    """One place makes objects; device halves describe kernels, and only that place imports them."""
    root = repository / "src/megamoe"
    calls = re.compile(r"\bcute\.compile\(|\bimport_module\([^)]*_device|\bimport triton\b|cpp_extension|nvrtc")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if calls.search(path.read_text("utf-8"))}
    assert found == {"kernels/compile.py"}
    for path in root.rglob("*.py"):
        if not path.stem.endswith("_device"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) megamoe\.kernels\.\S*_device", text, re.MULTILINE), path


@pytest.mark.parametrize("module", sorted({module for table in KERNELS.values() for module in table.values()}))
def test_compile_keys_are_frozen_and_plain(module: str) -> None:
    """dtypes, static sizes and tile choices: what is in a key decides the object, and nothing else may."""
    op = next(op for op, table in KERNELS.items() if module in table.values())
    configs = list(importlib.import_module(module).configs(op_shapes(op)[0].dims))
    assert configs
    for config in configs:
        assert type(config).__dataclass_params__.frozen
        assert all(isinstance(value, str | int | bool | None) for value in dataclasses.asdict(config).values())
