# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors: equal to the reference implementation, and every way files can disagree is refused by name."""

from __future__ import annotations

import gc
import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from megamoe.checkpoint import CheckpointError, CheckpointReader, read_headers, write_safetensors
from megamoe.checkpoint.reader import DTYPES

INDEX = "model.safetensors.index.json"


def write_raw(path: pathlib.Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    """Write a file with any header and any data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return one header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(directory: pathlib.Path) -> str:
    """Return the message a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory)
    return str(caught.value)


def shards(directory: pathlib.Path, *, index: bool = True) -> dict[str, torch.Tensor]:
    """Write two shards (and an index) of two tensors each."""
    tensors = {name: torch.arange(4.0) + number for number, name in enumerate(("a", "b", "c", "d"))}
    weight_map = {}
    for number, names in enumerate((("a", "b"), ("c", "d")), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content))
    return tensors


# Known answers.


def test_bytes_worked_by_hand(tmp_path):
    header = {
        "scales": entry("F8_E8M0", [2], 0, 2),
        "codes": entry("F4", [2, 4], 2, 6),
        "scalar": entry("F32", [], 6, 10),
        "none": entry("BF16", [0, 3], 10, 10),
        "last": entry("BF16", [1, 2], 10, 14),
        "__metadata__": {"format": "pt"},
    }
    data = bytes([127, 120, 0x21, 0x43, 0x65, 0x87]) + struct.pack("<f", 1.5) + bytes([0x80, 0x3F, 0x00, 0xC0])
    write_raw(tmp_path / "model.safetensors", header, data)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == ("codes", "last", "none", "scalar", "scales")
        assert reader.num_bytes == 14
        assert reader.tensor("scales").float().tolist() == [1.0, 2.0**-7]
        codes = reader.tensor("codes")
        assert codes.dtype == torch.uint8 and codes.tolist() == [[0x21, 0x43], [0x65, 0x87]]
        assert reader.info("codes").shape == (2, 2) and reader.info("codes").dtype == "F4"
        assert reader.tensor("scalar").shape == () and float(reader.tensor("scalar")) == 1.5
        assert reader.tensor("none").shape == (0, 3) and reader.tensor("none").dtype == torch.bfloat16
        assert reader.tensor("last").tolist() == [[1.0, -2.0]]
        assert str(reader.info("last")) == "BF16 [1, 2]" and reader.info("last").num_bytes == 4
        assert "last" in reader and "first" not in reader


# Properties.


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    """One tensor of every dtype, with odd sizes so that later ones are misaligned where the writer allows it."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, dtype in DTYPES.items():
        if name == "F4":
            continue
        raw = torch.randint(0, 256, (3 * 5 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        raw = raw & 1 if dtype == torch.bool else raw
        out[name] = raw.view(dtype).view(3, 5)
    return out


def assert_equal_bytes(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare dtype, shape and bytes (NaN included)."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_reads_what_the_reference_implementation_writes(tmp_path, seed):
    tensors = {name: tensor for name, tensor in random_tensors(seed).items() if name != "F8_E8M0"}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.names) == set(tensors)
        for name, tensor in tensors.items():
            assert_equal_bytes(reader.tensor(name), tensor)


def test_misaligned_tensors(tmp_path, seed):
    tensors = random_tensors(seed)
    header, data = {}, b"\1"
    header["first"] = entry("U8", [1], 0, 1)
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        header[name] = entry(name, list(tensor.shape), len(data), len(data) + len(raw))
        data += raw
    write_raw(tmp_path / "model.safetensors", header, data)
    with CheckpointReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            assert_equal_bytes(reader.tensor(name), tensor)


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_index(tmp_path, index):
    tensors = shards(tmp_path, index=index)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == tuple(tensors)
        assert reader.info("c").shard == "model-00002-of-00002.safetensors"
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name), tensor)


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    tensors = shards(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        reader.tensor("a").fill_(7)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("a"), tensors["a"])


def test_tensors_outlive_the_reader(tmp_path):
    expected = shards(tmp_path)["d"]
    with CheckpointReader(tmp_path) as reader:
        tensor = reader.tensor("d")
    del reader
    gc.collect()
    assert torch.equal(tensor, expected)


def test_truncation_anywhere_is_refused(tmp_path, seed):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(3, 2), "b": torch.ones(5).bfloat16()})
    whole = path.read_bytes()
    CheckpointReader(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal(tmp_path)
        assert "model.safetensors" in message and ("truncated" in message or "not JSON" in message)


def test_a_damaged_header_byte_never_raises_anything_else(tmp_path, seed):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"alpha": torch.ones(3, 2), "beta": torch.ones(5).bfloat16()})
    whole = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(seed)
    refused = 0
    for position in range(header_end):
        damaged = bytearray(whole)
        damaged[position] ^= int(torch.randint(1, 256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            CheckpointReader(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > header_end // 2


# Refusals.


def header_case(header: Any, data: bytes = b"", **options: Any) -> Callable[[pathlib.Path], None]:
    """Return a writer of one file."""
    return lambda directory: write_raw(directory / "model.safetensors", header, data, **options)


FILES: list[tuple[str, Callable[[pathlib.Path], None], str]] = [
    ("no files", lambda directory: None, "no *.safetensors file. Convert the weights to safetensors"),
    (
        "empty",
        lambda directory: (directory / "model.safetensors").write_bytes(b"") and None,
        "model.safetensors: truncated, 0 bytes are too few for a header. Download it again.",
    ),
    (
        "pointer",
        lambda directory: (directory / "model.safetensors").write_text("version https://git-lfs") and None,
        "model.safetensors: a Git LFS pointer instead of data. Run git lfs pull.",
    ),
    ("header beyond file", header_case({}, length=1000), "header of 1000 bytes in a file of 10, at most 100000000"),
    ("header not JSON", header_case(b"{"), "model.safetensors: the header is not JSON"),
    ("header not UTF-8", header_case(b"\xff\xfe{}"), "model.safetensors: the header is not JSON"),
    ("header nested without end", header_case(b'{"a":' + b"[" * 100_000), "model.safetensors: the header is not JSON"),
    ("header not an object", header_case([]), "model.safetensors: the header is not a JSON object."),
    (
        "tensor twice in a header",
        header_case(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"\0"),
        "a: stored twice in model.safetensors.",
    ),
    (
        "unknown dtype",
        header_case({"a": entry("F3", [1], 0, 1)}, b"\0"),
        "a: dtype 'F3' in model.safetensors; allowed are BOOL, U8,",
    ),
    ("no entry", header_case({"a": 5}), "a: dtype None in model.safetensors"),
    (
        "negative shape",
        header_case({"a": entry("U8", [-1], 0, 1)}, b"\0"),
        "a: malformed entry in the header of model.safetensors (shape [-1], data_offsets [0, 1]).",
    ),
    (
        "offsets reversed",
        header_case({"a": entry("U8", [0], 1, 0)}, b"\0"),
        "a: -1 bytes in model.safetensors, but U8 [0]",
    ),
    ("odd F4", header_case({"a": entry("F4", [3], 0, 1)}, b"\0"), "a: F4 with shape [3] in model.safetensors"),
    (
        "size and shape disagree",
        header_case({"a": entry("F32", [2], 0, 4)}, b"\0" * 4),
        "a: 4 bytes in model.safetensors, but F32 [2] takes 8.",
    ),
    (
        "data truncated",
        header_case({"a": entry("F32", [2], 0, 8)}, b"\0" * 7),
        "model.safetensors: truncated: 1 of 1 tensors end beyond its 7 bytes of data, a (bytes 0 to 8) is the first. "
        "Download it again.",
    ),
    (
        "overlap",
        header_case({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, b"\0" * 7),
        "b: overlaps a in model.safetensors (bytes 3 to 7).",
    ),
    (
        "same bytes twice",
        header_case({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"\0" * 4),
        "b: overlaps a in model.safetensors (bytes 0 to 4).",
    ),
    (
        "contained",
        header_case({"a": entry("U8", [6], 0, 6), "b": entry("U8", [2], 2, 4)}, b"\0" * 6),
        "b: overlaps a in model.safetensors (bytes 2 to 4).",
    ),
    (
        "hole",
        header_case({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 3, 4)}, b"\0" * 4),
        "b: 2 bytes between it and a in model.safetensors belong to none.",
    ),
    (
        "bytes after the last tensor",
        header_case({"a": entry("U8", [1], 0, 1)}, b"\0" * 3),
        "model.safetensors: 2 bytes after the last tensor belong to none. Export it again.",
    ),
]


@pytest.mark.parametrize(("write", "message"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_files_are_refused(tmp_path, write, message):
    write(tmp_path)
    assert message in refusal(tmp_path)


def test_a_missing_directory_is_refused(tmp_path):
    assert "is not a directory. Pass a checkpoint's folder." in refusal(tmp_path / "nowhere")


def edit_index(edit: Callable[[dict[str, Any]], None]) -> Callable[[pathlib.Path], None]:
    """Return an edit of the index file."""

    def run(directory: pathlib.Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        edit(content)
        (directory / INDEX).write_text(json.dumps(content))

    return run


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS: list[tuple[str, Callable[[pathlib.Path], Any], str]] = [
    (
        "missing shard",
        lambda directory: (directory / SECOND).unlink(),
        f"missing shard {SECOND}: {INDEX} places 2 tensors in it. Download it.",
    ),
    (
        "shard is a dangling link",
        lambda directory: ((directory / SECOND).unlink(), (directory / SECOND).symlink_to(directory / "gone")),
        f"missing shard {SECOND}: {INDEX} places 2 tensors in it. Download it.",
    ),
    (
        "missing shard without index",
        lambda directory: ((directory / SECOND).unlink(), (directory / INDEX).unlink()),
        f"missing shard {SECOND}. Download it.",
    ),
    (
        "shard outside the index",
        lambda directory: write_safetensors(directory / "other.safetensors", {"e": torch.ones(1)}),
        f"other.safetensors is not named by {INDEX}. Move it away or repair the index.",
    ),
    (
        "tensor twice",
        lambda directory: write_safetensors(directory / SECOND, {name: torch.ones(1) for name in "acd"}),
        f"a: stored twice, in {FIRST} and in {SECOND}.",
    ),
    (
        "tensor twice without index",
        lambda directory: (
            (directory / INDEX).unlink(),
            write_safetensors(directory / SECOND, {name: torch.ones(1) for name in "acd"}),
        ),
        f"a: stored twice, in {FIRST} and in {SECOND}.",
    ),
    (
        "tensor not in its shard",
        lambda directory: write_safetensors(directory / SECOND, {"c": torch.ones(1)}),
        f"d: {INDEX} places it in {SECOND}, which does not hold it.",
    ),
    (
        "tensor not in the index",
        edit_index(lambda content: content["weight_map"].pop("b")),
        f"b: stored in {FIRST} but absent from {INDEX}.",
    ),
    (
        "tensor in another shard",
        edit_index(lambda content: content["weight_map"].update(b=SECOND)),
        f"b: stored in {FIRST} but {INDEX} places it in {SECOND}.",
    ),
    (
        "shard elsewhere",
        edit_index(lambda content: content["weight_map"].update(b="../b.safetensors")),
        "names '../b.safetensors'; shards must be *.safetensors files in the checkpoint's own folder.",
    ),
    ("no map", edit_index(lambda content: content.pop("weight_map")), f"{INDEX} has no weight_map"),
    ("index not JSON", lambda directory: (directory / INDEX).write_text("{"), f"{INDEX} is not JSON"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in SHARDS], ids=[row[0] for row in SHARDS])
def test_shards_that_disagree_are_refused(tmp_path, edit, message):
    shards(tmp_path)
    CheckpointReader(tmp_path)
    edit(tmp_path)
    assert message in refusal(tmp_path)


def test_every_problem_is_listed(tmp_path):
    header = {f"tensor{number:02d}": entry("F3", [1], 0, 1) for number in range(25)}
    write_raw(tmp_path / "model.safetensors", header, b"\0")
    message = refusal(tmp_path)
    assert "25 problems" in message and message.count("\n  tensor") == 20 and message.endswith("and 5 more.")
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == sorted(header)
    assert [problem.subject for problem in read_headers(tmp_path).problems] == sorted(header)


def test_unknown_names_are_refused(tmp_path):
    shards(tmp_path)
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=r"no tensor 'x' among 4"):
        reader.tensor("x")
