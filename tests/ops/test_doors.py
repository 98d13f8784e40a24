# SPDX-License-Identifier: Apache-2.0
"""Every door checks what the host knows and leaves values to the reference: none of them waits for a device.

Doors are found by reading `ops/`: a public function that calls `pick`. A new one without a case here fails.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megamoe import ops
from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.embed_streams import embed_streams
from megamoe.ops.experts import experts
from megamoe.ops.fp8_experts import fp8_experts
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.grouped_linear import (
    fp8_grouped_linear,
    grouped_linear,
    nvfp4_grouped_linear,
    nvfp4_weight_only_grouped_linear,
)
from megamoe.ops.hadamard import hadamard
from megamoe.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_head_norm,
    hyper_connection_post,
    hyper_connection_post_pre_norm,
    hyper_connection_pre,
    hyper_connection_pre_norm,
)
from megamoe.ops.index_topk import index_scores, index_topk
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.penalize import penalize
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.quantize import quantize_fp8_rows, quantize_mxfp4, quantize_nvfp4
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.rotate_queries import rotate_queries
from megamoe.ops.round_index_query import round_index_query
from megamoe.ops.route_experts import route_experts
from megamoe.ops.sample import sample
from megamoe.ops.save_rows import save_rows
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.streams import add_to_streams, mean_of_streams
from megamoe.ops.swiglu import clamped_swiglu
from megamoe.ops.token_logprobs import token_logprobs
from megamoe.ops.write_block_tables import write_block_tables
from megamoe.ops.write_cache import write_cache
from megamoe.ops.write_index_keys import write_index_keys
from megamoe.ops.write_latent import write_latent

from ..host_reads import HostReads, count_host_reads

FOLDER = pathlib.Path(ops.__file__).parent
T, WIDTH, NUM_EXPERTS = 3, 64, 4

Case = Callable[[], Any]
"""A door with its arguments."""

bound = functools.partial


def _pool(row_format: RowFormat = RowFormat.BF16, width: int = WIDTH) -> CachePool:
    pool = CachePool.allocate(2, 8, row_format, width)
    write_cache(torch.randn(16, width), pool, torch.arange(16))
    return pool


def _slots(*shape: int) -> torch.Tensor:
    slots = torch.arange(int(np.prod(shape))).reshape(shape) % 16
    slots[-1] = -1
    return slots


def _quantized(*shape: int, scale_per: Any = "tensor") -> nvfp4.NvFp4Tensor:
    return nvfp4.quantize(torch.randn(shape), scale_per=scale_per)


def _streams() -> tuple[torch.Tensor, ...]:
    return torch.randn(T, 2, WIDTH), torch.randn(8, 2 * WIDTH), torch.randn(8), torch.ones(3)


def _routed(weights: Callable[..., Any]) -> tuple[Any, ...]:
    """x, route weights, expert ids, w1, w3, w2."""
    ids = torch.arange(2 * T).reshape(T, 2) % NUM_EXPERTS
    up = weights(NUM_EXPERTS, 32, WIDTH), weights(NUM_EXPERTS, 32, WIDTH)
    return torch.randn(T, WIDTH), torch.rand(T, 2), ids, *up, weights(NUM_EXPERTS, WIDTH, 32)


def _experts(door: Callable[..., Any], weights: Callable[..., Any]) -> list[Case]:
    return [bound(door, *_routed(weights), swiglu_limit=7.0, shared_output=torch.randn(T, WIDTH))]


def _nvfp4_experts(door: Callable[..., Any]) -> list[Case]:
    shared = _quantized(32, WIDTH), _quantized(32, WIDTH), _quantized(WIDTH, 32)
    return [
        *_experts(door, _quantized),
        bound(door, *_routed(_quantized), swiglu_limit=7.0, shared_weights=shared),
    ]


def _route_experts() -> list[Case]:
    given = {"token_ids": torch.tensor([0, 1, -1]), "top_k": 2, "routed_scaling": 2.5}
    x, gate = torch.randn(T, WIDTH), torch.randn(NUM_EXPERTS, WIDTH)
    table = torch.arange(10).reshape(5, 2) % NUM_EXPERTS
    return [
        bound(route_experts, x, gate, bias=torch.randn(NUM_EXPERTS), **given),
        bound(route_experts, x, gate, expert_table=table, **given),
    ]


def _int32(*numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _step() -> dict[str, torch.Tensor]:
    """A token of each of two requests, and nobody's."""
    return {
        "positions": torch.tensor([4, 7, -1]),
        "requests": _int32(1, 0, -1),
        "first_idx": _int32(0, 1, 2),
    }


def _compressor(door: Callable[..., Any], slots: str, **more: Any) -> list[Case]:
    state = _pool(RowFormat.FP32, 4 * 32)
    given = {
        **_step(),
        "state_tables": _int32([0], [1]),
        "state_slots": torch.tensor([12, 7, -1]),
        slots: torch.tensor([-1, 3, -1]),
        "table": rope_table(16, 1e4),
        "ratio": 4,
        **more,
    }
    raw, ape, norm = torch.randn(T, 4 * 32), torch.randn(4, 2 * 32), torch.ones(32)
    steps = (None, _pool(RowFormat.FP32, 4 * 32))
    return [bound(door, raw, ape, norm, state, step, _pool(width=32), **given) for step in steps]


def _index_topk() -> list[Case]:
    tables = {
        "block_tables": _int32([1, 0], [0, 1]),
        "requests": _step()["requests"],
        "num_visible": _int32(3, 9, 0),
    }
    q = torch.randn(T, 2, 128)
    keys = _pool(RowFormat.INDEX_FP4, 128)
    queries = mxfp4.quantize(q), fp8.quantize_rows(q, group=128), q
    return [bound(index_topk, one, torch.randn(T, 2), keys, top_k=4, **tables) for one in queries]


def _index_scores() -> list[Case]:
    return [bound(index_scores, torch.randn(T, 2, 128), torch.randn(T, 2), _pool(width=128), _slots(9))]


def _sparse_attention() -> list[Case]:
    given = {**_step(), "window_size": 4, "window_tables": _int32([0], [1]), "table": rope_table(16, 1e4), "scale": 0.1}
    tables = {"entry_tables": _int32([1, 0], [0, 1]), "num_visible": _int32(2, 3, 0)}
    chosen = _int32([0, -1], [1, 2], [-1, -1])
    none = {"entry_tables": None, "num_visible": None}
    q, sink = torch.randn(T, 2, WIDTH), torch.randn(2)
    ends = torch.tensor([3, 7, -1])
    return [
        bound(sparse_attention, q, _pool(), _pool(), sink, step=None, entry_idx=None, **tables, **given),
        bound(sparse_attention, q, _pool(), _pool(), sink, step=_pool(), entry_idx=chosen, **tables, **given),
        bound(sparse_attention, q, _pool(), None, sink, step=None, entry_idx=None, window_ends=ends, **none, **given),
    ]


def _plan_slots() -> list[Case]:
    tokens = torch.stack((_int32(5, 6, -1), _int32(4, 7, -1), _int32(1, 0, -1), _int32(0, 1, 2)))
    rings = RowTables(_int32([0], [1]), 8)
    kinds = (EntryTables(4, rings, RowTables(_int32([1, 0], [0, 1]), 4)),)
    out = StepSlots.empty(T, 1, torch.device("cpu"))
    return [bound(plan_slots, tokens, rings, kinds, out, in_rings=in_rings) for in_rings in (True, False)]


def _save_rows() -> list[Case]:
    saves = _int32([0, 6, 4, 0, 1], [1, 3, 2, 2, 0], [-1, -1, -1, -1, -1])
    target = CachePool.allocate(2, 3, RowFormat.BF16, WIDTH)
    return [bound(save_rows, _pool(), step, target, saves, _int32([0], [1])) for step in (None, _pool())]


def _sample() -> list[Case]:
    one = torch.ones(T)
    given = {"temperature": one, "top_k": torch.full((T,), 3), "top_p": one * 0.9, "uniform": one * 0.5}
    return [bound(sample, torch.randn(T, 9), min_p=min_p, **given) for min_p in (None, one * 0.1)]


def _penalize() -> list[Case]:
    rows, ids, counts = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.ones(2)
    one = torch.ones(T)
    return [bound(penalize, torch.randn(T, 9), rows, ids, counts, repetition=one, presence=one, frequency=one)]


def _hyper_connection_post(*more: torch.Tensor) -> list[Case]:
    x, mix = torch.randn(T, 2, WIDTH), torch.rand(T, 2, 2)
    door = hyper_connection_post_pre_norm if more else hyper_connection_post
    return [bound(door, torch.randn(T, WIDTH), x, torch.rand(T, 2), mix, *more)]


def _head() -> tuple[torch.Tensor, ...]:
    return _streams()[0], torch.randn(2, 2 * WIDTH), torch.randn(2), torch.ones(1)


def _hyper_connection_head_norm() -> list[Case]:
    norm = torch.ones(WIDTH)
    return [bound(hyper_connection_head_norm, *_head(), norm, rows=rows) for rows in (None, torch.tensor([2, 0]))]


def _mean_of_streams() -> list[Case]:
    return [bound(mean_of_streams, _streams()[0], out=out) for out in (None, torch.empty(T, WIDTH))]


def _write_latent() -> list[Case]:
    norm, positions, table = torch.ones(WIDTH), torch.arange(T) - 1, rope_table(16, 1e4)
    queries = ((None, None), (torch.randn(T, 32), torch.ones(32)))
    return [bound(write_latent, q, _x(), q_norm, norm, _pool(), _slots(T), positions, table) for q, q_norm in queries]


def _round_index_query() -> list[Case]:
    q, weights, positions, table = torch.randn(T, 2, 128), torch.randn(T, 2), torch.arange(T) - 1, rope_table(16, 1e4)
    given = {"hadamard": True, "head_scale": 0.1}
    formats = (RowFormat.INDEX_FP4, RowFormat.INDEX_FP8, RowFormat.BF16)
    return [bound(round_index_query, q, weights, positions, table, key_format=one, **given) for one in formats]


def _grouped(quantized: bool, weights: Callable[..., Any], door: Callable[..., Any]) -> list[Case]:
    x = _quantized(T, 2, WIDTH, scale_per="row") if quantized else torch.randn(T, 2, WIDTH)
    return [bound(door, x, weights(2, 16, WIDTH))]


def _x() -> torch.Tensor:
    return torch.randn(T, WIDTH)


CASES: dict[str, Callable[[], list[Case]]] = {
    "add_to_streams": lambda: [bound(add_to_streams, _streams()[0], _x())],
    "clamped_swiglu": lambda: [bound(clamped_swiglu, _x(), _x(), limit=7.0, row_weight=torch.ones(T))],
    "compress_kv": lambda: _compressor(compress_kv, "entry_slots", overlap=True),
    "copy_cache": lambda: [bound(copy_cache, _pool(), _slots(T), _pool(), _slots(T))],
    "embed_streams": lambda: [bound(embed_streams, torch.randn(5, WIDTH), torch.arange(T) - 1, num_streams=2)],
    "experts": lambda: _experts(experts, torch.randn),
    "fp8_experts": lambda: _experts(fp8_experts, lambda *shape: fp8.quantize_blocks(torch.randn(shape))),
    "fp8_grouped_linear": lambda: [
        bound(fp8_grouped_linear, fp8.quantize_rows(torch.randn(3, 2, 64)), fp8.quantize_blocks(torch.randn(2, 8, 64)))
    ],
    "fp8_linear": lambda: [bound(fp8_linear, fp8.quantize_rows(_x()), fp8.quantize_blocks(torch.randn(16, WIDTH)))],
    "grouped_linear": lambda: _grouped(False, torch.randn, grouped_linear),
    "hadamard": lambda: [bound(hadamard, _x())],
    "hyper_connection_head": lambda: [bound(hyper_connection_head, *_head())],
    "hyper_connection_head_norm": _hyper_connection_head_norm,
    "hyper_connection_post": _hyper_connection_post,
    "hyper_connection_post_pre_norm": lambda: _hyper_connection_post(*_streams()[1:], torch.ones(WIDTH)),
    "hyper_connection_pre": lambda: [bound(hyper_connection_pre, *_streams())],
    "hyper_connection_pre_norm": lambda: [bound(hyper_connection_pre_norm, *_streams(), torch.ones(WIDTH))],
    "index_scores": _index_scores,
    "index_topk": _index_topk,
    "linear": lambda: [bound(linear, _x(), torch.randn(16, WIDTH))],
    "mean_of_streams": _mean_of_streams,
    "nvfp4_experts": lambda: _nvfp4_experts(nvfp4_experts),
    "nvfp4_grouped_linear": lambda: _grouped(True, _quantized, nvfp4_grouped_linear),
    "nvfp4_linear": lambda: [bound(nvfp4_linear, _quantized(T, WIDTH, scale_per="row"), _quantized(16, WIDTH))],
    "nvfp4_weight_only_experts": lambda: _nvfp4_experts(nvfp4_weight_only_experts),
    "nvfp4_weight_only_grouped_linear": lambda: _grouped(False, _quantized, nvfp4_weight_only_grouped_linear),
    "nvfp4_weight_only_linear": lambda: [bound(nvfp4_weight_only_linear, _x(), _quantized(16, WIDTH))],
    "penalize": _penalize,
    "plan_slots": _plan_slots,
    "quantize_fp8_rows": lambda: [bound(quantize_fp8_rows, _x())],
    "quantize_mxfp4": lambda: [bound(quantize_mxfp4, _x())],
    "quantize_nvfp4": lambda: [
        bound(quantize_nvfp4, _x()),
        bound(quantize_nvfp4, _x(), scale_layout=ScaleLayout.TILED_128X4),
        bound(quantize_nvfp4, _x(), tensor_scale=torch.tensor(0.01)),
    ],
    "read_cache": lambda: [bound(read_cache, _pool(), _slots(T, 2))],
    "rms_norm": lambda: [bound(rms_norm, _x(), None), bound(rms_norm, _x(), torch.ones(WIDTH))],
    "rms_norm_quantize_nvfp4": lambda: [bound(rms_norm_quantize_nvfp4, _x().bfloat16(), torch.ones(WIDTH))],
    "rope": lambda: [bound(rope, _x(), torch.arange(T), rope_table(16, 1e4), inverse=True)],
    "rotate_queries": lambda: [
        bound(rotate_queries, torch.randn(T, 2, WIDTH), torch.arange(T) - 1, rope_table(16, 1e4))
    ],
    "round_index_query": _round_index_query,
    "route_experts": _route_experts,
    "sample": _sample,
    "save_rows": _save_rows,
    "sparse_attention": _sparse_attention,
    "token_logprobs": lambda: [bound(token_logprobs, torch.randn(T, 9), torch.arange(T), num_top=2)],
    "write_block_tables": lambda: [bound(write_block_tables, _int32([0, -1], [1, 2]), _int32([1, 0, 5], [-1, -1, -1]))],
    "write_cache": lambda: [bound(write_cache, _x(), _pool(), _slots(T))],
    "write_index_keys": lambda: [
        case for rotate in (False, True) for case in _compressor(write_index_keys, "key_slots", rotate=rotate)
    ],
    "write_latent": _write_latent,
}


def _functions() -> Iterator[ast.FunctionDef]:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                yield node


def _calls_pick(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pick"
        for node in ast.walk(function)
    )


def _doors() -> list[str]:
    return sorted(one.name for one in _functions() if not one.name.startswith("_") and _calls_pick(one))


def _count(case: Case) -> HostReads:
    with count_host_reads() as reads:
        case()
    return reads


# --- every door ---


def test_every_door_has_a_case_and_every_case_is_a_door() -> None:
    assert sorted(CASES) == _doors(), "add the door to CASES, with arguments for every path through it"
    assert len(_doors()) > 30  # it does find them


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_door_reads_nothing_back(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    for case in CASES[name]():
        reads = _count(case)
        assert reads.operations[:1] == [name]  # it went through `pick`, under the door's own name
        assert reads.places == []


# --- the check itself ---

VALUES = torch.tensor([3, 1, 2])
MASK = VALUES > 1

READS: dict[str, Callable[[], Any]] = {
    "item": lambda: VALUES.max().item(),
    "int": lambda: int(VALUES.max()),
    "float": lambda: float(VALUES[0]),
    "bool": lambda: bool(MASK.all()),
    "index": lambda: range(VALUES[0]),
    "slice": lambda: VALUES[: VALUES[1]],
    "size": lambda: torch.zeros(VALUES[0]),
    "format": lambda: f"{VALUES[0]}",
    "in": lambda: 3 in VALUES,
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "asarray": lambda: np.asarray(VALUES),
    "cpu": lambda: VALUES.cpu(),
    "to": lambda: VALUES.to("cpu"),
    "mask": lambda: VALUES[MASK],
    "set by mask": lambda: VALUES.clone().__setitem__(MASK, torch.tensor([7, 8])),
    "where": lambda: torch.where(MASK),
    "nonzero": lambda: MASK.nonzero(),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "unique": lambda: VALUES.unique(),
    "unique_consecutive": lambda: VALUES.unique_consecutive(),
    "bincount": lambda: torch.bincount(VALUES),
    "repeat_interleave": lambda: VALUES.repeat_interleave(VALUES),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "tensor of tensors": lambda: torch.tensor([VALUES[0], VALUES[1]]),
}

WORK: dict[str, Callable[[], Any]] = {
    "shapes": lambda: VALUES.new_empty(VALUES.shape[0], 2).reshape(-1)[: VALUES.numel()],
    "masks": lambda: VALUES.masked_fill(MASK, 0) + torch.where(MASK, VALUES, 0),
    "fill by mask": lambda: VALUES.clone().__setitem__(MASK, 0),
    "gather": lambda: VALUES[VALUES - 1].sort().values.aminmax(),
    "rows": lambda: list(VALUES),
    "repeat": lambda: VALUES.repeat_interleave(2),
    "repeat to a size": lambda: VALUES.repeat_interleave(VALUES, output_size=6),
    "upload": lambda: torch.tensor([1, 2]) + torch.from_numpy(np.arange(2)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", READS)
def test_a_read_is_seen(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        reads = _count(READS[name])
    assert len(reads.places) == 1 and "test_doors.py" in reads.places[0]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WORK)
def test_work_without_a_read_is_not(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        assert _count(WORK[name]).places == []


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_read_in_a_door_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """`int(t.max())` in the dimension check of a door; a reference that does the same is left alone."""
    torch.manual_seed(seed)
    (case, *_) = CASES[name]()
    module = sys.modules[case.func.__module__]  # type: ignore[attr-defined]
    right = sys.modules["megamoe.ops.check"].check

    def looks_at_values(op: str, /, **given: Any) -> dict[str, int]:
        int(torch.ones(2).max())
        return right(op, **given)

    holder = module if hasattr(module, "check") else sys.modules["megamoe.ops.expert_common"]
    monkeypatch.setattr(holder, "check", looks_at_values)
    places = _count(case).places  # some doors check in parts
    assert places and all("looks_at_values" in place for place in places)


def test_what_an_operation_runs_may_read() -> None:
    with count_host_reads() as reads, ops.watch(lambda op, run, reference: lambda *args: VALUES.tolist()):
        assert rms_norm(VALUES.float(), None) == [3, 1, 2]
        int(VALUES[0])
    assert reads.operations == ["rms_norm"] and len(reads.places) == 1
