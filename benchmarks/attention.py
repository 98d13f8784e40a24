# SPDX-License-Identifier: Apache-2.0
"""Time sparse_attention and index_topk at the sizes of Flash and Pro: python benchmarks/attention.py DIR --pack PACK.

A figure is the median of seven replays of a captured graph. Calls rotate over copies of everything that a step would
read from memory: 1M latent rows in pages of 64 (612 MB), and up to eight pools of index keys. "Everything" is counted:
from queries after their projection to the output rotated back, ranges and their sum included.
Writes attention.csv and index_topk.csv into DIR.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

import megamoe
from megamoe.formats import mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat, page_bytes
from megamoe.kernels.store import store_for, target_of
from megamoe.ops.index_topk import index_topk
from megamoe.ops.rope import rope_table
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.verify.cache_inputs import filled_pool

DEVICE, WIDTH, WINDOW, PAGE, PAGES = "cuda", 512, 128, 64, 16384
KEY_WIDTH, KEY_BYTES, HEADS = 128, 68, 64
ATTENTION = [(64, 512, tokens) for tokens in (1, 8, 16, 17, 32, 64, 128, 4096)]
ATTENTION += [(128, 1024, tokens) for tokens in (1, 8, 9, 32, 64, 128, 4096)]
ATTENTION += [(64, 0, 1), (64, 0, 64), (4, 64, 1), (4, 64, 64)]
VISIBLE = [(64, 512, 1), (64, 512, 64), (64, 8192, 1), (64, 8192, 8), (128, 8192, 1)]
INDEX = [(1, entries, 512) for entries in (1024, 4096, 16384, 65536, 262144)] + [(1, 262144, 1024)]
INDEX += [(tokens, 16384, 512) for tokens in (8, 32, 64, 128)] + [(8, 262144, 1024), (32, 262144, 1024)]


def replay_us(calls: Iterable[Callable[[], Any]], repeats: int) -> float:
    """Return the median time of one call, captured `repeats` times over."""
    calls = list(calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000.0 / repeats / len(calls))
    return statistics.median(times)


def latents(generator: torch.Generator, num_pages: int, rows_per_page: int) -> CachePool:
    """Return a pool whose first pages are written and whose others are copies of them."""
    wanted = page_bytes(RowFormat.FP8_ROPE_BF16, rows_per_page, WIDTH)
    whole = torch.zeros(num_pages, -(-wanted // 576) * 576, dtype=torch.uint8, device=DEVICE)
    one = filled_pool(generator, rows_per_page * min(num_pages, 16), RowFormat.FP8_ROPE_BF16, WIDTH, rows_per_page)
    for first in range(0, num_pages, one.num_blocks):
        count = min(one.num_blocks, num_pages - first)
        whole[first : first + count, :wanted] = one.storage[:count]
    return CachePool(whole[:, :wanted], rows_per_page, RowFormat.FP8_ROPE_BF16, WIDTH)


def attention_rows() -> list[list[object]]:
    """Time attention over a window and entries that are listed, or over all that are visible."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    entries, window = latents(generator, PAGES, PAGE), latents(generator, 512, WINDOW)
    table = rope_table(64, 160000.0, device=DEVICE)

    def arguments(heads: int, count: int, tokens: int, listed: bool) -> dict[str, Any]:
        requests = tokens if tokens <= 128 else 4
        pages = PAGES // requests
        order = (
            torch.randperm(PAGES, device=DEVICE, generator=generator)[: requests * pages].view(requests, pages).int()
        )
        tables = order if listed else order[:, : -(-count // PAGE)].contiguous()
        shape, room = (tokens, count), min(pages * PAGE, 16384)
        idx = torch.randint(room, shape, device=DEVICE, generator=generator).int() if listed and count else None
        positions = torch.full((tokens,), 100_000, device=DEVICE)
        if tokens > 128:
            positions = positions + torch.arange(tokens, device=DEVICE)
        visible = torch.full((tokens,), 100_000 if listed else count, dtype=torch.int32, device=DEVICE)
        rings = torch.randperm(512, device=DEVICE, generator=generator)[:requests].view(requests, 1).int()
        return {
            "q": torch.randn(tokens, heads, WIDTH, device=DEVICE, generator=generator, dtype=torch.bfloat16),
            "window": window,
            "entries": entries if count else None,
            "sink": torch.randn(heads, device=DEVICE, generator=generator),
            "positions": positions,
            "requests": (torch.arange(tokens, device=DEVICE) * requests // tokens).int(),
            "first_idx": torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
            "window_size": WINDOW,
            "window_tables": rings,
            "step": None,
            "entry_tables": tables if count else None,
            "entry_idx": idx,
            "num_visible": visible if count else None,
            "table": table,
            "scale": WIDTH**-0.5,
            "operand_dtype": torch.float16,
        }

    rows: list[list[object]] = []
    for plan, listed in ((ATTENTION, True), (VISIBLE, False)):
        for heads, count, tokens in plan:
            sets = [arguments(heads, count, tokens, listed) for _ in range(4 if tokens <= 128 else 1)]
            calls = [lambda given=given: sparse_attention(**given) for given in sets]
            us = replay_us(calls, 16 if tokens <= 128 else 1)
            rows.append([heads, "listed" if listed else "all visible", WINDOW, count, tokens, round(us, 1)])
            print(*rows[-1], flush=True)
    return rows


def index_rows() -> list[list[object]]:
    """Time index scores and selection over FP4 keys, every token of a request of its own."""
    rows: list[list[object]] = []
    for tokens, count, top_k in INDEX:
        pages = -(-count // PAGE)
        copies = max(1, min(8, int(160e6 // (tokens * count * KEY_BYTES)) + 1))
        pool = CachePool.allocate(copies * tokens * pages, PAGE, RowFormat.INDEX_FP4, KEY_WIDTH, device=DEVICE)
        pool.storage.random_(0, 256)
        pool.scale_rows.copy_(torch.randint(122, 128, tuple(pool.scale_rows.shape), dtype=torch.uint8, device=DEVICE))
        tables = torch.randperm(copies * tokens * pages, device=DEVICE).view(copies, tokens, pages).int()
        shared = {
            "q": mxfp4.quantize(torch.randn(tokens, HEADS, KEY_WIDTH, device=DEVICE)),
            "head_weights": torch.randn(tokens, HEADS, device=DEVICE).abs(),
            "keys": pool,
            "requests": torch.arange(tokens, device=DEVICE).int(),
            "num_visible": torch.full((tokens,), count, dtype=torch.int32, device=DEVICE),
            "top_k": top_k,
        }
        calls = [lambda one=one, shared=shared: index_topk(**shared, block_tables=one) for one in tables]
        us = replay_us(calls, 16 if tokens * count < 4e6 else 2)
        rows.append([tokens, count, top_k, count, HEADS, round(us, 2)])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Open the pack, time, write."""
    parser = argparse.ArgumentParser(description="Time attention and index selection.")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--pack", type=pathlib.Path)
    given = parser.parse_args()
    if given.pack is not None:
        store_for(target_of(torch.device(DEVICE))).use_pack(given.pack, version=megamoe.__version__)
    tables = {
        "attention.csv": (["heads", "entries_are", "window_rows", "entries", "tokens", "us"], attention_rows()),
        "index_topk.csv": (["tokens", "visible", "top_k", "room", "heads", "us"], index_rows()),
    }
    for name, (keys, rows) in tables.items():
        with (given.directory / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(keys)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
