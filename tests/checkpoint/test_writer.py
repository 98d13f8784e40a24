# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors: readable by the reference implementation, aligned, and all or nothing."""

from __future__ import annotations

import json

import pytest
import safetensors
import safetensors.torch
import torch

from megamoe.checkpoint import CheckpointReader, write_json, write_safetensors
from megamoe.checkpoint.reader import DTYPES

# Known answers.


def test_bytes_worked_by_hand(tmp_path):
    path = tmp_path / "model.safetensors"
    size = write_safetensors(path, {"b": torch.tensor([[1, 2]], dtype=torch.uint8), "a": torch.tensor(1.0)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0 and size == len(raw) == 8 + length + 6
    assert json.loads(raw[8 : 8 + length]) == {
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [1, 2], "data_offsets": [4, 6]},
    }
    assert raw[8 + length :] == b"\x00\x00\x80\x3f\x01\x02"


def test_json(tmp_path):
    write_json(tmp_path / "config.json", {"b": "｜", "a": [1, None]})
    assert (tmp_path / "config.json").read_text() == '{\n  "b": "｜",\n  "a": [\n    1,\n    null\n  ]\n}\n'


# Properties.


def test_the_reference_implementation_reads_it(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name in ("F4", "F8_E8M0"):
            continue
        tensors[name] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        tensors[f"{name} empty"] = torch.empty(0, 4, dtype=dtype)
        tensors[f"{name} scalar"] = torch.ones((), dtype=dtype)
    tensors["strided"] = torch.randn(4, 6, generator=generator).T[1:]
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_own_reader_reads_it_and_every_tensor_is_aligned(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 256, (7 * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if name not in ("F4", "BOOL")
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with CheckpointReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name).view(torch.uint8), tensor.view(torch.uint8))
            assert reader.info(name).begin % tensor.dtype.itemsize == 0


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    class Unreadable(torch.Tensor):
        def detach(self):
            raise KeyboardInterrupt

    broken = torch.ones(2).as_subclass(Unreadable)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"a": torch.zeros(2), "b": broken})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_tensors(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {})
    with CheckpointReader(tmp_path) as reader:
        assert reader.names == () and reader.num_bytes == 0


# Refusals.


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r'no tensor may be called "__metadata__". Rename it.'):
        write_safetensors(tmp_path / "x", {"__metadata__": torch.ones(1)})
    with pytest.raises(TypeError, match=r"write_safetensors: a is torch.complex64; allowed are bool, uint8,"):
        write_safetensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
