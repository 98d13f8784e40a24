# SPDX-License-Identifier: Apache-2.0
"""Tuning is outside the compile key: a border, a tile choice or a limit is changed without building an object anew."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterator

import pytest

from megamoe.kernels import compile as compiling
from megamoe.kernels import pack as packing
from megamoe.kernels.compile import Request, source_hash
from megamoe.kernels.pack import build_pack, open_pack
from megamoe.kernels.plan import requests_for
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls

from .needed import Number, bump, tuning_numbers
from .objects import FakeCompiler

KNOWN = {  # definitions that hold tuning numbers, by the file they are in: the search below must find them
    "linear_stream": {"stream_limit", "MAX_TILES", "num_clusters", "LEFT_BY_CLUSTERS_OF_4"},
    "grouped_stream": {"MAX_TILES"},
    "weight_tiles_sm90": {"NVFP4_TILES", "BF16_TILES", "best_tile"},
    "expert_stream": {"STREAMED_PAIRS", "FEW_TOKENS", "SHARED_TOKENS", "POOL_PERCENT", "POOL_CHUNK", "tiles_for"},
    "expert_tiles_sm90": {"PASS_TOKENS", "pass_tokens_for"},
    "fp8_linear": {"stream_limit"},
    "fp8_grouped_linear": {"STREAM_LIMIT"},
    "fp8_stream": {"TILE_COUNTS", "MAX_BLOCKS", "EARLY_CHUNKS"},
    "fp8_tiles_sm90": {"TILE_TIMES"},
    "route_tiles": {"MANY_TOKENS"},
    "route_scores": {"SMALL_TOKENS", "tiles"},
    "hyper_connection_pre": {"CLUSTERS", "MAX_WARPS", "plan", "max_clusters"},
}


@pytest.fixture
def kernels(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A copy of kernels/ that source hashes are taken of."""
    root = tmp_path / "kernels"
    shutil.copytree(pathlib.Path(compiling.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiling, "__file__", str(root / "compile.py"))
    monkeypatch.setattr(packing, "__file__", str(root / "pack.py"))
    source_hash.cache_clear()
    yield root
    source_hash.cache_clear()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Every object of every model."""
    return requests_for([(call.op, call.dims) for model in MODELS for call in op_calls(model)], "sm90a")


def stale(requests: list[Request], change: Callable[[], None]) -> list[str]:
    """Return the objects whose sources a change touches."""
    before = {one: source_hash(one.module) for one in requests}
    source_hash.cache_clear()
    change()
    after = {one: source_hash(one.module) for one in requests}
    source_hash.cache_clear()
    return [str(one) for one in requests if before[one] != after[one]]


def found_in(numbers: list[Number]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in numbers:
        found.setdefault(one.path.stem, set()).add(one.unit)
    return found


def test_every_tuning_number_changes_and_every_object_of_a_pack_is_fresh(
    kernels: pathlib.Path, requests: list[Request], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "compile_objects", FakeCompiler())
    monkeypatch.setattr(packing, "dsl_version", lambda: "4")
    build_pack(requests, "sm90a", tmp_path / "pack", version="1", model="all")
    numbers = tuning_numbers(kernels)
    found = found_in(numbers)
    assert {
        name: units - found.get(name, set()) for name, units in KNOWN.items() if units - found.get(name, set())
    } == {}
    assert len(numbers) > 200
    before = {path: path.read_text(encoding="utf-8") for path in {one.path for one in numbers}}
    bump(numbers)
    assert all(path.read_text(encoding="utf-8") != text for path, text in before.items())
    source_hash.cache_clear()
    assert set(open_pack(tmp_path / "pack", version="1").objects) == set(requests)


LIMIT = "\n\ndef border(num_rows):\n    return 64 if num_rows <= 2048 else 16\n"
INJECTED = {  # file → what somebody adds to it; all of these files are part of objects
    "linear/linear_stream_config.py": (LIMIT, "linear.linear_stream["),
    "fp8/fp8_stream_config.py": ("\n\nEARLY = 2\n", "fp8.fp8_stream["),
    "parts/weight_stream.py": (LIMIT, "experts.expert_stream["),
    "router/route_tiles_config.py": ("\n\nMORE_TOKENS = 1536\n", "router.route_tiles["),
}


@pytest.mark.parametrize("file", INJECTED)
def test_a_tuning_number_in_a_keyed_file_is_found(kernels: pathlib.Path, requests: list[Request], file: str) -> None:
    text, name = INJECTED[file]
    (kernels / file).write_text((kernels / file).read_text(encoding="utf-8") + text, encoding="utf-8")
    source_hash.cache_clear()
    assert any(one.startswith(name) for one in stale(requests, lambda: bump(tuning_numbers(kernels))))


def test_a_default_of_a_compile_key_is_tuning(kernels: pathlib.Path, requests: list[Request]) -> None:
    """What a field is when nothing is said is a choice; the object depends on the value it is made with."""
    path = kernels / "experts/expert_stream_config.py"
    text = path.read_text(encoding="utf-8")
    assert "    pool: int\n    chunk: int\n" in text
    path.write_text(
        text.replace("    pool: int\n    chunk: int\n", "    pool: int = 10\n    chunk: int = 4\n"), "utf-8"
    )
    source_hash.cache_clear()
    assert {one.unit for one in tuning_numbers(kernels) if one.path == path} == {
        "the default of Config.pool",
        "the default of Config.chunk",
    }


def test_what_an_object_depends_on_is_no_tuning_number(kernels: pathlib.Path, requests: list[Request]) -> None:
    """The other direction: a size that the device half reads makes the objects that it is in stale, and no others."""
    path = kernels / "linear/linear_stream_config.py"
    units = found_in(tuning_numbers(kernels)).get("linear_stream_config", set())
    assert "FRAGMENT_BYTES" not in units and "LinearPlan.segment_chunks" not in units
    old = "FRAGMENT_BYTES = 512"
    changed = path.read_text(encoding="utf-8").replace(old, "FRAGMENT_BYTES = 513")
    found = stale(requests, lambda: path.write_text(changed, "utf-8") and None)
    assert found and all(one.startswith("linear.linear_stream[") for one in found)
