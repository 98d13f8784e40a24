# SPDX-License-Identifier: Apache-2.0
"""How the operations over cache pools are called: rows written, read, copied, compressed, scored and attended to.

Pools have gaps between their pages that hold random bytes, as if they were other layers' pages. Slots are scattered,
some are -1, and every row of a pool was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat, page_bytes, row_bytes
from megamoe.ops import copy_cache as copying
from megamoe.ops import write_cache as writing
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.index_topk import index_scores, index_topk
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import rope_table
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_cache import write_cache
from megamoe.verify.comparisons import scores, selections
from megamoe.verify.op_inputs import Arguments, OpInputs, activations, scaled
from megamoe.verify.values import pool_rows

PAGE = 16
GAP_BYTES = 48
NUM_REQUESTS = 3
ROPE_DIM = 64

Make = Callable[[Mapping[str, int], int, torch.Generator], Arguments]


def filled_pool(
    generator: torch.Generator, num_rows: int, row_format: RowFormat, width: int, rows_per_block: int = PAGE
) -> CachePool:
    """Return a pool of at least so many rows, every one of them written, with random bytes between its pages."""
    num_blocks, wanted = -(-num_rows // rows_per_block), page_bytes(row_format, rows_per_block, width)
    stride = -(-wanted // 16) * 16 + GAP_BYTES
    device = generator.device
    whole = torch.randint(256, (num_blocks, stride), generator=generator, device=device, dtype=torch.uint8)
    pool = CachePool(whole[:, :wanted], rows_per_block, row_format, width)
    slots = torch.arange(pool.num_slots, device=device)
    writing.reference(scaled(generator, pool.num_slots, width), pool, slots)
    return pool


def some_slots(generator: torch.Generator, num_tokens: int, pool: CachePool) -> torch.Tensor:
    """Return distinct slots [T]; one in five is -1, never the first."""
    slots = torch.randperm(pool.num_slots, generator=generator, device=generator.device)[:num_tokens]
    slots[1::5] = -1
    return slots


def stored_bytes(pool: CachePool, *slots: torch.Tensor) -> int:
    """Return the bytes of the rows that are named, each once."""
    named = torch.cat([one.flatten() for one in slots])
    return int(named[named >= 0].unique().numel()) * sum(row_bytes(pool.row_format, pool.width))


# Rows written, read and copied.


def _write_cache(row_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        pool = filled_pool(generator, 2 * num_tokens + 3, row_format, dims["width"])
        rows = activations(generator, num_tokens, dims["width"])
        rows = rows.float() * 1.001 if row_format is RowFormat.FP32 else rows  # compressor rows are sums in fp32
        return {"rows": rows, "pool": pool, "slots": some_slots(generator, num_tokens, pool)}

    return make


def _written_rows(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    return pool_rows(result[0], arguments["slots"].cpu()[index])


def _read_cache(row_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        pool = filled_pool(generator, 2 * num_tokens + 3, row_format, dims["width"])
        slots = torch.stack([some_slots(generator, num_tokens, pool) for _ in range(2)], dim=1)  # a slot may come twice
        return {"pool": pool, "slots": slots}

    return make


def _copy_cache(row_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        source = filled_pool(generator, 2 * num_tokens + 3, row_format, dims["width"])
        target = filled_pool(generator, 2 * num_tokens + 3, row_format, dims["width"], rows_per_block=11)
        source_slots, target_slots = (some_slots(generator, num_tokens, pool) for pool in (source, target))
        source_slots[2::7] = -1
        return {"source": source, "source_slots": source_slots, "target": target, "target_slots": target_slots}

    return make


def _copied_rows(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    source_slots, target_slots = arguments["source_slots"].cpu()[index], arguments["target_slots"].cpu()[index]
    return pool_rows(result[0], torch.where(source_slots >= 0, target_slots, -1))


# Compressed entries.


def _compress_kv(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """Return arguments of one entry a token: some at the start of a sequence, some of a padded batch, without a row."""
    coff, ratio, width, device = dims["coff"], dims["ratio"], dims["D"], generator.device
    pool = filled_pool(generator, 4 * coff * ratio + 40, RowFormat.FP32, 2 * coff * width)
    shape = (num_tokens, coff * ratio)
    row_slots = torch.randint(pool.num_slots, shape, generator=generator, device=device)
    row_slots[1::4, : ratio * coff // 2] = -1
    row_slots[2::5] = -1
    return {
        "pool": pool,
        "row_slots": row_slots,
        "norm_weight": (1.0 + scaled(generator, width, scale=0.2)).bfloat16(),
        "entry_pos": torch.randint(2**20, (num_tokens,), generator=generator, device=device),
        "table": rope_table(ROPE_DIM, 160000.0, device=device),
        "ratio": ratio,
        "overlap": coff == 2,
    }


# The indexer.

INDEX_FORMATS: dict[str, RowFormat] = {
    "fp4": RowFormat.INDEX_FP4,
    "fp8": RowFormat.INDEX_FP8,
    "bf16": RowFormat.BF16,
}


def _query(generator: torch.Generator, num_tokens: int, dims: Mapping[str, int], kind: str) -> Any:
    x = scaled(generator, num_tokens, dims["Hi"], dims["K"]).bfloat16()
    if kind == "bf16":
        return x
    return mxfp4.quantize(x) if kind == "fp4" else fp8.quantize_rows(x)


def _index_scores(kind: str) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        keys = filled_pool(generator, 2 * dims["top_k"] + 21, INDEX_FORMATS[kind], dims["K"])
        slots = torch.randint(-1, keys.num_slots, (dims["top_k"] + 5,), generator=generator, device=generator.device)
        return {
            "q": _query(generator, num_tokens, dims, kind),
            "head_weights": scaled(generator, num_tokens, dims["Hi"]),
            "keys": keys,
            "key_slots": slots,
        }

    return make


def _index_topk(kind: str) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        """Return arguments of three requests, the second without tokens; every seventh key is the one before it."""
        device, top_k = generator.device, dims["top_k"]
        num_entries = 2 * top_k + 21
        num_pages = -(-num_entries // PAGE)
        keys = filled_pool(generator, NUM_REQUESTS * num_pages * PAGE, INDEX_FORMATS[kind], dims["K"])
        blocks = torch.randperm(NUM_REQUESTS * num_pages, generator=generator, device=device)
        block_tables = blocks.view(NUM_REQUESTS, num_pages).to(torch.int32)
        slots = (block_tables.long()[:, :, None] * PAGE + torch.arange(PAGE, device=device)).flatten(1)
        equal = slots[:, : slots.shape[1] // 7 * 7].unflatten(1, (-1, 7))  # [requests, sevenths, 7]
        copying.reference(keys, equal[..., 5].flatten(), keys, equal[..., 6].flatten())
        num_visible = torch.randint(num_entries + 1, (num_tokens,), generator=generator, device=device)
        for token, count in enumerate((num_entries, top_k, top_k + 1, 0)):
            num_visible[token : token + 1] = count
        first = num_tokens // 3
        return {
            "q": _query(generator, num_tokens, dims, kind),
            "head_weights": scaled(generator, num_tokens, dims["Hi"]),
            "keys": keys,
            "block_tables": block_tables,
            "query_starts": torch.tensor([0, first, first, num_tokens], dtype=torch.int32, device=device),
            "num_visible": num_visible.to(torch.int32),
            "top_k": top_k,
        }

    return make


def fewer_starts(arguments: Arguments, index: torch.Tensor) -> Arguments:
    """Return query_starts of a call with some of the tokens: how many of them come before each request."""
    starts = arguments["query_starts"]
    return {"query_starts": torch.searchsorted(index.to(starts.device), starts.long()).to(torch.int32)}


def _keys_seen(arguments: Arguments) -> int:
    """Return the bytes of the keys that the requests' tokens see: those of the token that sees most, once a request."""
    keys, starts = arguments["keys"], arguments["query_starts"].tolist()
    seen = [arguments["num_visible"][a:b] for a, b in zip(starts, starts[1:], strict=False) if b > a]
    return sum(int(one.max()) for one in seen) * sum(row_bytes(keys.row_format, keys.width))


# Attention.


def _sparse_attention(row_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        width = dims["C"]
        window = filled_pool(generator, 2 * dims["W"], row_format, width)
        arguments: Arguments = {
            "q": scaled(generator, num_tokens, dims["H"], width).bfloat16(),
            "window": window,
            "window_slots": _attended(generator, num_tokens, dims["W"], window),
            "entries": None,
            "entry_slots": None,
            "sink": scaled(generator, dims["H"]),
            "scale": width**-0.5,
        }
        arguments["window_slots"][1::4, : dims["W"] // 3] = -1  # the start of a sequence
        arguments["window_slots"][2::6] = -1
        if dims["J"]:
            entries = filled_pool(generator, 2 * dims["J"], row_format, width, rows_per_block=64)
            arguments["entries"] = entries
            arguments["entry_slots"] = slots = _attended(generator, num_tokens, dims["J"], entries)
            slots[1::3, dims["J"] // 2 :] = -1
            slots[2::6] = -1  # tokens without any item, as padding has them
        return arguments

    return make


def _attended(generator: torch.Generator, num_tokens: int, num_columns: int, pool: CachePool) -> torch.Tensor:
    shape = (num_tokens, num_columns)
    return torch.randint(pool.num_slots, shape, generator=generator, device=generator.device)


def _attended_bytes(arguments: Arguments) -> int:
    window = stored_bytes(arguments["window"], arguments["window_slots"])
    if arguments["entries"] is None:
        return window
    return window + stored_bytes(arguments["entries"], arguments["entry_slots"])


_LATENTS = (RowFormat.FP8_ROPE_BF16, RowFormat.BF16)
_WRITE = OpInputs(
    write_cache,
    _write_cache(RowFormat.FP8_ROPE_BF16),
    ("rows", "slots"),
    written=("pool",),
    part=_written_rows,
    partly=("pool",),
    partly_bytes=lambda arguments: stored_bytes(arguments["pool"], arguments["slots"]),
)
_READ = OpInputs(
    read_cache,
    _read_cache(RowFormat.FP8_ROPE_BF16),
    ("slots",),
    partly=("pool",),
    partly_bytes=lambda arguments: stored_bytes(arguments["pool"], arguments["slots"]),
)
_COPY = OpInputs(
    copy_cache,
    _copy_cache(RowFormat.FP8_ROPE_BF16),
    ("source_slots", "target_slots"),
    written=("target",),
    part=_copied_rows,
    partly=("source", "target"),
    partly_bytes=lambda arguments: 2 * stored_bytes(arguments["source"], arguments["source_slots"]),
)
_COMPRESS = OpInputs(
    compress_kv,
    _compress_kv,
    ("row_slots", "entry_pos"),
    partly=("pool",),
    partly_bytes=lambda arguments: stored_bytes(arguments["pool"], arguments["row_slots"]),
)
_SCORES = OpInputs(
    index_scores,
    _index_scores("fp4"),
    ("q", "head_weights"),
    rule=scores,
    partly=("keys",),
    partly_bytes=lambda arguments: stored_bytes(arguments["keys"], arguments["key_slots"]),
)
_TOPK = OpInputs(
    index_topk,
    _index_topk("fp4"),
    ("q", "head_weights", "num_visible"),
    rule=selections,
    cut=fewer_starts,
    partly=("keys",),
    partly_bytes=_keys_seen,
)
_ATTENTION = OpInputs(
    sparse_attention,
    _sparse_attention(RowFormat.FP8_ROPE_BF16),
    ("q", "window_slots", "entry_slots"),
    partly=("window", "entries"),
    partly_bytes=_attended_bytes,
)


def _each(entry: OpInputs, makers: list[Make]) -> tuple[OpInputs, ...]:
    return tuple(dataclasses.replace(entry, make=make) for make in makers)


CACHE_INPUTS: dict[str, tuple[OpInputs, ...]] = {
    "write_cache": _each(_WRITE, [_write_cache(row_format) for row_format in RowFormat]),
    "read_cache": _each(_READ, [_read_cache(row_format) for row_format in RowFormat]),
    "copy_cache": _each(_COPY, [_copy_cache(row_format) for row_format in RowFormat]),
    "compress_kv": (_COMPRESS,),
    "index_scores": _each(_SCORES, [_index_scores(kind) for kind in INDEX_FORMATS]),
    "index_topk": _each(_TOPK, [_index_topk(kind) for kind in INDEX_FORMATS]),
    "sparse_attention": _each(_ATTENTION, [_sparse_attention(row_format) for row_format in _LATENTS]),
}
"""Operation → the ways it is called."""
