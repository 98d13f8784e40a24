# SPDX-License-Identifier: Apache-2.0
"""Packs: what is built opens again, and every way of being damaged or foreign is refused by name."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest

from megamoe.kernels import pack as packing
from megamoe.kernels.pack import MANIFEST, Pack, PackError, build_pack, open_pack

from .objects import REQUESTS, FakeCompiler

VERSION = "1.2.3"


@pytest.fixture
def pack(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Pack:
    monkeypatch.setattr(packing, "compile_objects", FakeCompiler())
    return build_pack(REQUESTS, "sm90a", tmp_path / "made/pack", version=VERSION, model="flash")


def edit(pack: Pack, change: Callable[[dict], None]) -> None:
    manifest = json.loads((pack.path / MANIFEST).read_text())
    change(manifest)
    (pack.path / MANIFEST).write_text(json.dumps(manifest))


def test_a_pack_opens_with_what_was_built(pack: Pack) -> None:
    opened = open_pack(pack.path, version=VERSION)
    assert opened == pack and opened.target == "sm90a"
    assert set(opened.objects) == set(REQUESTS)
    for request, one in opened.objects.items():
        assert one.path.read_text() == f"{request} for sm90a"
    manifest = json.loads((pack.path / MANIFEST).read_text())
    assert manifest["model"] == "flash" and {one["key"] for one in manifest["objects"]} == set(map(str, REQUESTS))


def test_building_again_replaces_a_pack_and_nothing_else(pack: Pack, tmp_path: pathlib.Path) -> None:
    again = build_pack(REQUESTS[:1], "sm90a", pack.path, version=VERSION, model="flash")
    assert set(again.objects) == {REQUESTS[0]}
    assert len(list(pack.path.iterdir())) == 2 and [one.name for one in pack.path.parent.iterdir()] == ["pack"]
    other = tmp_path / "documents"
    other.mkdir()
    (other / "letter.txt").write_text("x")
    with pytest.raises(PackError, match="documents exists and is not a kernel pack. Name a new directory"):
        build_pack(REQUESTS, "sm90a", other, version=VERSION, model="flash")
    assert (other / "letter.txt").read_text() == "x"


def test_a_failed_build_leaves_the_old_pack(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(packing, "compile_objects", fail)
    with pytest.raises(RuntimeError):
        build_pack(REQUESTS, "sm90a", pack.path, version=VERSION, model="flash")
    assert open_pack(pack.path, version=VERSION) == pack


# refusals: one change each to a good pack


def _flip_a_byte(pack: Pack) -> None:
    path = pack.objects[REQUESTS[1]].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _swap_two(pack: Pack) -> None:
    first, second = (pack.objects[request].path for request in REQUESTS[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _exchange_names(manifest: dict) -> None:
    first, second, _ = manifest["objects"]
    first["file"], second["file"] = second["file"], first["file"]
    first["sha256"], second["sha256"] = second["sha256"], first["sha256"]


DAMAGE: dict[str, tuple[Callable[[Pack], object], str]] = {
    "no manifest": (lambda pack: (pack.path / MANIFEST).unlink(), "there is no manifest.json"),
    "not JSON": (lambda pack: (pack.path / MANIFEST).write_text("{"), "manifest.json is damaged"),
    "JSON of another kind": (lambda pack: (pack.path / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "a missing field": (lambda pack: edit(pack, lambda one: one.pop("dsl")), "manifest.json is damaged"),
    "another format": (lambda pack: edit(pack, lambda one: one.update(format=9)), "its format is 9"),
    "unknown target": (lambda pack: edit(pack, lambda one: one.update(target="sm80")), "manifest.json is damaged"),
    "another program": (lambda pack: edit(pack, lambda one: one.update(megamoe="9")), "was built by megamoe 9"),
    "a flipped byte": (_flip_a_byte, rf"{REQUESTS[1].symbol}.so \(rows.rms_norm\[width=512.*damaged: its SHA-256"),
    "two objects swapped": (_swap_two, "damaged: its SHA-256"),
    "a lost object": (
        lambda pack: pack.objects[REQUESTS[2]].path.unlink(),
        r"\.so \(rows.quantize_fp8_rows.*missing",
    ),
    "a stranger": (lambda pack: (pack.path / "more.so").write_text("x"), "more.so is not listed"),
    "names exchanged": (lambda pack: edit(pack, _exchange_names), "not that kernel's name"),
    "other sources": (
        lambda pack: edit(pack, lambda one: one["objects"][0].update(source="0" * 64)),
        "was built from other sources than this program's kernels/",
    ),
    "another config": (
        lambda pack: edit(pack, lambda one: one["objects"][0]["config"].update(width=8192)),
        "not that kernel's name",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_and_foreign_packs_are_refused_by_name(pack: Pack, how: str) -> None:
    damage, message = DAMAGE[how]
    damage(pack)
    with pytest.raises(PackError, match=message) as refused:
        open_pack(pack.path, version=VERSION)
    assert str(pack.path) in str(refused.value)
