# SPDX-License-Identifier: Apache-2.0
"""Headers nobody writes on purpose: refused by the documented error, quickly, without the memory they claim."""

from __future__ import annotations

import json
import pathlib
import struct
import time
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.checkpoint import CheckpointError, CheckpointReader
from megamoe.checkpoint.headers import INDEX_NAME, ITEM_BYTES, read_headers
from megamoe.models.deepseek_v4.config import parse_config
from megamoe.models.deepseek_v4.weights import load_weights
from megamoe.verify.checkpoint import inspect_checkpoint

from ..fake_files import Files, fake

FILE = "model.safetensors"
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
COUNTS = st.integers(-2, 12) | st.sampled_from([2**31, 2**60, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63)])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*ITEM_BYTES, "F3", "f32"]) | ANYTHING,
        "shape": st.lists(COUNTS, max_size=6) | ANYTHING,
        "data_offsets": st.lists(COUNTS, min_size=1, max_size=3) | ANYTHING,
        "more": ANYTHING,
    },
)
NAMES = st.sampled_from(["a", "layers.0.attn.wq_a.weight", "__metadata__", "", "\ud800", "x" * 300]) | st.text(
    max_size=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """One folder for all examples of a test: what an example writes, the next one overwrites."""
    return tmp_path_factory.mktemp("fuzz")


def open_all(directory: pathlib.Path) -> bool:
    """Open a checkpoint and touch every byte; say whether it was accepted."""
    try:
        with CheckpointReader(directory) as reader:
            for name in reader.names:
                tensor = reader.tensor(name)
                assert tensor.numel() * tensor.element_size() == reader.info(name).num_bytes
                tensor.reshape(-1).clone()
    except CheckpointError as error:
        assert str(error) and len(str(error)) < 20_000
        return False
    return True


def write(directory: pathlib.Path, content: bytes) -> None:
    """Write the only file of a checkpoint."""
    (directory / FILE).write_bytes(content)


def framed(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file of a header and data."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# Any bytes, any header, any index.


@given(st.binary(max_size=200))
def test_any_bytes(folder, content):
    write(folder, content)
    open_all(folder)


@given(st.binary(max_size=120), st.integers(0, 2**64 - 1) | st.integers(0, 130), st.binary(max_size=16))
def test_any_bytes_behind_a_length(folder, header, length, data):
    write(folder, framed(header, data, length=length))
    open_all(folder)


@settings(max_examples=400)
@given(st.dictionaries(NAMES, ENTRIES | ANYTHING, max_size=4), st.binary(max_size=64))
def test_any_header(folder, header, data):
    write(folder, framed(json.dumps(header).encode(), data))
    open_all(folder)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "F4", "F32", "F8_E8M0"]), st.integers(0, 5), st.integers(0, 20)), max_size=4
    )
)
def test_ranges_are_accepted_only_where_they_tile_the_data(folder, parts):
    header, largest = {}, 0
    for number, (dtype, count, begin) in enumerate(parts):
        shape = [count * (2 if dtype == "F4" else 1)]
        end = begin + count * ITEM_BYTES[dtype]
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        largest = max(largest, end)
    write(folder, framed(json.dumps(header).encode(), bytes(largest)))
    owners = [0] * largest
    for begin, end in (entry["data_offsets"] for entry in header.values()):
        for byte in range(begin, end):
            owners[byte] += 1
    edges = {0} | {
        edge for entry in header.values() for edge in entry["data_offsets"] if len(set(entry["data_offsets"])) > 1
    }
    empty = [entry["data_offsets"][0] for entry in header.values() if len(set(entry["data_offsets"])) == 1]
    assert open_all(folder) == (set(owners) <= {1} and set(empty) <= edges)


@given(
    ANYTHING | st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, st.text(max_size=9) | ANYTHING, max_size=4)})
)
def test_any_index(folder, index):
    write(folder, framed(json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode(), b"\0"))
    (folder / INDEX_NAME).write_text(json.dumps(index))
    open_all(folder)
    (folder / INDEX_NAME).unlink()


# Headers made to take time or memory.


def deep(opening: str, count: int = 200_000) -> bytes:
    """Return JSON nested without end."""
    return b'{"a":' + opening.encode() * count


HOSTILE: list[tuple[str, bytes, str]] = [
    ("length of 2^60", framed(b"{}", length=2**60), f"header of {2**60} bytes in a file of 10"),
    ("length of 2^64 - 1", framed(b"{}", length=2**64 - 1), "header of"),
    ("lists nested without end", framed(deep("[")), "the header is not JSON"),
    ("objects nested without end", framed(deep('{"a":')), "the header is not JSON"),
    ("not UTF-8", framed(b'{"\xff\xfe":{}}'), "the header is not JSON"),
    ("UTF-16", framed('{"a":{}}'.encode("utf-16")), "the header is not JSON"),
    ("a number of a million digits", framed(b'{"a":' + b"9" * 1_000_000 + b"}"), "the header is not JSON"),
    (
        "the same key half a million times",
        framed(b"{" + b",".join([b'"a":0'] * 500_000) + b"}"),
        "a: stored twice in model.safetensors.",
    ),
    (
        "fifty thousand keys, each twice",
        framed(b"{" + b",".join(b'"%d":0' % (number // 2) for number in range(100_000)) + b"}"),
        "0: stored twice in model.safetensors.",
    ),
    (
        "a shape of 200,000 large sizes",
        framed(b'{"a":{"dtype":"U8","shape":[' + b",".join([b"9" * 18] * 200_000) + b'],"data_offsets":[0,1]}}', b"\0"),
        "a: malformed entry in the header",
    ),
    (
        "a shape that overflows and is empty",
        framed(b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}'),
        "a: malformed entry in the header",
    ),
    (
        "sizes that multiply to 2^64",
        framed(b'{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        "a: malformed entry in the header",
    ),
    (
        "a tensor of 2^60 bytes",
        framed(b'{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}', b"\0"),
        "model.safetensors: truncated: 1 of 1 tensors end beyond its 1 bytes of data",
    ),
    (
        "negative offsets",
        framed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', b"\0"),
        "a: malformed entry in the header",
    ),
    (
        "fractional offsets",
        framed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}', b"\0"),
        "a: malformed entry in the header",
    ),
    (
        "a list for a dtype",
        framed(b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', b"\0"),
        "a: dtype ['U8']",
    ),
    ("a megabyte for a dtype", framed(b'{"a":{"dtype":"' + b"x" * 1_000_000 + b'"}}'), "a: dtype 'xxx"),
    (
        "30,000 tensors in one place",
        framed(
            b"{"
            + b",".join(b'"t%d":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}' % number for number in range(30_000))
            + b"}",
            b"\0",
        ),
        "29999 problems",
    ),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_headers_are_refused_quickly_and_within_the_files_size(tmp_path, content, message):
    write(tmp_path, content)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert seconds < 20  # a quadratic step over these takes minutes; tracing makes all of it several times slower
    assert peak < 64 * len(content) + 2**20  # objects of parsed JSON, nothing that the header claims


def test_a_name_twice_in_the_index_is_found(tmp_path):
    write(tmp_path, framed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"))
    (tmp_path / INDEX_NAME).write_text(f'{{"weight_map":{{"a":"{FILE}","a":"{FILE}"}}}}')
    with pytest.raises(CheckpointError, match="a: listed twice in model.safetensors.index.json"):
        CheckpointReader(tmp_path)


def test_an_index_nested_without_end_is_refused(tmp_path):
    write(tmp_path, framed(b"{}"))
    (tmp_path / INDEX_NAME).write_bytes(deep("["))
    with pytest.raises(CheckpointError, match="is not JSON"):
        CheckpointReader(tmp_path)


# A whole checkpoint, damaged.


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Files:
    """A small checkpoint in memory."""
    return Files.read(fake.write_fake(tmp_path_factory.mktemp("small"), "small", "nvidia"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Files:
    """A small checkpoint spelled by compressed-tensors in memory."""
    return Files.read(fake.write_fake(tmp_path_factory.mktemp("packed"), "small", "compressed-tensors"))


@settings(max_examples=60)
@given(st.data())
def test_inspect_survives_any_damage_to_headers(small, folder, data):
    files = Files(dict(small.tensors), small.config, small.quant)
    names = sorted(files.tensors)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(names))
        kind = data.draw(st.sampled_from(["drop", "rename", "dtype", "shape"]))
        raw = files.tensors.pop(name, None)
        if kind == "drop" or raw is None:
            continue
        if kind == "rename":
            files.tensors[data.draw(st.sampled_from(names) | st.text(max_size=12))] = raw
        elif kind == "dtype":
            dtype = data.draw(st.sampled_from([one for one in ITEM_BYTES if one != "F4"]))
            count = len(raw.content) // ITEM_BYTES[dtype]
            files.put(name, dtype, (count,), raw.content[: count * ITEM_BYTES[dtype]])
        else:
            count = len(raw.content) // ITEM_BYTES[raw.dtype]
            shape = data.draw(st.sampled_from([(), (count,), (1, count), (count, 1), (0,)]))
            kept = {(): 1, (0,): 0}.get(shape, count)
            if kept > count:  # emptied before
                continue
            files.put(name, raw.dtype, shape, raw.content[: kept * ITEM_BYTES[raw.dtype]])
    inspection = inspect_checkpoint(files.write(folder, num_shards=1))
    (folder / INDEX_NAME).unlink()
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert inspection.num_tensors == len(files.tensors)


@settings(max_examples=300)
@given(st.data())
def test_any_config_is_parsed_or_refused(data):
    raw: dict[str, Any] = dict(fake.config_of("small", data.draw(st.sampled_from(["dspark", "resave", "nvidia"]))))
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(sorted(raw)))
        if data.draw(st.booleans()) or not isinstance(raw[field], dict) or not raw[field]:
            raw[field] = data.draw(ANYTHING | COUNTS)
        else:
            raw[field] = {**raw[field], data.draw(st.sampled_from(sorted(raw[field]))): data.draw(ANYTHING | COUNTS)}
    try:
        parse_config(raw)
    except CheckpointError as error:
        assert error.problems or str(error)


QUANTIZATION = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["compressed-tensors", "modelopt", "fp8"]),
        "quantized_layers": st.dictionaries(NAMES, st.fixed_dictionaries({"quant_algo": ANYTHING}), max_size=2)
        | ANYTHING,
        "ignore": st.lists(st.sampled_from(["re:(a+)+$", "re:[", "re:.*", "lm_head", "*.attn.*", "["]) | ANYTHING)
        | ANYTHING,
        "moe_quant_algo": ANYTHING,
        "quant_algo": st.just("NVFP4") | ANYTHING,
        "config_groups": ANYTHING
        | st.dictionaries(
            st.text(max_size=3),
            st.fixed_dictionaries({"weights": st.fixed_dictionaries({"type": st.just("float"), "num_bits": ANYTHING})}),
        ),
        "expert_dtype": ANYTHING,
    },
)


@settings(max_examples=100)
@given(st.data())
def test_inspect_survives_any_config(small, packed, folder, data):
    source = data.draw(st.sampled_from([small, packed]))
    config = dict(source.config)
    if data.draw(st.booleans()):
        config["quantization_config"] = {**config["quantization_config"], **data.draw(QUANTIZATION)}
    else:
        for _ in range(data.draw(st.integers(1, 2))):
            config[data.draw(st.sampled_from(sorted(config)))] = data.draw(ANYTHING | COUNTS)
    quant = data.draw(ANYTHING)
    files = Files(source.tensors, config, None)
    files.write(folder, num_shards=1)
    (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    inspect_checkpoint(folder)
    for path in folder.iterdir():
        path.unlink()


def claims(**shapes: list[int]) -> dict[str, Any]:
    """Return a header of tensors without bytes: their shapes may say anything."""
    return {
        name.replace("__", "."): {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }


HUGE: list[tuple[str, dict[str, Any]]] = [
    ("layer", claims(layers__999999999__attn_norm__weight=[0])),
    ("layer of ten thousand", claims(layers__9999__attn_norm__weight=[0], layers__9999__ffn__gate__weight=[0, 0])),
    ("stage", claims(mtp__99999999__main_proj__weight=[0], mtp__99999999__attn__wq_a__weight=[0])),
    ("expert", claims(layers__0__ffn__experts__999999999999__w1__weight=[0])),
    ("experts by the router", claims(layers__0__ffn__gate__weight=[2**60, 0], layers__1__ffn__gate__weight=[2**60, 0])),
    ("fused experts", claims(model__layers__0__mlp__experts__gate_up_proj=[2**60, 0, 0])),
    (
        "sizes",
        claims(embed__weight=[2**60, 0], head__weight=[2**60, 0], mtp__0__markov_head__markov_w1__weight=[0, 2**60]),
    ),
    ("ratio", claims(layers__3__attn__compressor__ape=[2**60, 0], layers__3__attn__compressor__norm__weight=[0])),
    ("digits of another script", claims(**{"layers.\u0661.attn_norm.weight": [0], "mtp.\u0662.main_proj.weight": [0]})),
]


@pytest.mark.parametrize("header", [row[1] for row in HUGE], ids=[row[0] for row in HUGE])
def test_numbers_in_names_and_shapes_are_not_counted_to(tmp_path, header):
    write(tmp_path, framed(json.dumps(header).encode()))
    for layout in ("preview", "dspark"):
        config = fake.config_of("small", layout)
        (tmp_path / "config.json").write_text(json.dumps(config))
        started = time.process_time()
        inspection = inspect_checkpoint(tmp_path)
        with pytest.raises(CheckpointError), CheckpointReader(tmp_path) as reader:
            load_weights(reader, parse_config(config), dequantize=False, dtype=torch.bfloat16)
        assert time.process_time() - started < 20
        assert inspection.num_tensors == len(header)
        assert {finding.rule for finding in inspection.findings} & {"tensor-missing", "tensor-unknown"}


def test_headers_of_a_fifo_or_folder_are_not_opened(tmp_path):
    (tmp_path / FILE).mkdir()
    assert [problem.rule for problem in read_headers(tmp_path).problems] == ["shard-missing"]
