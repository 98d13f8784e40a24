# SPDX-License-Identifier: Apache-2.0
"""Whole and broken files: the verdict of safetensors' own reader, and ours."""

from __future__ import annotations

import json
import pathlib
import struct

import pytest

from megamoe.checkpoint.headers import read_headers


def header(text: str) -> bytes:
    """Return a file with this header and eight bytes of data."""
    content = text.encode()
    return struct.pack("<Q", len(content)) + content + bytes(8)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "is_good"),
    [
        (header(json.dumps({"a": F32})), True),
        (header(json.dumps({"a": F32, "__metadata__": {"format": "pt"}})), True),
        (header(json.dumps({"a": {**F32, "data_offsets": [0, 4]}})), False),  # shape and bytes differ
        (header(json.dumps({"a": {**F32, "data_offsets": [4, 12]}})), False),  # a hole, and beyond the end
        (header(json.dumps({"a": {**F32, "shape": [-2]}})), False),
        (header(json.dumps({"a": {**F32, "dtype": "F33"}})), False),
        (header(json.dumps({"a": F32, "b": F32})), False),  # the same bytes twice
        (header("{}")[:-4], False),  # data that no tensor names
        (b"\xff" * 16, False),
        (b"", False),
    ],
)
def test_headers_are_accepted_as_safetensors_accepts_them(
    content: bytes, is_good: bool, tmp_path: pathlib.Path
) -> None:
    """The verdict of both on whole files and broken ones."""
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed; the dev extra has it")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        with safetensors.safe_open(path, "pt") as file:
            file.keys()
        theirs = True
    except safetensors.SafetensorError:
        theirs = False
    assert (theirs, not read_headers(tmp_path).problems) == (is_good, is_good)
