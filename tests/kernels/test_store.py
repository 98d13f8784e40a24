# SPDX-License-Identifier: Apache-2.0
"""The store: where kernels come from, the ledger of it, and the seal."""

from __future__ import annotations

import pathlib

import pytest

from megamoe.kernels import pack as packing
from megamoe.kernels import store as storing
from megamoe.kernels.compile import Built, Request
from megamoe.kernels.pack import PackError, build_pack
from megamoe.kernels.store import KernelStore, SealedError

from .objects import REQUESTS, FakeCompiler


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(storing, "compile_objects", fake)
    monkeypatch.setattr(packing, "compile_objects", fake)
    return fake


def make_store(cache: pathlib.Path, target: str = "sm90a") -> KernelStore:
    return KernelStore(target, cache, loader=lambda path, symbol: lambda: (path.read_text(), symbol))


def origins(store: KernelStore) -> list[tuple[Request, str]]:
    return [(one.request, one.origin) for one in store.ledger]


def test_compiled_once_then_loaded_from_memory_then_from_disk(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    store = make_store(tmp_path)
    first = store.get(REQUESTS[0])
    assert first() == (f"{REQUESTS[0]} for sm90a", REQUESTS[0].symbol)
    assert store.get(REQUESTS[0]) is first and compiler.compiled == [REQUESTS[0]]
    assert origins(store) == [(REQUESTS[0], "compiled")] and store.ledger[0].seconds >= 1.5
    later = make_store(tmp_path)
    later.get(REQUESTS[0])
    assert origins(later) == [(REQUESTS[0], "disk cache")] and len(compiler.compiled) == 1


def test_the_cache_knows_target_compiler_and_sources(
    tmp_path: pathlib.Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path).get(REQUESTS[0])
    make_store(tmp_path, "sm100a").get(REQUESTS[0])
    assert len(compiler.compiled) == 2
    monkeypatch.setattr(storing, "dsl_version", lambda: "9.9")
    make_store(tmp_path).get(REQUESTS[0])
    assert len(compiler.compiled) == 3
    monkeypatch.setattr(storing, "source_hash", lambda module: "f" * 64)
    make_store(tmp_path).get(REQUESTS[0])
    assert len(compiler.compiled) == 4
    make_store(tmp_path).get(REQUESTS[0])
    assert len(compiler.compiled) == 4


def test_a_damaged_cache_is_refused_by_name(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    make_store(tmp_path).get(REQUESTS[0])
    (library,) = tmp_path.rglob("*.so")
    library.write_text("something else")
    with pytest.raises(PackError, match=rf"{REQUESTS[0].symbol}.so \(rows.rms_norm.*damaged. Delete its folder"):
        make_store(tmp_path).get(REQUESTS[0])


def test_two_processes_that_compile_the_same_do_not_mix(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    """Library and digest are of one build: the second to finish leaves the first one's."""
    first, second = make_store(tmp_path), make_store(tmp_path)

    class Slow(FakeCompiler):
        def __call__(self, requests: list[Request], target: str, directory: pathlib.Path) -> list[Built]:
            first.get(REQUESTS[0])  # the other process finishes while this one compiles
            built = super().__call__(requests, target, directory)
            built[0].path.write_text("a second build")
            return built

    with pytest.MonkeyPatch.context() as patch:
        original = storing.compile_objects
        slow = Slow()

        def compile_objects(requests: list[Request], target: str, directory: pathlib.Path) -> list[Built]:
            patch.setattr(storing, "compile_objects", original)
            return slow(requests, target, directory)

        patch.setattr(storing, "compile_objects", compile_objects)
        assert second.get(REQUESTS[0])()[0] == f"{REQUESTS[0]} for sm90a"
    assert origins(second) == [(REQUESTS[0], "compiled")]
    assert make_store(tmp_path).get(REQUESTS[0])()[0] == f"{REQUESTS[0]} for sm90a"
    assert [one.name for one in (tmp_path / "kernels").iterdir() if one.name.startswith(".")] == []


def test_a_pack_comes_first_and_needs_no_compiler(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    pack = build_pack(REQUESTS[:2], "sm90a", tmp_path / "pack", version="1", model="flash")
    compiler.compiled.clear()
    store = make_store(tmp_path / "cache")
    store.use_pack(pack.path, version="1")
    store.warm_up(REQUESTS[:2])
    assert compiler.compiled == [] and {origin for _, origin in origins(store)} == {"pack"}
    store.get(REQUESTS[2])
    assert origins(store)[-1] == (REQUESTS[2], "compiled")


def test_a_pack_for_another_gpu_is_refused(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    pack = build_pack(REQUESTS, "sm100a", tmp_path / "pack", version="1", model="flash")
    with pytest.raises(
        PackError, match=r"is for sm100a, this GPU is sm90a\. Build one with megamoe compile --arch sm90a"
    ):
        make_store(tmp_path).use_pack(pack.path, version="1")


def test_warm_up_compiles_together_and_only_what_is_missing(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    store = make_store(tmp_path)
    store.get(REQUESTS[0])
    store.warm_up([*REQUESTS, *REQUESTS])
    assert compiler.compiled == REQUESTS and [one for one, _ in origins(store)] == REQUESTS
    assert all(one.seconds >= 1.5 for one in store.ledger)


def test_after_the_seal_nothing_new(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    store = make_store(tmp_path)
    store.warm_up(REQUESTS[:2])
    assert not store.sealed
    store.seal()
    assert store.sealed and store.get(REQUESTS[1])()[1] == REQUESTS[1].symbol
    store.warm_up(REQUESTS[:2])  # all there: nothing to refuse
    with pytest.raises(SealedError, match=r"^rows\.quantize_fp8_rows\[width=4096,x=bf16\]: was not loaded before"):
        store.get(REQUESTS[2])
    with pytest.raises(SealedError, match=r"quantize_fp8_rows.*Warm up before seal"):
        store.warm_up(REQUESTS)
    assert compiler.compiled == REQUESTS[:2]


def test_explain_prints_the_ledger(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    store = make_store(tmp_path)
    store.warm_up(REQUESTS[:1])
    store.seal()
    lines = store.explain().splitlines()
    assert lines[0] == "| kernel | seconds | origin |"
    assert lines[2].startswith(f"| {REQUESTS[0]} | 1.5") and lines[2].endswith("| compiled |")
    assert lines[-1] == "1 kernels for sm90a, sealed"


def test_cache_directory_is_named_by_the_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    assert storing.default_cache_dir() == tmp_path
    monkeypatch.delenv("MEGAMOE_CACHE_DIR")
    assert storing.default_cache_dir() == pathlib.Path.home() / ".cache" / "megamoe"
