# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a whole V4-Flash layer on one GPU, beside the same through a bf16 grouped product.

python benchmarks/flash_layer.py OUT.csv [--pack PACK]

256 experts of 4096 x 2048, top 6, 1 to 4096 tokens; random near-even routing, and one where experts are chosen by
Zipf's law. For both recipes a sample of tokens is compared with the reference first. Then everything of a size is
captured in graphs, several routings to a graph so that few tokens do not find their experts in L2, and the graphs are
replayed in turn; times are medians. Baseline: sort, gather, torch's grouped_mm over bf16 weights (12.9 GB), SwiGLU, sum
in torch; its two products alone are a column of their own. Floors: bytes of the chosen experts over the copy bandwidth,
and products over the rate of a bf16 matrix product, both measured in this run.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable

import torch
from matrix_kernels import copy_gbps

from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops.expert_common import sum_of_experts
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.verify.ops import open_gpu
from megamoe.verify.tolerance import assert_within

NUM_EXPERTS, WIDTH, INNER_SIZE, NUM_SLOTS, LIMIT = 256, 4096, 2048, 6, 10.0
TOKENS = (1, 8, 64, 512, 4096)
DISTINCT = 8  # experts that are quantized; the others are copies with tensor scales of their own
SAMPLE = 12  # tokens that are compared
RECIPES = {"w4a16": nvfp4_weight_only_experts, "w4a4": nvfp4_experts}
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a graph of some calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def medians_us(graphs: list[tuple[torch.cuda.CUDAGraph, int]], rounds: int = 9) -> list[float]:
    """Return the median microseconds of a call of each graph (graph, number of calls), replayed in turn."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for (graph, count), mine in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            mine.append(start.elapsed_time(end) * 1e3 / count)
    return [statistics.median(mine) for mine in times]


def matmul_tflops() -> float:
    """Return the rate of a bf16 matrix product of 8192 x 8192 by 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / medians_us([(capture([lambda: a @ b.T] * 2), 2)])[0] / 1e6


def make_weight(num_rows: int, num_columns: int) -> tuple[NvFp4Tensor, torch.Tensor]:
    """Return a weight of all experts, and the same dequantized to bf16."""
    base = [
        nvfp4.quantize(torch.randn(num_rows, num_columns, device="cuda") * num_columns**-0.5) for _ in range(DISTINCT)
    ]
    factors = (torch.rand(NUM_EXPERTS, device="cuda") + 0.5).tolist()
    chosen = [base[index % DISTINCT] for index in range(NUM_EXPERTS)]
    tensor_scale = torch.stack([one.tensor_scale * factor for one, factor in zip(chosen, factors, strict=True)])
    in_order = [one.fragments() for one in base]
    weight = dataclasses.replace(
        in_order[0],
        codes=torch.stack([in_order[index % DISTINCT].codes for index in range(NUM_EXPERTS)]),
        scales=torch.stack([in_order[index % DISTINCT].scales.view(torch.uint8) for index in range(NUM_EXPERTS)]).view(
            torch.float8_e4m3fn
        ),
        tensor_scale=tensor_scale,
    )
    values = [nvfp4.dequantize(one) for one in base]
    plain = torch.empty(NUM_EXPERTS, num_rows, num_columns, dtype=torch.bfloat16, device="cuda")
    for index, factor in enumerate(factors):
        plain[index] = values[index % DISTINCT] * factor
    return weight, plain


def route(num_tokens: int, skewed: bool, generator: torch.Generator) -> Routed:
    """Return tokens, route weights and distinct experts of each token."""
    x = torch.randn(num_tokens, WIDTH, generator=generator, device="cuda").bfloat16()
    weights = torch.rand(num_tokens, NUM_SLOTS, generator=generator, device="cuda") * 0.3 + 0.1
    order = torch.randperm(NUM_EXPERTS, generator=generator, device="cuda") + 1.0
    logits = -order.log() if skewed else torch.zeros_like(order)
    noise = -(-torch.rand(num_tokens, NUM_EXPERTS, generator=generator, device="cuda").log()).log()
    return x, weights, (logits + noise).topk(NUM_SLOTS).indices.contiguous()


def sort_rows(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gathered tokens, pairs by expert and where each expert's pairs end."""
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(
        sorted_ids, torch.arange(NUM_EXPERTS, device="cuda"), right=True, out_int32=True
    )  # [E] int32
    return x[order // NUM_SLOTS], order, ends


def grouped_layer(routed: Routed, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Compute the same with bf16 weights and torch's grouped product."""
    x, route_weights, ids = routed
    rows, order, ends = sort_rows(x, ids)
    gate, up = torch.nn.functional.grouped_mm(rows, w13.transpose(-2, -1), offs=ends).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    hidden = (hidden * route_weights.reshape(-1)[order, None]).bfloat16()
    y = torch.nn.functional.grouped_mm(hidden, w2.transpose(-2, -1), offs=ends)
    outputs = torch.empty_like(y)
    outputs[order] = y
    return outputs.view(*ids.shape, WIDTH).sum(1, dtype=torch.float32).bfloat16()


def grouped_products(rows: torch.Tensor, ends: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Compute the two products of grouped_layer alone."""
    hidden = torch.nn.functional.grouped_mm(rows, w13.transpose(-2, -1), offs=ends)
    return torch.nn.functional.grouped_mm(hidden.view(-1, INNER_SIZE)[: rows.shape[0]], w2.transpose(-2, -1), offs=ends)


def bf16_rounded(values: torch.Tensor) -> torch.Tensor:
    """Round to bf16."""
    return values.bfloat16().float()


def nvfp4_rounded(values: torch.Tensor) -> torch.Tensor:
    """Round to NVFP4 with our kernel, which has the CPU's bytes; torch divides by a constant differently on a GPU."""
    return nvfp4.dequantize(quantize_nvfp4(values))


def compare(routed: Routed, weights: list[NvFp4Tensor], w13: torch.Tensor, w2: torch.Tensor) -> dict[str, float]:
    """Compare a sample of tokens with the reference, and return relative L2 errors.

    Raises:
        AssertionError: a recipe is not within its tolerance, or the baseline computes something else.
    """
    x, route_weights, ids = routed
    sample = torch.linspace(0, x.shape[0] - 1, min(SAMPLE, x.shape[0]), device="cuda").long()
    errors = {}
    for name, door in RECIPES.items():
        got = door(x, route_weights, ids, *weights, swiglu_limit=LIMIT)[sample]
        rounded = nvfp4_rounded if name == "w4a4" else bf16_rounded
        want = sum_of_experts(
            *(door.__name__, x[sample], route_weights[sample], ids[sample], (weights[0], weights[1], weights[2])),
            *(None, LIMIT, x.dtype, rounded, rounded),
        )
        assert_within(door.__name__, got, want)
        errors[name] = float((got.double() - want.double()).norm() / want.double().norm())
        if name == "w4a16":
            baseline = grouped_layer(routed, w13, w2)[sample].double()
            error = float((baseline - want.double()).norm() / want.double().norm())
            assert error < 2e-2, f"the baseline computes something else: relative L2 {error}"
    return errors


def measure(
    routing: str,
    num_tokens: int,
    weights: list[NvFp4Tensor],
    w13: torch.Tensor,
    w2: torch.Tensor,
    bandwidth: float,
    tflops: float,
) -> list[dict[str, object]]:
    """Return the rows of a size."""
    generator = torch.Generator(device="cuda").manual_seed(num_tokens)
    count = 8 if num_tokens <= 64 else 2
    routes = [route(num_tokens, routing == "zipf", generator) for _ in range(count)]
    errors = compare(routes[0], weights, w13, w2)
    graphs = [
        (capture([functools.partial(door, *routed, *weights, swiglu_limit=LIMIT) for routed in routes]), count)
        for door in RECIPES.values()
    ]
    graphs.append((capture([functools.partial(grouped_layer, routed, w13, w2) for routed in routes]), count))
    sorted_rows = [sort_rows(routed[0], routed[2]) for routed in routes]
    graphs.append(
        (capture([functools.partial(grouped_products, rows, ends, w13, w2) for rows, _, ends in sorted_rows]), count)
    )
    *kernels, layer, products = medians_us(graphs)
    used = [torch.bincount(routed[2].reshape(-1), minlength=NUM_EXPERTS) for routed in routes]
    hit = statistics.mean(int((one > 0).sum()) for one in used)
    weight_bytes = hit * 3 * WIDTH * INNER_SIZE * 9 / 16
    byte_floor = weight_bytes / bandwidth / 1e3
    flop_floor = 6 * num_tokens * NUM_SLOTS * WIDTH * INNER_SIZE / tflops / 1e6
    rows = []
    for recipe, us in zip(RECIPES, kernels, strict=True):
        line: dict[str, object] = {
            "routing": routing,
            "num_tokens": num_tokens,
            "recipe": recipe,
            "experts_hit": round(hit, 1),
            "most_pairs": statistics.mean(int(one.max()) for one in used),
            "kernel_us": round(us, 1),
            "grouped_bf16_us": round(layer, 1),
            "grouped_bf16_products_us": round(products, 1),
            "byte_floor_us": round(byte_floor, 1),
            "flop_floor_us": round(flop_floor, 1),
            "share_of_floor": round(max(byte_floor, flop_floor) / us, 3),
            "times_grouped_bf16": round(layer / us, 2),
            "times_products_alone": round(products / us, 2),
            "relative_l2": f"{errors[recipe]:.1e}",
            "copy_gbps": round(bandwidth),
            "matmul_tflops": round(tflops),
        }
        print(*line.values(), flush=True)
        rows.append(line)
    return rows


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description="A whole V4-Flash layer of routed experts.")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--pack", type=pathlib.Path)
    given = parser.parse_args()
    open_gpu(None, given.pack)
    bandwidth, tflops = copy_gbps(), matmul_tflops()
    torch.manual_seed(0)
    (w1, gate), (w3, up) = make_weight(INNER_SIZE, WIDTH), make_weight(INNER_SIZE, WIDTH)
    w13 = torch.cat([gate, up], 1)
    del gate, up
    w2, down = make_weight(WIDTH, INNER_SIZE)
    rows: list[dict[str, object]] = []
    for routing in ("even", "zipf"):
        for num_tokens in TOKENS:
            rows += measure(routing, num_tokens, [w1, w3, w2], w13, down, bandwidth, tflops)
            with given.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
