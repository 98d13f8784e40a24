# SPDX-License-Identifier: Apache-2.0
"""How the operations over cache pools and block tables are called.

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
from megamoe.kernels.attention.sparse_attention import few_tokens
from megamoe.ops import copy_cache as copying
from megamoe.ops import write_cache as writing
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.index_topk import index_scores, index_topk
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import rope_table
from megamoe.ops.round_index_query import KEY_FORMATS, round_index_query
from megamoe.ops.row_slots import recent_slots, row_slots
from megamoe.ops.save_rows import save_rows
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_block_tables import write_block_tables
from megamoe.ops.write_cache import write_cache
from megamoe.ops.write_index_keys import write_index_keys
from megamoe.ops.write_latent import write_latent
from megamoe.verify.comparisons import attention, rounded_query, rows_written, scores, selections
from megamoe.verify.op_inputs import Arguments, OpInputs, activations, scaled
from megamoe.verify.values import rows_alone, rows_of

PAGE = 16
GAP_BYTES = 48
NUM_REQUESTS = 3
ROPE_DIM = 64
ENTRY_PAGE = 64
SNAPSHOT_ROWS = 5

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
    return (rows_alone(result[0], arguments["slots"].cpu()[index]),)


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
    return (rows_alone(result[0], torch.where(source_slots >= 0, target_slots, -1)),)


# What a step knows of its tokens.

NOBODY = slice(2, None, 6)


def block_tables(generator: torch.Generator, num_requests: int, num_blocks: int) -> torch.Tensor:
    """Return block tables [R, n] int32 over R * n blocks, scattered."""
    order = torch.randperm(num_requests * num_blocks, generator=generator, device=generator.device)
    return order.view(num_requests, num_blocks).to(torch.int32)


def _tokens(generator: torch.Generator, num_tokens: int) -> dict[str, torch.Tensor]:
    """Return positions, requests and first_idx of tokens whose rows are all in rings: any request, at any position."""
    device = generator.device
    positions = torch.randint(2**20, (num_tokens,), generator=generator, device=device)
    positions[1::4] %= 40  # the start of a sequence
    requests = torch.randint(NUM_REQUESTS, (num_tokens,), generator=generator, device=device).to(torch.int32)
    positions[NOBODY], requests[NOBODY] = -1, -1
    first_idx = torch.arange(num_tokens, dtype=torch.int32, device=device)
    return {"positions": positions, "requests": requests, "first_idx": first_idx}


def _chunks(generator: torch.Generator, num_tokens: int) -> dict[str, torch.Tensor]:
    """Return the same of two requests whose rows of this step are in the step area: one starts, one goes on."""
    device = generator.device
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    is_second = tokens >= num_tokens // 3
    first_idx = torch.where(is_second, num_tokens // 3, 0).to(torch.int32)
    start = torch.where(is_second, 500_003, 0)
    return {
        "positions": (tokens - first_idx).long() + start,
        "requests": is_second.to(torch.int32),
        "first_idx": first_idx,
    }


def _last_request(arguments: Arguments) -> int:
    """Return how many tokens the last request of a step has, whose rows are in the step area."""
    if arguments["step"] is None:
        return 1
    first_idx = arguments["first_idx"]
    return int(len(first_idx) - first_idx[-1])


def _last_of_one_order(arguments: Arguments) -> int:
    """Return the tokens of the last request, or all tokens where those alone would be added in another order."""
    num_tokens, heads, _ = arguments["q"].shape
    last = _last_request(arguments)
    return num_tokens if arguments["step"] is not None and last <= few_tokens(heads) < num_tokens else last


def _fewer_rows_of_step(arguments: Arguments, index: torch.Tensor) -> Arguments:
    """Return first_idx and the step area of the last tokens alone, of whole requests."""
    step = arguments["step"]
    if step is None or len(index) == 0:
        return {}
    few = filled_pool(torch.Generator(step.device), len(index), step.row_format, step.width)
    copying.reference(step, index.to(step.device), few, torch.arange(len(index), device=step.device))
    first_idx = arguments["first_idx"]
    return {"step": few, "first_idx": first_idx[index.to(first_idx.device)] - int(index[0])}


# Compressed entries.


def _compressor(entry_format: RowFormat, *, rotate: bool) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        """Return arguments of one token a request, as decoding has them; most of them complete a block."""
        device, ratio, width, coff = generator.device, dims["ratio"], dims["D"], dims.get("coff", 2)
        num_rows = coff * ratio
        state = filled_pool(generator, num_rows * max(num_tokens, 1), RowFormat.FP32, 2 * coff * width, num_rows)
        tables = block_tables(generator, max(num_tokens, 1), 1)
        blocks = torch.randint(1000, (num_tokens,), generator=generator, device=device)
        blocks[1::4] = 0  # the first block of a sequence
        positions, requests = blocks * ratio + ratio - 1, torch.arange(num_tokens, device=device)
        positions[3::5] -= 1
        state_slots = tables[:num_tokens, 0] * num_rows + positions % num_rows
        entries = filled_pool(generator, 2 * num_tokens + 3, entry_format, width)
        entry_slots = torch.randperm(entries.num_slots, generator=generator, device=device)[:num_tokens]
        entry_slots[3::5] = -1
        for one in (positions, requests, state_slots, entry_slots):
            one[NOBODY] = -1
        name = "key" if rotate else "entry"
        return {
            "raw": scaled(generator, num_tokens, 2 * coff * width, scale=2.0),
            "ape": scaled(generator, ratio, coff * width),
            "norm_weight": (1.0 + scaled(generator, width, scale=0.2)).bfloat16(),
            "state": state,
            "step": None,
            "keys" if rotate else "entries": entries,
            "positions": positions,
            "requests": requests.to(torch.int32),
            "first_idx": torch.arange(num_tokens, dtype=torch.int32, device=device),
            "state_tables": tables,
            "state_slots": state_slots.long(),
            f"{name}_slots": entry_slots,
            "table": rope_table(ROPE_DIM, 160000.0, device=device),
            "ratio": ratio,
            "rotate" if rotate else "overlap": True if rotate else coff == 2,
            "out_dtype": torch.float32 if entry_format is RowFormat.FP32 else torch.bfloat16,
        }

    return make


def _compressed_rows(entries: str, slots: str) -> Callable[[Any, Arguments, torch.Tensor], Any]:
    def part(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
        return tuple(
            rows_alone(pool, arguments[name].cpu()[index])
            for pool, name in zip(result, ("state_slots", slots), strict=True)
        )

    return part


def _compressed_bytes(entries: str, slots: str) -> Callable[[Arguments], int]:
    def count(arguments: Arguments) -> int:
        written = arguments[slots] >= 0
        coff = arguments["state"].width // (2 * arguments[entries].width)
        rows = int(written.sum()) * int(arguments["ratio"]) * int(coff)
        raw = rows * sum(row_bytes(RowFormat.FP32, arguments["state"].width))
        stored = stored_bytes(arguments["state"], arguments["state_slots"])
        return raw + stored + stored_bytes(arguments[entries], arguments[slots])

    return count


# Latents and index queries.


def _write_latent(row_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        pool = filled_pool(generator, 2 * num_tokens + 3, row_format, dims["C"])
        dtype = torch.float32 if row_format is RowFormat.FP32 else torch.bfloat16
        has_query = "Q" in dims  # the rows of a DSpark draft come without a query
        return {
            "query_latent": scaled(generator, num_tokens, dims["Q"]).to(dtype) if has_query else None,
            "kv": scaled(generator, num_tokens, dims["C"]).to(dtype),
            "q_norm": (1.0 + scaled(generator, dims["Q"], scale=0.2)).bfloat16() if has_query else None,
            "kv_norm": (1.0 + scaled(generator, dims["C"], scale=0.2)).bfloat16(),
            "pool": pool,
            "slots": some_slots(generator, num_tokens, pool),
            "pos": _tokens(generator, num_tokens)["positions"],
            "table": rope_table(dims["R"], 10000.0, device=generator.device),
        }

    return make


def _latent_part(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    *latent, pool = result if isinstance(result, tuple) else (result,)
    rows = [rows_of(one, index) for one in latent if one is not None]
    return (*rows, rows_alone(pool, arguments["slots"].cpu()[index]))


def _round_index_query(key_format: RowFormat) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        dtype = torch.float32 if key_format is RowFormat.FP32 else torch.bfloat16
        return {
            "q": scaled(generator, num_tokens, dims["Hi"], dims["K"]).to(dtype),
            "head_weights": scaled(generator, num_tokens, dims["Hi"]),
            "pos": _tokens(generator, num_tokens)["positions"],
            "table": rope_table(dims["R"], 160000.0, device=generator.device),
            "key_format": key_format,
            "hadamard": key_format is RowFormat.INDEX_FP4,
            "head_scale": (dims["K"] * dims["Hi"]) ** -0.5,
        }

    return make


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
        """Return arguments of three requests, of which every seventh key is the one before it."""
        device, top_k = generator.device, dims["top_k"]
        num_entries = 2 * top_k + 21
        num_pages = -(-num_entries // PAGE)
        keys = filled_pool(generator, NUM_REQUESTS * num_pages * PAGE, INDEX_FORMATS[kind], dims["K"])
        tables = block_tables(generator, NUM_REQUESTS, num_pages)
        slots = (tables.long()[:, :, None] * PAGE + torch.arange(PAGE, device=device)).flatten(1)
        equal = slots[:, : slots.shape[1] // 7 * 7].unflatten(1, (-1, 7))  # [requests, sevenths, 7]
        copying.reference(keys, equal[..., 5].flatten(), keys, equal[..., 6].flatten())
        num_visible = torch.randint(num_entries + 1, (num_tokens,), generator=generator, device=device)
        for token, count in enumerate((num_entries, top_k, num_entries, top_k + 1, 0)):  # the third is nobody
            num_visible[token : token + 1] = count
        return {
            "q": _query(generator, num_tokens, dims, kind),
            "head_weights": scaled(generator, num_tokens, dims["Hi"]),
            "keys": keys,
            "block_tables": tables,
            "requests": _tokens(generator, num_tokens)["requests"],
            "num_visible": num_visible.to(torch.int32),
            "top_k": top_k,
        }

    return make


def _keys_seen(arguments: Arguments) -> int:
    """Return the bytes of the keys that the requests' tokens see: those of the token that sees most, once a request."""
    keys, requests, num_visible = arguments["keys"], arguments["requests"], arguments["num_visible"]
    seen = [int(num_visible[requests == one].max()) for one in requests.unique().tolist() if one >= 0]
    return sum(seen) * sum(row_bytes(keys.row_format, keys.width))


# Attention.


def _sparse_attention(row_format: RowFormat, operand_dtype: torch.dtype, *, chosen: bool, chunks: bool) -> Make:
    """Return the maker of attention.

    Args:
        row_format: of all rows.
        operand_dtype: what is multiplied.
        chosen: entries are chosen one by one; else all visible ones are attended to.
        chunks: rows of this step are in the step area; else in the rings.
    """

    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        width, device, num_entries = dims["C"], generator.device, dims["J"]
        num_blocks = -(-dims["W"] // PAGE) + 1
        rows = NUM_REQUESTS * num_blocks * PAGE
        arguments: Arguments = {
            "q": scaled(generator, num_tokens, dims["H"], width).bfloat16(),
            "window": filled_pool(generator, rows, row_format, width),
            "entries": None,
            "sink": scaled(generator, dims["H"]),
            **(_chunks if chunks else _tokens)(generator, num_tokens),
            "window_size": dims["W"],
            "window_tables": block_tables(generator, NUM_REQUESTS, num_blocks),
            "step": filled_pool(generator, max(num_tokens, 1), row_format, width) if chunks else None,
            "entry_tables": None,
            "entry_idx": None,
            "num_visible": None,
            "table": rope_table(ROPE_DIM, 160000.0, device=device),
            "scale": width**-0.5,
            "operand_dtype": operand_dtype,
        }
        if num_entries:
            num_pages = -(-2 * num_entries // ENTRY_PAGE)
            all_rows = NUM_REQUESTS * num_pages * ENTRY_PAGE
            arguments["entries"] = filled_pool(generator, all_rows, row_format, width, rows_per_block=ENTRY_PAGE)
            arguments["entry_tables"] = block_tables(generator, NUM_REQUESTS, num_pages)
            visible = torch.randint(num_entries + 1, (num_tokens,), generator=generator, device=device)
            arguments["num_visible"] = visible.to(torch.int32)
            if chosen:
                arguments["num_visible"] = torch.full_like(arguments["num_visible"], 2 * num_entries)
                shape = (num_tokens, num_entries)
                idx = torch.randint(2 * num_entries, shape, generator=generator, device=device).to(torch.int32)
                idx[1::3, num_entries // 2 :] = -1
                arguments["entry_idx"] = idx
        return arguments

    return make


def _attended_bytes(arguments: Arguments) -> int:
    """Return the bytes of the rows that any token attends to, each once."""
    window, step, entries = arguments["window"], arguments["step"], arguments["entries"]
    requests, firsts = arguments["requests"], arguments["first_idx"] if step is not None else None
    in_rings, in_step = recent_slots(
        arguments["positions"],
        arguments["window_size"],
        requests,
        arguments["window_tables"],
        window.rows_per_block,
        firsts,
    )
    count = stored_bytes(window, in_rings)
    if step is not None and in_step is not None:
        count += stored_bytes(step, in_step)
    if entries is None or not len(requests):
        return count
    idx, num_visible = arguments["entry_idx"], arguments["num_visible"]
    if idx is None:
        columns = torch.arange(int(num_visible.max()), device=num_visible.device)
        idx = torch.where(columns < num_visible[:, None], columns, -1)
    return count + stored_bytes(
        entries, row_slots(idx.long(), requests, arguments["entry_tables"], entries.rows_per_block)
    )


# What a step does to its tables and snapshots.


def _save_rows(*, from_step: bool) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        """Return one save a token: requests of three rings, lengths of any kind, rows of the step from token 4 on."""
        device = generator.device
        row_format = RowFormat.FP8_ROPE_BF16 if dims["width"] == 512 else RowFormat.FP32
        ring = filled_pool(generator, NUM_REQUESTS * 3 * PAGE, row_format, dims["width"])
        target = filled_pool(generator, SNAPSHOT_ROWS * max(num_tokens, 1), row_format, dims["width"], SNAPSHOT_ROWS)
        requests = torch.randint(NUM_REQUESTS, (num_tokens,), generator=generator, device=device)
        requests[NOBODY] = -1
        lengths = torch.randint(SNAPSHOT_ROWS, 30, (num_tokens,), generator=generator, device=device)
        starts = lengths - 2 if from_step else lengths
        firsts = torch.full_like(lengths, 4)
        blocks = torch.randperm(max(num_tokens, 1), generator=generator, device=device)[:num_tokens]
        return {
            "ring": ring,
            "step": filled_pool(generator, 2 * PAGE, row_format, dims["width"]) if from_step else None,
            "target": target,
            "saves": torch.stack((requests, lengths, starts, firsts, blocks), dim=1).to(torch.int32),
            "block_tables": block_tables(generator, NUM_REQUESTS, 3),
        }

    return make


def _saved_blocks(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    saves = arguments["saves"].cpu()[index]
    return result[0].data_rows[saves[saves[:, 0] >= 0][:, 4].long()]


def _saved_bytes(arguments: Arguments) -> int:
    target = arguments["target"]
    return 2 * int((arguments["saves"][:, 0] >= 0).sum()) * int(target.page_bytes)


def _write_block_tables(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    device = generator.device
    tables = block_tables(generator, 4, num_tokens + 3)
    places = torch.randperm(tables.numel(), generator=generator, device=device)[:num_tokens]
    blocks = torch.randint(10_000, 20_000, (num_tokens,), generator=generator, device=device)
    requests = places // tables.shape[1]
    requests[NOBODY] = -1
    changes = torch.stack((requests, places % tables.shape[1], blocks), dim=1)
    return {"tables": tables, "changes": changes.to(torch.int32)}


def _changed_places(result: Any, arguments: Arguments, index: torch.Tensor) -> Any:
    changes = arguments["changes"].cpu()[index].long()
    changes = changes[changes[:, 0] >= 0]
    return result[0].cpu()[changes[:, 0], changes[:, 1]]


def _plan_slots(*, in_rings: bool) -> Make:
    def make(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
        """Return the tokens of two requests and padding, and layers of two kinds."""
        device, given = generator.device, _chunks(generator, num_tokens)
        given["positions"] = given["positions"] % 5000
        is_padding = torch.arange(num_tokens, device=device) >= num_tokens - num_tokens // 8
        ids = torch.randint(1000, (num_tokens,), generator=generator, device=device)
        for one in (ids, given["positions"], given["requests"]):
            one[is_padding] = -1
        given["first_idx"][is_padding] = torch.arange(num_tokens, device=device, dtype=torch.int32)[is_padding]
        kinds = tuple(
            EntryTables(
                ratio,
                RowTables(block_tables(generator, NUM_REQUESTS, 1), 2 * ratio + num_tokens),
                RowTables(block_tables(generator, NUM_REQUESTS, -(-6000 // (ratio * PAGE))), PAGE),
            )
            for ratio in (4, 128)
        )
        return {
            "tokens": torch.stack((ids, given["positions"], given["requests"], given["first_idx"])).to(torch.int32),
            "window": RowTables(block_tables(generator, NUM_REQUESTS, 2), 128 + num_tokens),
            "kinds": kinds,
            "out": StepSlots.empty(num_tokens, len(kinds), device),
            "in_rings": in_rings,
        }

    return make


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
    _compressor(RowFormat.FP32, rotate=False),
    ("raw", "positions", "requests", "first_idx", "state_slots", "entry_slots"),
    rule=rows_written("state", "entries"),
    written=("state", "entries"),
    part=_compressed_rows("entries", "entry_slots"),
    partly=("state", "entries"),
    partly_bytes=_compressed_bytes("entries", "entry_slots"),
)
_KEYS = OpInputs(
    write_index_keys,
    _compressor(RowFormat.FP32, rotate=True),
    ("raw", "positions", "requests", "first_idx", "state_slots", "key_slots"),
    rule=rows_written("state", "keys"),
    written=("state", "keys"),
    part=_compressed_rows("keys", "key_slots"),
    partly=("state", "keys"),
    partly_bytes=_compressed_bytes("keys", "key_slots"),
)
_LATENT = OpInputs(
    write_latent,
    _write_latent(RowFormat.FP8_ROPE_BF16),
    ("query_latent", "kv", "slots", "pos"),
    rule=rows_written("pool"),
    written=("pool",),
    part=_latent_part,
    partly=("pool",),
    partly_bytes=lambda arguments: stored_bytes(arguments["pool"], arguments["slots"]),
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
    ("q", "head_weights", "requests", "num_visible"),
    rule=selections,
    partly=("keys",),
    partly_bytes=_keys_seen,
)
_ATTENTION = OpInputs(
    sparse_attention,
    _sparse_attention(RowFormat.FP8_ROPE_BF16, torch.float16, chosen=True, chunks=False),
    ("q", "positions", "requests", "first_idx", "entry_idx", "num_visible"),
    order_until=lambda dims: few_tokens(dims["H"]),
    rule=attention,
    cut=_fewer_rows_of_step,
    together=_last_of_one_order,
    partly=("window", "entries", "step"),
    partly_bytes=_attended_bytes,
)
_SAVE = OpInputs(
    save_rows,
    _save_rows(from_step=False),
    ("saves",),
    written=("target",),
    part=_saved_blocks,
    partly=("ring", "step", "target"),
    partly_bytes=_saved_bytes,
)
_PLAN = OpInputs(
    plan_slots,
    _plan_slots(in_rings=True),
    (),
    written=("out",),
    part=lambda result, arguments, index: result,
    together=lambda arguments: int(arguments["tokens"].shape[1]),  # slots follow from the places of all tokens
)


def _each(entry: OpInputs, makers: list[Make], *, on_kernels: int | None = None) -> tuple[OpInputs, ...]:
    """Return an entry for each maker; kernels take the first `on_kernels` of them, or all."""
    first = len(makers) if on_kernels is None else on_kernels
    return tuple(dataclasses.replace(entry, make=make, on_kernels=way < first) for way, make in enumerate(makers))


COPIED = (RowFormat.FP8_ROPE_BF16, RowFormat.FP32)
"""Row formats that models copy."""


CACHE_INPUTS: dict[str, tuple[OpInputs, ...]] = {
    "write_cache": _each(_WRITE, [_write_cache(row_format) for row_format in RowFormat]),
    "read_cache": _each(_READ, [_read_cache(row_format) for row_format in RowFormat]),
    "copy_cache": tuple(
        dataclasses.replace(_COPY, make=_copy_cache(row_format), timed=row_format in COPIED) for row_format in RowFormat
    ),
    "save_rows": _each(_SAVE, [_save_rows(from_step=one) for one in (False, True)]),
    "compress_kv": _each(
        _COMPRESS,
        [_compressor(one, rotate=False) for one in (RowFormat.FP8_ROPE_BF16, RowFormat.FP32)],
        on_kernels=1,
    ),
    "write_index_keys": _each(
        _KEYS,
        [_compressor(one, rotate=True) for one in (RowFormat.INDEX_FP4, RowFormat.FP32, RowFormat.INDEX_FP8)],
        on_kernels=1,
    ),
    "write_latent": _each(
        _LATENT, [_write_latent(one) for one in (RowFormat.FP8_ROPE_BF16, RowFormat.FP32)], on_kernels=1
    ),
    "round_index_query": tuple(
        OpInputs(
            round_index_query,
            _round_index_query(row_format),
            ("q", "head_weights", "pos"),
            rule=rounded_query,
            on_kernels=row_format is RowFormat.INDEX_FP4,
        )
        for row_format in KEY_FORMATS
    ),
    "index_scores": _each(_SCORES, [_index_scores(kind) for kind in INDEX_FORMATS]),
    "index_topk": _each(_TOPK, [_index_topk(kind) for kind in INDEX_FORMATS], on_kernels=1),
    "sparse_attention": _each(
        _ATTENTION,
        [
            _sparse_attention(RowFormat.FP8_ROPE_BF16, torch.float16, chosen=True, chunks=False),
            _sparse_attention(RowFormat.FP8_ROPE_BF16, torch.float16, chosen=False, chunks=True),
            _sparse_attention(RowFormat.FP32, torch.float32, chosen=True, chunks=True),
        ],
        on_kernels=2,
    ),
    "plan_slots": _each(_PLAN, [_plan_slots(in_rings=one) for one in (True, False)]),
    "write_block_tables": (
        OpInputs(
            write_block_tables,
            _write_block_tables,
            ("changes",),
            written=("tables",),
            part=_changed_places,
            partly=("tables",),
            partly_bytes=lambda arguments: 4 * int(arguments["changes"].shape[0]),
        ),
    ),
}
"""Operation → the ways it is called."""
