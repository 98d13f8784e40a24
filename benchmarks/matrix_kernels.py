# SPDX-License-Identifier: Apache-2.0
"""NVFP4 linears and experts beside cuBLAS on one GPU, weights rotated so that L2 does not help.

python benchmarks/matrix_kernels.py OUT.csv [linears] [experts] [layers] [grouped] [plain]

`megamoe bench` rotates tokens and keeps the weight, which is right for kernels that are bound by tokens. Here the
weight is what has to come from memory: every call of a captured graph takes another copy of it, at least 450 MB in all.
Times are medians of 9 replays (5 for many tokens) over the calls in the graph. The copy bandwidth is measured first.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch

from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops.grouped_linear import grouped_linear, nvfp4_grouped_linear, nvfp4_weight_only_grouped_linear
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.ops.route_experts import route_experts
from megamoe.ops.swiglu import clamped_swiglu

SHAPES = ((8192, 8192), (4096, 7168), (7168, 3072), (6144, 7168), (16384, 1536), (65536, 1536))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
EXPERTS = {"V4-Pro, rank of 8": (48, 7168, 3072, 6, 64), "V4-Flash, rank of 8": (32, 4096, 2048, 6, 64)}
GROUPED = {"V4-Flash wo_a": (8, 1024, 4096), "V4-Pro wo_a": (16, 1024, 4096)}
PLAIN = ((129280, 7168), (1024, 7168), (512, 7168), (64, 7168), (129280, 4096), (1024, 4096), (64, 4096))
ROTATED_BYTES = 450_000_000


def graph_us(calls: list[Callable[[], object]], replays: int) -> float:
    """Return the median microseconds of a call, all of them captured in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_gbps() -> float:
    """Return the bandwidth of a large device-to-device copy, bytes read and written."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 4 * 1e3)
    return 2 * source.nbytes / statistics.median(times) / 1e3


def copies(w: NvFp4Tensor, count: int) -> list[NvFp4Tensor]:
    """Return copies of a weight."""
    return [dataclasses.replace(w, codes=w.codes.clone(), scales=w.scales.clone()) for _ in range(count)]


def linears(bandwidth: float) -> list[dict[str, object]]:
    """Measure both linears at all sizes."""
    rows: list[dict[str, object]] = []
    for num_rows, width in SHAPES:
        weight_bytes = num_rows * width * 9 // 16
        base = nvfp4.quantize(torch.randn(num_rows, width, device="cuda")).fragments()
        weights = copies(base, max(3, ROTATED_BYTES // weight_bytes + 1))
        count = max(3, ROTATED_BYTES // (2 * num_rows * width) + 1)
        plain = [torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
            quantized, replays = quantize_nvfp4(x), 9 if num_tokens <= 64 else 5
            cublas = graph_us([functools.partial(torch.matmul, x, w.T) for w in plain], replays)
            for op, door, tokens in (
                ("nvfp4_weight_only_linear", nvfp4_weight_only_linear, x),
                ("nvfp4_linear", nvfp4_linear, quantized),
            ):
                calls = [functools.partial(door, tokens, w, out_dtype=torch.bfloat16) for w in weights]
                us = graph_us(calls, replays)
                rows.append(row(op, f"{num_rows}x{width}", num_tokens, us, weight_bytes, bandwidth, cublas))
        del weights, plain, base
        torch.cuda.empty_cache()
    return rows


def expert_weights(num_experts: int, width: int, inner_size: int) -> tuple[NvFp4Tensor, ...]:
    """Return w1, w3 and w2 of some experts; all have the same values, each has bytes of its own."""
    weights = []
    for num_rows, columns in ((inner_size, width), (inner_size, width), (width, inner_size)):
        one = nvfp4.quantize(torch.randn(num_rows, columns, device="cuda") * columns**-0.5).fragments()
        stacked = {
            field: torch.stack([getattr(one, field)] * num_experts) for field in ("codes", "scales", "tensor_scale")
        }
        weights.append(dataclasses.replace(one, **stacked))
    return tuple(weights)


def random_ids(num_tokens: int, num_experts: int, num_slots: int) -> torch.Tensor:
    """Return a random choice of experts for each token."""
    return torch.rand(num_tokens, num_experts, device="cuda").argsort(-1)[:, :num_slots].contiguous()


def experts(bandwidth: float) -> list[dict[str, object]]:
    """Measure both experts operations at decode sizes; their weights are larger than L2 many times."""
    rows: list[dict[str, object]] = []
    for name, (num_experts, width, inner_size, num_slots, num_tokens) in EXPERTS.items():
        weights = expert_weights(num_experts, width, inner_size)
        x = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
        route_weights = torch.rand(num_tokens, num_slots, device="cuda")
        ids = random_ids(num_tokens, num_experts, num_slots)
        num_bytes = 3 * int(ids.unique().numel()) * width * inner_size * 9 // 16
        for door in (nvfp4_weight_only_experts, nvfp4_experts):
            call = functools.partial(door, x, route_weights, ids, *weights, swiglu_limit=10.0)
            us = graph_us([call] * 4, 9)
            rows.append(row(door.__name__, name, num_tokens, us, num_bytes, bandwidth, None))
        del weights
        torch.cuda.empty_cache()
    return rows


def layers(bandwidth: float) -> list[dict[str, object]]:
    """Measure the mixture of experts of a V4-Flash layer: routing, 256 experts, the shared expert in two ways.

    Unfused, three linears (and the quantizer) and clamped_swiglu compute the shared expert's output. Bytes are those of
    the experts that were chosen, and of the shared one.
    """
    num_experts, width, inner_size, num_slots = 256, 4096, 2048, 6
    weights, rows, num_calls = expert_weights(num_experts, width, inner_size), [], 4
    shared = [tuple(one[0] for one in expert_weights(1, width, inner_size)) for _ in range(num_calls)]
    gate = (torch.randn(num_experts, width, device="cuda") * width**-0.5).bfloat16()
    for num_tokens in (1, 8, 64):
        xs = [torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(num_calls)]
        routing = {"token_ids": torch.arange(num_tokens, device="cuda"), "top_k": num_slots, "routed_scaling": 1.5}
        chosen = [int(route_experts(x, gate, **routing)[1].unique().numel()) for x in xs]
        num_bytes = 3 * (sum(chosen) // num_calls + 1) * width * inner_size * 9 // 16
        for door, times in (
            (nvfp4_weight_only_experts, nvfp4_weight_only_linear),
            (nvfp4_experts, lambda x, w: nvfp4_linear(quantize_nvfp4(x) if isinstance(x, torch.Tensor) else x, w)),
        ):

            def fused(x: torch.Tensor, v: tuple[NvFp4Tensor, ...], door=door, routing=routing) -> torch.Tensor:  # type: ignore[no-untyped-def]
                route = route_experts(x, gate, **routing)
                return door(x, *route, *weights, shared_weights=v, swiglu_limit=10.0)

            def unfused(
                x: torch.Tensor, v: tuple[NvFp4Tensor, ...], door=door, times=times, routing=routing
            ) -> torch.Tensor:  # type: ignore[no-untyped-def]
                route = route_experts(x, gate, **routing)
                source = quantize_nvfp4(x) if door is nvfp4_experts else x
                hidden = clamped_swiglu(times(source, v[0]), times(source, v[1]), limit=10.0)
                return door(x, *route, *weights, shared_output=times(hidden, v[2]), swiglu_limit=10.0)

            for what, layer in (("fused", fused), ("unfused", unfused)):
                error = (layer(xs[0], shared[0]).float() - unfused(xs[0], shared[0]).float()).norm()
                assert error <= 1e-2 * unfused(xs[0], shared[0]).float().norm(), (what, float(error))
                calls = [functools.partial(layer, x, v) for x, v in zip(xs, shared, strict=True)]
                name = f"V4-Flash layer, shared expert {what}"
                rows.append(row(door.__name__, name, num_tokens, graph_us(calls, 9), num_bytes, bandwidth, None))
    return rows


def grouped(bandwidth: float) -> list[dict[str, object]]:
    """Measure the three grouped projections beside torch.bmm in bf16, whose result is not copied to [T, G, N]."""
    rows: list[dict[str, object]] = []
    for name, (num_groups, num_rows, width) in GROUPED.items():
        values = num_groups * num_rows * width
        base = nvfp4.quantize(torch.randn(num_groups, num_rows, width, device="cuda")).fragments()
        weights = copies(base, ROTATED_BYTES // (values * 9 // 16) + 1)
        count = ROTATED_BYTES // (2 * values) + 1
        plain = [torch.randn(num_groups, num_rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, num_groups, width, device="cuda", dtype=torch.bfloat16)
            by_group, quantized, replays = x.transpose(0, 1), quantize_nvfp4(x), 9 if num_tokens <= 64 else 5
            cublas = graph_us([functools.partial(torch.bmm, by_group, w.transpose(1, 2)) for w in plain], replays)
            for op, calls, weight_bytes in (
                ("grouped_linear", [functools.partial(grouped_linear, x, w) for w in plain], 2 * values),
                (
                    "nvfp4_weight_only_grouped_linear",
                    [functools.partial(nvfp4_weight_only_grouped_linear, x, w) for w in weights],
                    values * 9 // 16,
                ),
                (
                    "nvfp4_grouped_linear",
                    [functools.partial(nvfp4_grouped_linear, quantized, w) for w in weights],
                    values * 9 // 16,
                ),
            ):
                us = graph_us(calls, replays)
                rows.append(row(op, name, num_tokens, us, weight_bytes, bandwidth, cublas))
        del weights, plain, base
        torch.cuda.empty_cache()
    return rows


def plain(bandwidth: float) -> list[dict[str, object]]:
    """Measure linear with bf16 weights and fp32 output beside cuBLAS, which stores bf16."""
    rows: list[dict[str, object]] = []
    for num_rows, width in PLAIN:
        count = max(2, min(32, ROTATED_BYTES // (2 * num_rows * width) + 1))
        weights = [torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for num_tokens in (1, 8, 16, 64, 256, 1024):
            x = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
            cublas = graph_us([functools.partial(torch.matmul, x, w.T) for w in weights], 5)
            us = graph_us([functools.partial(linear, x, w, out_dtype=torch.float32) for w in weights], 5)
            shape = f"{num_rows}x{width}"
            rows.append(row("linear", shape, num_tokens, us, 2 * num_rows * width, bandwidth, cublas))
        del weights
        torch.cuda.empty_cache()
    return rows


PARTS = {"linears": linears, "experts": experts, "layers": layers, "grouped": grouped, "plain": plain}


def row(
    op: str, shape: str, num_tokens: int, us: float, weight_bytes: int, bandwidth: float, baseline: float | None
) -> dict[str, object]:
    """Return one line of the table, and print it."""
    floor = weight_bytes / bandwidth / 1e3
    line: dict[str, object] = {
        "op": op,
        "shape": shape,
        "num_tokens": num_tokens,
        "kernel_us": round(us, 1),
        "cublas_bf16_us": "" if baseline is None else round(baseline, 1),
        "weight_bytes": weight_bytes,
        "copy_gbps": round(bandwidth),
        "share_of_byte_floor": round(floor / us, 3),
    }
    print(*line.values(), flush=True)
    return line


if __name__ == "__main__":
    parts = sys.argv[2:] or list(PARTS)
    measured = copy_gbps()
    table = [line for part in parts for line in PARTS[part](measured)]
    with pathlib.Path(sys.argv[1]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
