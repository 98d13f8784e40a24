# SPDX-License-Identifier: Apache-2.0
"""write_index_keys: compress_kv for index keys, rotated by Hadamard before they are rounded."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from megamoe.cache.compressor_state import state_capacity
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.plan_slots import RowTables
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import RopeTable
from megamoe.ops.write_index_keys import write_index_keys
from megamoe.verify.tolerance import ROW_ROUNDING, assert_within

from .compressor_cases import Sequences
from .steps import tables_of

MODULE = sys.modules[write_index_keys.__module__]
COMPRESS = sys.modules["megamoe.ops.compress_kv"]
QUARTER_TURN = RopeTable(torch.tensor([math.pi / 2]))
STEPS = [[(1, 7), (0, 9)], [(0, 1), (2, 8), (1, 1)], [(2, 3), (1, 8)], [(1, 1), (0, 1), (2, 1)]]
FORMATS = pytest.mark.parametrize(
    "row_format, width", [(RowFormat.FP32, 16), (RowFormat.INDEX_FP8, 128), (RowFormat.INDEX_FP4, 128)]
)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# --- known answers ---


def by_hand(**change):
    """Token 1 of request 0 completes key 0: scores are equal, so the key is the mean of (1, 6) and (5, 2), normed.

    The blocks overlap, and the first one has no older rows: only the second halves count.
    """
    arguments = {
        "raw": torch.tensor([[90.0, 90.0, 1.0, 6.0, 9.0, 9.0, 1.0, 0.0], [90.0, 90.0, 5.0, 2.0, 9.0, 9.0, 0.0, 1.0]]),
        "ape": torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 2.0, 1.0]]),
        "norm_weight": torch.ones(2),
        "state": CachePool.allocate(1, 5, RowFormat.FP32, 8),
        "step": None,
        "keys": CachePool.allocate(2, 2, RowFormat.FP32, 2),
        "positions": torch.tensor([0, 1]),
        "requests": int32(0, 0),
        "first_idx": int32(0, 0),
        "state_tables": int32([0]),
        "state_slots": torch.tensor([0, 1]),
        "key_slots": torch.tensor([-1, 2]),
        "table": QUARTER_TURN,
        "ratio": 2,
        "rotate": False,
        "eps": 0.0,
        "out_dtype": torch.float32,
    }
    arguments |= change
    write_index_keys(**arguments)
    return arguments


def check_by_hand(given, key):
    keys = read_cache(given["keys"], torch.arange(4))
    torch.testing.assert_close(keys[2], torch.tensor(key) / 12.5**0.5)
    assert not bool(keys[[0, 1, 3]].any())


def test_a_plain_key():
    given = by_hand()
    check_by_hand(given, [3.0, 4.0])
    rows = read_cache(given["state"], torch.arange(2))
    assert rows.tolist() == [[90, 90, 1, 6, 9, 9, 2, 2], [90, 90, 5, 2, 9, 9, 2, 2]]


def test_a_rotated_key():
    """(3 + 4, 3 - 4) / 2^0.5."""
    check_by_hand(by_hand(rotate=True), [7 / 2**0.5, -1 / 2**0.5])


@pytest.mark.parametrize("fault", ["never rotated", "always rotated", "no overlap"])
def test_faults_are_caught(fault, monkeypatch):
    right = MODULE.write_entries

    def wrong(*arguments):
        *given, overlap, eps, out_dtype, rotate = arguments
        rotate = {"never rotated": False, "always rotated": True}.get(fault, rotate)
        right(*given, overlap, eps, out_dtype, rotate)

    if fault == "no overlap":
        monkeypatch.setattr(COMPRESS, "_overlapped", lambda x, ratio: x.chunk(2, dim=-1)[0])
    else:
        monkeypatch.setattr(MODULE, "write_entries", wrong)
    with pytest.raises(AssertionError):
        test_a_plain_key()
        test_a_rotated_key()


# --- properties ---


@FORMATS
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("in_step", [False, True])
def test_equals_the_pooled_rows_rotated_and_rounded(row_format, width, rotate, in_step, seed):
    """Several requests, steps of many lengths: each key is that of its rows, whatever the layout of the rings."""
    torch.manual_seed(seed)
    one = Sequences(4, True, width, row_format=row_format, rotate=rotate, out_dtype=torch.bfloat16)
    pages = tables_of(3, 5, 2)
    for state in (tables_of(3, 1, state_capacity(4, True, 9)), tables_of(3, 3, 6), tables_of(3, 10, 4)):
        written = one.run(STEPS, state, pages, in_step=in_step)
        for request, num_tokens in enumerate((11, 17, 12)):
            assert torch.equal(one.values(written, pages, request, num_tokens), one.expected(request, num_tokens))


@FORMATS
def test_the_step_area_leaves_the_bytes_of_the_rings(row_format, width, seed):
    torch.manual_seed(seed)
    one = Sequences(4, True, width, row_format=row_format, rotate=True)
    ring, pages = RowTables(int32([2], [0], [1]), state_capacity(4, True, 9)), tables_of(3, 5, 2)
    in_rings, in_step = (one.run(STEPS, ring, pages, in_step=in_step) for in_step in (False, True))
    assert in_step.same_bytes(in_rings)


@FORMATS
@pytest.mark.parametrize("in_step", [False, True])
def test_nobody_changes_nobodys_bits(row_format, width, in_step, seed):
    torch.manual_seed(seed)
    one = Sequences(4, True, width, row_format=row_format, rotate=True)
    ring, pages = RowTables(int32([2], [0], [1]), state_capacity(4, True, 9)), tables_of(3, 5, 2)
    expected = one.run(STEPS, ring, pages, in_step=in_step)
    padded = [[(-1, 2), *[part for parts in step for part in (parts, (-1, 3))]] for step in STEPS]
    for content in (torch.nan, 1e30):
        assert one.run(padded, ring, pages, in_step=in_step, nobody=content).same_bytes(expected)


def test_empty():
    none, nobody = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    no_token = {"raw": torch.empty(0, 8), "positions": none, "requests": nobody, "first_idx": nobody}
    for rotate in (False, True):
        given = by_hand(**no_token, state_slots=none, key_slots=none, rotate=rotate)
        assert not bool(given["keys"].storage.any()) and not bool(given["state"].storage.any())
        assert not bool(by_hand(key_slots=torch.tensor([-1, -1]), rotate=rotate)["keys"].storage.any())


# --- kernel ---


@pytest.mark.gpu
@pytest.mark.parametrize("row_format", [RowFormat.INDEX_FP4])
def test_the_kernel_gives_the_same_bytes_for_any_chunking(row_format, seed):
    """Prefill equals decoding, through rings and through the step area."""
    torch.manual_seed(seed)
    one = Sequences(
        4,
        True,
        128,
        longest=600,
        row_format=row_format,
        rotate=True,
        out_dtype=torch.bfloat16,
        rope_dim=64,
        device="cuda",
    )
    pages, found = tables_of(3, 75, 2), []
    for chunks in ([600], [1] * 40 + [560], [3, 1, 8, 8, 5, 7, 8, 260, 300]):
        for in_step in (False, True):
            capacity = one.num_rows if in_step else state_capacity(4, True, max(chunks))
            ring = RowTables(int32([1], [0], [2]), capacity)
            found.append(one.run([[(2, length)] for length in chunks], ring, pages, in_step=in_step))
    got, want = one.values(found[0], pages, 2, 600), one.expected(2, 600)
    assert_within("write_index_keys", got, want, rounding=ROW_ROUNDING[row_format])
    for other in found[1:]:
        assert torch.equal(other.entries.storage, found[0].entries.storage)


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"raw": torch.zeros(2, 4)}, ValueError, r"write_index_keys: for D = 2 with overlap raw must be \[T, 8\]"),
        ({"ape": torch.zeros(2, 2)}, ValueError, r"ape \[ratio, 4\]"),
        ({"state": CachePool.allocate(1, 5, RowFormat.BF16, 8)}, ValueError, "state must hold FP32 rows of width 8"),
        ({"step": CachePool.allocate(1, 5, RowFormat.FP32, 4)}, ValueError, "step must hold FP32 rows of width 8"),
        ({"keys": CachePool.allocate(1, 5, RowFormat.FP32, 4)}, ValueError, "keys must hold rows of width 2"),
        ({"keys": torch.zeros(4, 2)}, TypeError, "keys must be a CachePool"),
        ({"positions": torch.tensor([0])}, ValueError, "positions must be"),
        ({"requests": torch.tensor([0, 0])}, TypeError, "requests must be int32"),
        ({"first_idx": int32(0)}, ValueError, "first_idx must be"),
        ({"state_tables": int32([-1])}, ValueError, "negative in the block table"),
        ({"state_slots": torch.tensor([0, 5])}, ValueError, "slots must be -1 or in 0 .. 4; got 5"),
        ({"key_slots": torch.tensor([-1, 4])}, ValueError, "slots must be -1 or in 0 .. 3; got 4"),
        ({"key_slots": int32(-1, 2)}, TypeError, "key_slots must be int64"),
        ({"out_dtype": torch.float16}, ValueError, "out_dtype must be"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        by_hand(**change)
