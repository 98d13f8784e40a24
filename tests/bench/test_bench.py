# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on a machine without a GPU: ceilings, reports, and that a wrong kernel is not timed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.bench import ops as benching
from megamoe.bench import public, report, timing
from megamoe.bench.roofline import Ceiling, tensor_bytes
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.formats.nvfp4 import quantize
from megamoe.kernels import KERNELS
from megamoe.models.deepseek_v4.shapes import op_calls, op_shapes
from megamoe.ops.read_cache import read_cache
from megamoe.verify.inputs import INPUTS, kernel_inputs
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.values import copied, parts

ROW = report.Row(
    "rms_norm",
    "flash norm K=4096",
    64,
    2.0,
    6000,
    0,
    timing.Timing(4.0, 3.5, 5.0, False),
    "torch",
    timing.Timing(8.0, 7.0, 9.0, False),
    public_note="none comes with torch",
)


def test_ceiling_is_the_larger_of_bytes_and_products() -> None:
    memory = Ceiling(3_000_000_000, 0, 3000.0, 750.0)
    assert memory.us == memory.memory_us == pytest.approx(1000.0)
    compute = Ceiling(1, 750 * 10**12, 3000.0, 750.0)
    assert compute.us == compute.compute_us == pytest.approx(1e6)


def test_bytes_of_arguments() -> None:
    x = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert tensor_bytes({"x": x, "weight": None, "top_k": 6, "eps": 0.1}) == 4 * 32 * 2
    assert tensor_bytes(quantize(x)) == 4 * 16 + 4 * 2 + 4
    assert tensor_bytes((x, x)) == 2 * 4 * 32 * 2


@pytest.mark.parametrize(
    ("set_bytes", "sets"), [(1, timing.MAX_SETS), (10 << 20, 11), (60 << 20, timing.MIN_SETS), (9 << 30, 3)]
)
def test_sets_exceed_the_cache_twice(set_bytes: int, sets: int) -> None:
    count = timing.num_sets(set_bytes, 50 << 20, 8 << 30)
    assert count == sets
    if 2 << 20 < set_bytes:
        assert count * set_bytes > 2 * (50 << 20)


def test_weights_are_rotated_over_more_memory() -> None:
    l2 = 50 << 20
    assert timing.num_sets(38 << 20, l2, 8 << 30, has_weights=True) == 13  # 8192 x 8192 in NVFP4
    assert timing.num_sets(1 << 20, l2, 8 << 30, has_weights=True) == timing.MAX_WEIGHT_SETS
    assert timing.num_sets(2 << 20, l2, 8 << 30, has_weights=True) * (2 << 20) >= 9 * l2


# public kernels


def experts() -> tuple[dict[str, Any], torch.Tensor]:
    inputs = INPUTS["nvfp4_weight_only_experts"][0]
    call = op_shapes("nvfp4_weight_only_experts")[0]
    arguments = inputs.make(call.dims, 7, torch.Generator().manual_seed(4))
    return arguments, inputs.door(**arguments)


def test_the_grouped_product_is_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    arguments, wanted = experts()
    name, calls = public.bound("nvfp4_weight_only_experts", [arguments, arguments], wanted)
    assert name == f"grouped_mm bf16 (torch {torch.__version__})" and len(calls) == 2
    assert not isinstance(calls, str)
    got = calls[1]()
    assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < 0.02


def _refuses(arguments: dict[str, Any]) -> Any:
    raise RuntimeError("K must be a multiple of 999\nand more")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (
            public.Public("theirs", lambda arguments: lambda: torch.zeros(7, 256), lambda: None),
            "is 1.00 away from ours",
        ),
        (public.Public("theirs", _refuses, lambda: None), "refused: K must be a multiple of 999"),
        (public.Public("theirs", _refuses, public._has(torch, "no_such")), f"torch {torch.__version__} has no no_such"),
    ],
    ids=["wrong", "refuses", "missing"],
)
def test_a_public_kernel_that_cannot_be_timed_says_why(
    kernel: public.Public, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(public.PUBLIC, "nvfp4_weight_only_experts", kernel)
    arguments, wanted = experts()
    name, calls = public.bound("nvfp4_weight_only_experts", [arguments], wanted)
    assert name.startswith("theirs (torch ") and isinstance(calls, str) and calls.endswith(reason)
    assert public.bound("rms_norm", [arguments], wanted) == ("", "none comes with torch")


def test_medians() -> None:
    assert timing.summary([5.0, 1.0, 2.0], True) == timing.Timing(2.0, 1.0, 5.0, True)


def test_rows_say_share_and_speedup() -> None:
    assert ROW.share == 0.5 and ROW.speedup == 2.0
    line = "| rms_norm | flash norm K=4096 | 64 | 2.00 | 4.00 | 50 % | torch | 8.00 | 2.00 |"
    assert report.table_line(ROW) == f"{line} – | – (none comes with torch) |"
    beside = dataclasses.replace(ROW, public_name="theirs (torch 3)", public=ROW.baseline, public_note="")
    assert report.table_line(beside) == f"{line} theirs (torch 3) | 8.00 |"
    assert beside.flat()["public"] == "theirs (torch 3)" and beside.flat()["public_us"] == 8.0
    assert ROW.flat()["public_us"] == "" and ROW.flat()["public_note"] == "none comes with torch"
    assert report.HEADER.splitlines()[0].count("|") == report.table_line(ROW).count("|")
    (row,) = csv.DictReader(io.StringIO(report.as_csv([ROW])))
    assert row["kernel_us"] == "4.0" and row["share_of_ceiling"] == "0.5" and row["num_tokens"] == "64"
    document = json.loads(json.dumps(report.as_document([ROW], {"gpu": "x"}, {"copy_gbps": 1.0})))
    assert document["machine"] == {"gpu": "x"} and document["rows"][0]["kernel"]["median_us"] == 4.0


def test_committed_results_have_the_columns_a_run_writes(repository: pathlib.Path) -> None:
    files = sorted(repository.glob("benchmarks/*/*_ops.csv"))
    assert files
    for path in files:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        columns = list(ROW.flat())
        assert list(rows[0]) in (columns, columns[: columns.index("public")])  # earlier runs had no public kernels
        for row in rows:
            share = float(row["ceiling_us"]) / float(row["kernel_us"])
            assert float(row["share_of_ceiling"]) == pytest.approx(share, rel=0.02, abs=0.002)
            assert float(row["kernel_low_us"]) <= float(row["kernel_us"]) <= float(row["kernel_high_us"])


@pytest.mark.parametrize("op", sorted(INPUTS))
def test_a_right_result_passes_and_a_wrong_one_is_not_timed(op: str) -> None:
    call, inputs = op_shapes(op)[0], INPUTS[op][0]
    arguments = inputs.make(call.dims, 20, torch.Generator().manual_seed(0))
    changed = {name: copied(arguments[name], "cpu") for name in inputs.written}
    got = inputs.run({**arguments, **changed})
    benching.check_sample(call, inputs, arguments, got, 20)
    for one in parts(got).values():
        if one.is_floating_point() and one.dtype.itemsize > 1:
            one.add_(1000.0)
        else:
            bits = one.view(torch.uint8) if one.dtype.itemsize == 1 else one
            bits.bitwise_xor_(torch.full_like(bits, 0x88 if one.dtype.itemsize == 1 else 1))
    with pytest.raises(AssertionError):
        benching.check_sample(call, inputs, arguments, got, 20)


@pytest.mark.parametrize("op", sorted(INPUTS))
def test_no_call_moves_more_than_its_arguments_and_results(op: str) -> None:
    for inputs in kernel_inputs(op):
        arguments = inputs.make(op_shapes(op)[0].dims, 5, torch.Generator().manual_seed(0))
        result = inputs.run({**arguments, **{name: copied(arguments[name], "cpu") for name in inputs.written}})
        everything = tensor_bytes(arguments) + tensor_bytes(result)
        assert 0 < benching.traffic(inputs, arguments, result) <= everything
        assert all(name in inputs.partly for name, one in arguments.items() if isinstance(one, CachePool))


def test_of_a_pool_the_rows_that_a_call_names_are_counted() -> None:
    pool = CachePool.allocate(100, 64, RowFormat.FP8_ROPE_BF16, 512)
    slots = torch.tensor([[5, 6, -1], [6, 7, 7]])
    (read, *_), (write, *_) = INPUTS["read_cache"], INPUTS["write_cache"]
    given = {"pool": pool, "slots": slots}
    out = torch.zeros(2, 3, 512)
    assert benching.traffic(read, given, out) == 3 * 584 + 6 * 8 + 6 * 512 * 4  # each row once, slots, fp32 values
    rows = torch.zeros(3, 512, dtype=torch.bfloat16)
    given = {"rows": rows, "pool": pool, "slots": slots[0]}
    assert benching.traffic(write, given, (pool,)) == 2 * 584 + 3 * 8 + 3 * 1024
    inputs = INPUTS["index_topk"][0]
    keys = CachePool.allocate(100, 64, RowFormat.INDEX_FP4, 128)
    given = {
        "keys": keys,
        "requests": torch.tensor([0, 0, 2, -1], dtype=torch.int32),
        "num_visible": torch.tensor([10, 30, 7, 99], dtype=torch.int32),
    }
    assert inputs.partly_bytes(given) == (30 + 7) * 68  # once a request, for the token that sees most
    (penalize,) = INPUTS["penalize"]
    given = penalize.make({"V": 1000}, 4, torch.Generator().manual_seed(0))
    small = sum(tensor_bytes(one) for name, one in given.items() if name != "logits")
    assert benching.traffic(penalize, given, (given["logits"],)) == small + 2 * 4 * 20


@pytest.mark.parametrize("op", sorted(INPUTS))
def test_a_case_without_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock: sets of buffers are made, and every set is called once."""
    called: list[int] = []

    def capture(call: Any, count: int, calls: int) -> None:
        called.append(count)
        for index in range(count):
            call(index)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "time_graphs", lambda graphs, calls, from_l2: dict.fromkeys(graphs, ROW.kernel))
    for inputs in kernel_inputs(op):
        row = benching.bench_case(op_shapes(op)[0], inputs, 3, 3000.0, 700.0, benching.BASELINES.get(op), device="cpu")
        assert row.num_bytes > 0 and row.op == op
        assert (row.baseline is not None) == (op in benching.BASELINES)
    assert set(called) == {timing.MIN_SETS}


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_sizes_that_models_share_are_timed_for_each_of_them(op: str) -> None:
    """A latent row is as wide in all models: the sizes of one must not be left out because another has them, too."""
    planned = {tuple(call.dims.items()) for call, _, _ in benching.plan([op], [1], ["flash"])}
    assert planned == {tuple(call.dims.items()) for call in op_calls("flash") if call.op == op} and planned


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_baselines_do_the_same_work(op: str) -> None:
    """A baseline that computes something else would make any ratio."""
    call = next(one for one in op_shapes(op))
    bound = 0.15 if op == "nvfp4_experts" else 0.02  # gate and up in bf16 move h across steps of E2M1
    for inputs in (one for one in kernel_inputs(op) if one.timed):
        arguments = inputs.make(call.dims, 6, torch.Generator().manual_seed(3))
        want, got = (
            [part for one in _results(run, inputs, arguments) for part in parts(one).values()]
            for run in (inputs.door, benching.BASELINES[op].run)
        )
        for one, other in zip(got, want, strict=True):
            if one is None or other is None:  # everything is written in place
                assert one is other
                continue
            assert one.shape == other.shape
            if one.is_floating_point() and one.dtype.itemsize > 1 and one.dim():
                close = (one.float() - other.float()).norm() <= bound * other.float().norm()
                assert close or not other.float().isfinite().all()


@pytest.mark.parametrize(
    ("op", "pool", "slots"),
    [
        ("write_latent", "pool", "slots"),
        ("compress_kv", "entries", "entry_slots"),
        ("write_index_keys", "keys", "key_slots"),
    ],
)
def test_baselines_write_the_same_rows(op: str, pool: str, slots: str) -> None:
    """Of tokens that are somebody's and write a row, later than the first block of a sequence."""
    inputs = INPUTS[op][0]
    for call in op_shapes(op):
        arguments = inputs.make(call.dims, 12, torch.Generator().manual_seed(3))
        arguments = inputs.only(arguments, (arguments[slots] >= 0).nonzero()[:, 0])
        if "positions" in arguments:
            arguments["positions"] = arguments["positions"] + 1024
        other = {name: copied(value, "cpu") for name, value in arguments.items()}
        inputs.run(arguments)
        benching.BASELINES[op].run(**other)
        assert len(arguments[slots]) > 4
        want, got = (read_cache(one[pool], arguments[slots]) for one in (arguments, other))
        assert float((got - want).norm() / want.norm()) < 0.05, str(call)  # a few FP4 codes lie beside a step


def _results(run: Callable[..., Any], inputs: OpInputs, arguments: Arguments) -> list[Any]:
    """Return what a call returns, then what it writes in place, of copies."""
    written = {name: copied(arguments[name], "cpu") for name in inputs.written}
    returned = run(**{**arguments, **written})
    return [*([] if returned is None else _flat(returned)), *written.values()]


def _flat(value: Any) -> list[Any]:
    return [one for part in value for one in _flat(part)] if isinstance(value, tuple) else [value]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert benching.main(["rms_norm"]) == 2
    assert capsys.readouterr().err.startswith("megamoe: error: bench: there is no CUDA device here")
    assert benching.main(["sort"]) == 2
    assert "no kernel for sort" in capsys.readouterr().err
