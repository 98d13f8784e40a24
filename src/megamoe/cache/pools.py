# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps between steps, what that costs, and its allocation.

A layer keeps up to five pools, in two families that grow differently:

    rings, one per sequence      window        recent latent rows               window + ring_tokens rows
                                 state         raw rows of the compressor       see compressor_state.py, fp32
                                 index_state   raw rows of the index compressor the same
    pages, one row per `ratio`   entries       compressed latent rows           tokens_per_page / ratio rows a page
    tokens of a sequence         index_keys    index keys                       the same

A step of at most `ring_tokens` tokens of each sequence writes its rows into the rings. The rows of a longer one lie in
the step area, which all layers share: a layer writes it, reads it, and copies the last rows of every sequence to its
rings, and to snapshots at page boundaries, before the next layer uses it. So rings are as long as decoding needs.

Rings cost bytes per sequence whatever its length, pages cost bytes per token. The two are never added up into one
"bytes per token": that number misleads at both ends.

Everything here is a number passed in; which layer has what is the model's business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from megamoe.cache.compressor_state import num_rows_pooled, state_capacity
from megamoe.formats.cache_rows import CachePool, RowFormat, page_bytes

BLOCK_ALIGNMENT = 16  # rings and pages start at multiples of this many bytes


@dataclasses.dataclass(frozen=True)
class LayerCacheSpec:
    """What one layer keeps.

    Attributes:
        width: values of a latent row (window and entries).
        row_format: how latent rows are stored.
        window: positions a token sees in the window, itself included.
        ratio: tokens per compressed entry, or None for a layer without entries.
        overlap: entries pool the block before their own too.
        index_width: values of an index key, or None for a layer without an indexer.
        index_format: how index keys are stored; given exactly when index_width is.
    """

    width: int
    row_format: RowFormat
    window: int
    ratio: int | None = None
    overlap: bool = False
    index_width: int | None = None
    index_format: RowFormat | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that describe no layer."""
        if self.width < 1 or self.window < 1:
            raise ValueError(f"LayerCacheSpec: width and window must be >= 1; got {self.width} and {self.window}.")
        if self.ratio is not None and self.ratio < 1:
            raise ValueError(f"LayerCacheSpec: ratio must be >= 1, or None; got {self.ratio}.")
        if (self.index_width is None) != (self.index_format is None):
            raise ValueError("LayerCacheSpec: index_width and index_format go together; give both or neither.")
        if self.ratio is None and (self.overlap or self.index_width is not None):
            raise ValueError("LayerCacheSpec: overlap and index keys need entries; give a ratio.")

    def __str__(self) -> str:
        """Return a short name of the kind of layer."""
        if self.ratio is None:
            return f"window {self.window}"
        kind = f"window {self.window} + 1 entry per {self.ratio} tokens"
        return f"{kind}{' overlapping' if self.overlap else ''}{' + index keys' if self.index_width else ''}"

    def state_width(self, width: int) -> int:
        """Return the fp32 numbers of one raw row: values then scores, twice that when blocks overlap."""
        return 2 * (2 if self.overlap else 1) * width


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """How much is kept, in numbers a scheduler knows.

    Attributes:
        num_sequences: sequences with a ring at one time.
        num_pages: pages shared by all sequences.
        tokens_per_page: positions a page covers; a multiple of every layer's ratio.
        ring_tokens: most tokens of one sequence that a step writes straight into its rings: 1 and the drafts checked
            with it, where longer steps have the step area.
        step_tokens: tokens of a step for which the step area has room; 0 where every step goes into the rings.
    """

    num_sequences: int
    num_pages: int
    tokens_per_page: int
    ring_tokens: int
    step_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse counts that describe no cache."""
        positive = (self.num_sequences, self.tokens_per_page, self.ring_tokens)
        if min(positive) < 1 or self.num_pages < 0 or self.step_tokens < 0:
            raise ValueError(
                "CacheSize: num_sequences, tokens_per_page and ring_tokens must be >= 1, num_pages and step_tokens >= "
                f"0; got {self.num_sequences}, {self.tokens_per_page}, {self.ring_tokens}, {self.num_pages} and "
                f"{self.step_tokens}."
            )

    @classmethod
    def for_one_sequence(cls, max_tokens: int, *, tokens_per_page: int, ring_tokens: int) -> CacheSize:
        """Return the size that holds one sequence of up to `max_tokens` tokens.

        Raises:
            ValueError: a count is negative or zero where it must not be.
        """
        if max_tokens < 0 or tokens_per_page < 1:
            raise ValueError(
                f"CacheSize: max_tokens must be >= 0 and tokens_per_page >= 1; got {max_tokens} and {tokens_per_page}."
            )
        return cls(1, -(-max_tokens // tokens_per_page), tokens_per_page, ring_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens that all pages together hold."""
        return self.num_pages * self.tokens_per_page


def fit_tokens_per_page(ratios: Iterable[int], at_least: int = 256) -> int:
    """Return the smallest page of at least `at_least` tokens that is a multiple of every ratio.

    Raises:
        ValueError: a ratio or at_least is not positive.
    """
    unit = math.lcm(*ratios)
    if unit < 1 or at_least < 1:
        raise ValueError("fit_tokens_per_page: ratios and at_least must be >= 1.")
    return -(-at_least // unit) * unit


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """The numbers one pool is allocated with.

    Attributes:
        num_blocks: rings (one per sequence) or pages.
        rows_per_block: rows of a ring or page.
        row_format: how a row is stored.
        width: values of a row.
    """

    num_blocks: int
    rows_per_block: int
    row_format: RowFormat
    width: int

    @property
    def block_bytes(self) -> int:
        """Bytes from one ring or page to the next."""
        return -(-page_bytes(self.row_format, self.rows_per_block, self.width) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_blocks * self.block_bytes

    def allocate(self, device: torch.device | str) -> CachePool:
        """Return the pool, filled with zero bytes."""
        return CachePool.allocate(
            self.num_blocks, self.rows_per_block, self.row_format, self.width, device, self.block_bytes
        )


@dataclasses.dataclass(frozen=True)
class RowPools:
    """Pools of the rows that rings hold, elsewhere: in the step area, or in snapshots.

    Attributes:
        window: latent rows.
        state: raw compressor rows.
        index_state: raw rows of the index compressor.
    """

    window: CachePool | None = None
    state: CachePool | None = None
    index_state: CachePool | None = None


@dataclasses.dataclass(frozen=True)
class LayerPools:
    """The pools one layer reads and writes; which exist follows from its LayerCacheSpec.

    Attributes:
        window: latent rows of recent positions; a ring per sequence.
        state: raw compressor rows; a ring per sequence.
        entries: compressed latent rows; pages.
        index_state: raw rows of the index compressor; a ring per sequence.
        index_keys: index keys; pages.
        step: rows of the running step, one per token; one block, shared with other layers.
        saved: rows at page boundaries; a block per snapshot.
    """

    window: CachePool
    state: CachePool | None = None
    entries: CachePool | None = None
    index_state: CachePool | None = None
    index_keys: CachePool | None = None
    step: RowPools = RowPools()
    saved: RowPools = RowPools()


RINGS = ("window", "state", "index_state")
PAGES = ("entries", "index_keys")


def pool_shapes(spec: LayerCacheSpec, size: CacheSize) -> dict[str, PoolShape]:
    """Return the pools of one layer by their name in LayerPools.

    Raises:
        ValueError: a page is not a whole number of entries.
    """
    rings = size.num_sequences
    shapes = {"window": PoolShape(rings, spec.window + size.ring_tokens, spec.row_format, spec.width)}
    if spec.ratio is None:
        return shapes
    if size.tokens_per_page % spec.ratio:
        raise ValueError(
            f"cache pools: tokens_per_page must be a multiple of every layer's ratio; got {size.tokens_per_page} and "
            f"ratio {spec.ratio}. fit_tokens_per_page gives one that fits."
        )
    rows = size.tokens_per_page // spec.ratio
    capacity = state_capacity(spec.ratio, spec.overlap, size.ring_tokens)
    shapes["state"] = PoolShape(rings, capacity, RowFormat.FP32, spec.state_width(spec.width))
    shapes["entries"] = PoolShape(size.num_pages, rows, spec.row_format, spec.width)
    if spec.index_width is not None and spec.index_format is not None:
        shapes["index_state"] = PoolShape(rings, capacity, RowFormat.FP32, spec.state_width(spec.index_width))
        shapes["index_keys"] = PoolShape(size.num_pages, rows, spec.index_format, spec.index_width)
    return shapes


def resume_rows(spec: LayerCacheSpec) -> dict[str, int]:
    """Return how many of the last rows of each ring continue a sequence at a multiple of every ratio.

    The next token sees window - 1 rows before it. Where blocks overlap, the next block pools the raw rows of the block
    before it too; where they do not, it begins here and needs none. Entries and index keys lie in pages, which are
    shared and not copied.
    """
    rows = {"window": spec.window - 1}
    if spec.ratio is not None and spec.overlap:
        rows["state"] = spec.ratio
        if spec.index_width is not None:
            rows["index_state"] = spec.ratio
    return {name: num_rows for name, num_rows in rows.items() if num_rows}


def snapshot_shapes(spec: LayerCacheSpec, size: CacheSize, num_snapshots: int) -> dict[str, PoolShape]:
    """Return the pools that keep the rings of one layer at page boundaries, by their name in LayerPools."""
    rings = pool_shapes(spec, size)
    return {
        name: PoolShape(num_snapshots, num_rows, rings[name].row_format, rings[name].width)
        for name, num_rows in resume_rows(spec).items()
    }


def step_shapes(specs: Iterable[LayerCacheSpec], size: CacheSize) -> dict[str, dict[PoolShape, None]]:
    """Return the pools of the step area: for each kind of ring, those that layers differ in."""
    shapes: dict[str, dict[PoolShape, None]] = {name: {} for name in RINGS}
    for spec in specs if size.step_tokens else ():
        for name, ring in pool_shapes(spec, size).items():
            if name in RINGS:
                shapes[name][PoolShape(1, size.step_tokens, ring.row_format, ring.width)] = None
    return shapes


class StepArea:
    """Where the rows of a step lie that is longer than rings; one for all layers, each of which uses it in turn."""

    def __init__(self, specs: Iterable[LayerCacheSpec], size: CacheSize, device: torch.device | str = "cpu") -> None:
        """Allocate what the layers of `specs` need; nothing where size.step_tokens is 0."""
        self._size = size
        self._pools = {
            name: {shape: shape.allocate(device) for shape in shapes}
            for name, shapes in step_shapes(specs, size).items()
        }

    def pools_of(self, spec: LayerCacheSpec) -> RowPools:
        """Return the pools that a layer uses while it runs."""
        shapes = step_shapes([spec], self._size)
        return RowPools(**{name: self._pools[name][shape] for name, of_name in shapes.items() for shape in of_name})


def allocate_layer(
    spec: LayerCacheSpec,
    size: CacheSize,
    device: torch.device | str = "cpu",
    *,
    area: StepArea | None = None,
    num_snapshots: int = 0,
) -> LayerPools:
    """Allocate the pools of one layer, filled with zero bytes.

    Args:
        spec: the layer.
        size: the cache.
        device: where.
        area: the step area it shares with other layers, or None.
        num_snapshots: page boundaries at which its rings are kept.

    Raises:
        ValueError: a page is not a whole number of entries, or a format cannot hold rows of that width.
    """
    saved = snapshot_shapes(spec, size, num_snapshots) if num_snapshots else {}
    return LayerPools(
        **{name: shape.allocate(device) for name, shape in pool_shapes(spec, size).items()},
        step=RowPools() if area is None else area.pools_of(spec),
        saved=RowPools(**{name: shape.allocate(device) for name, shape in saved.items()}),
    )


@dataclasses.dataclass(frozen=True)
class LayerCapacity:
    """What one layer's cache costs.

    Attributes:
        spec: the layer.
        num_layers: how many layers of the model are like it.
        ring_bytes: bytes per sequence of one such layer, whatever the sequence's length.
        ring_bytes_needed: the part of ring_bytes that a token reads; the rest is room for the tokens of a step.
        page_bytes: bytes per page of one such layer.
        tokens_per_page: positions a page covers.
        snapshot_bytes: bytes per snapshot of one such layer: the rows that continue a sequence at a page boundary.
    """

    spec: LayerCacheSpec
    num_layers: int
    ring_bytes: int
    ring_bytes_needed: int
    page_bytes: int
    tokens_per_page: int
    snapshot_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token costs in one such layer, averaged over a page."""
        return self.page_bytes / self.tokens_per_page


@dataclasses.dataclass(frozen=True)
class CapacityReport:
    """What a cache costs, per sequence and per token apart.

    Attributes:
        size: the cache.
        layers: one line per kind of layer.
        num_snapshots: page boundaries at which rings are kept for later sequences.
        step_area_bytes: bytes of the step area, which all layers and sequences share.
    """

    size: CacheSize
    layers: tuple[LayerCapacity, ...]
    num_snapshots: int = 0
    step_area_bytes: int = 0

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of the rings of one sequence, all layers."""
        return sum(layer.num_layers * layer.ring_bytes for layer in self.layers)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page, all layers."""
        return sum(layer.num_layers * layer.page_bytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token costs, all layers, averaged over a page."""
        return self.bytes_per_page / self.size.tokens_per_page

    @property
    def bytes_per_snapshot(self) -> int:
        """Bytes of the rows kept at one page boundary, all layers."""
        return sum(layer.num_layers * layer.snapshot_bytes for layer in self.layers)

    @property
    def num_pools(self) -> int:
        """Pools, each of which is allocated by itself."""
        of_layers = sum(layer.num_layers * len(pool_shapes(layer.spec, self.size)) for layer in self.layers)
        saved = sum(layer.num_layers * len(resume_rows(layer.spec)) for layer in self.layers)
        return of_layers + (saved if self.num_snapshots else 0) + (len(RINGS) if self.step_area_bytes else 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache: rings of every sequence, all pages, all snapshots and the step area."""
        return (
            self.step_area_bytes
            + self.size.num_sequences * self.bytes_per_sequence
            + self.size.num_pages * self.bytes_per_page
            + self.num_snapshots * self.bytes_per_snapshot
        )

    def sequence_bytes(self, num_tokens: int) -> int:
        """Return the bytes that a sequence of `num_tokens` tokens occupies: its rings and its pages."""
        return self.bytes_per_sequence + -(-num_tokens // self.size.tokens_per_page) * self.bytes_per_page

    def __str__(self) -> str:
        """Return a printable table."""
        lines = [
            f"{layer.num_layers:4d} x {layer.spec}: {layer.ring_bytes:,} B per sequence, "
            f"{layer.bytes_per_token:,.1f} B per token"
            for layer in self.layers
        ]
        lines.append(
            f"all layers: {self.bytes_per_sequence:,} B per sequence + {self.bytes_per_token:,.1f} B per token"
        )
        if self.step_area_bytes:
            lines.append(f"step area: {self.step_area_bytes:,} B for steps of {self.size.step_tokens:,} tokens")
        if self.num_snapshots:
            lines.append(f"snapshots: {self.num_snapshots} of {self.bytes_per_snapshot:,} B")
        lines.append(
            f"total: {self.total_bytes:,} B for {self.size.num_sequences} sequences and {self.size.num_tokens:,} tokens"
        )
        return "\n".join(lines)


def capacity_report(specs: Sequence[LayerCacheSpec], size: CacheSize, num_snapshots: int = 0) -> CapacityReport:
    """Return what the caches of these layers cost, without allocating anything.

    Args:
        specs: one per layer; equal ones share a line.
        size: the cache.
        num_snapshots: page boundaries at which rings are kept for later sequences.

    Raises:
        ValueError: a page is not a whole number of entries.
    """
    counts: dict[LayerCacheSpec, int] = {}
    for spec in specs:
        counts[spec] = counts.get(spec, 0) + 1
    layers = []
    for spec, num_layers in counts.items():
        shapes = pool_shapes(spec, size)
        needed = {"window": spec.window}
        if spec.ratio is not None:
            needed["state"] = needed["index_state"] = num_rows_pooled(spec.ratio, spec.overlap)
        layers.append(
            LayerCapacity(
                spec,
                num_layers,
                ring_bytes=sum(shapes[name].block_bytes for name in RINGS if name in shapes),
                ring_bytes_needed=sum(
                    page_bytes(shapes[name].row_format, needed[name], shapes[name].width)
                    for name in RINGS
                    if name in shapes
                ),
                page_bytes=sum(shapes[name].block_bytes for name in PAGES if name in shapes),
                tokens_per_page=size.tokens_per_page,
                snapshot_bytes=sum(shape.block_bytes for shape in snapshot_shapes(spec, size, 1).values()),
            )
        )
    area = step_shapes(specs, size)
    step_area_bytes = sum(shape.num_bytes for shapes in area.values() for shape in shapes)
    return CapacityReport(size, tuple(layers), num_snapshots, step_area_bytes)
