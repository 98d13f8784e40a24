# SPDX-License-Identifier: Apache-2.0
"""Pools of a layer: shapes, allocation, and what they cost."""

from __future__ import annotations

import pytest

from megamoe.cache.pools import (
    CacheSize,
    LayerCacheSpec,
    RowPools,
    StepArea,
    allocate_layer,
    capacity_report,
    fit_tokens_per_page,
    pool_shapes,
)
from megamoe.formats.cache_rows import RowFormat

SWA = LayerCacheSpec(512, RowFormat.FP8_ROPE_BF16, 128)
HCA = LayerCacheSpec(512, RowFormat.FP8_ROPE_BF16, 128, ratio=128)
CSA = LayerCacheSpec(
    512, RowFormat.FP8_ROPE_BF16, 128, ratio=4, overlap=True, index_width=128, index_format=RowFormat.INDEX_FP4
)
SIZE = CacheSize(num_sequences=2, num_pages=5, tokens_per_page=256, ring_tokens=32)

# --- known answers ---


def test_shapes_of_each_kind():
    assert set(pool_shapes(SWA, SIZE)) == {"window"}
    assert set(pool_shapes(HCA, SIZE)) == {"window", "state", "entries"}
    shapes = pool_shapes(CSA, SIZE)
    assert set(shapes) == {"window", "state", "entries", "index_state", "index_keys"}
    assert (shapes["window"].num_blocks, shapes["window"].rows_per_block) == (2, 128 + 32)
    assert (shapes["entries"].num_blocks, shapes["entries"].rows_per_block) == (5, 64)
    assert (shapes["state"].rows_per_block, shapes["state"].width) == (8 + 32, 2 * 2 * 512)
    assert (shapes["index_state"].rows_per_block, shapes["index_state"].width) == (8 + 32, 2 * 2 * 128)
    assert pool_shapes(HCA, SIZE)["state"].width == 2 * 512
    assert pool_shapes(HCA, SIZE)["entries"].rows_per_block == 2


def test_bytes_of_released_geometry():
    """Pages of 256 tokens: 64 entries of 584 B and 64 keys of 68 B in a CSA layer, 2 entries in an HCA layer."""
    report = capacity_report([CSA, HCA, HCA, SWA], SIZE)
    csa, hca, swa = report.layers
    assert csa.page_bytes == 64 * 584 + 64 * 68
    assert hca.page_bytes == 2 * 584
    assert (swa.page_bytes, swa.bytes_per_token) == (0, 0.0)
    assert csa.bytes_per_token == 146 + 17
    assert swa.ring_bytes == 160 * 584 and swa.ring_bytes_needed == 128 * 584
    assert csa.ring_bytes == 160 * 584 + 40 * 4 * 2048 + 40 * 4 * 512
    assert csa.ring_bytes_needed == 128 * 584 + 8 * 4 * 2048 + 8 * 4 * 512
    assert (hca.num_layers, report.bytes_per_page) == (2, csa.page_bytes + 2 * hca.page_bytes)


def test_fit_tokens_per_page():
    assert fit_tokens_per_page([4, 128]) == 256
    assert fit_tokens_per_page([4, 3]) == 264
    assert fit_tokens_per_page([], at_least=5) == 5
    assert fit_tokens_per_page([4, 8], at_least=1) == 8


def test_for_one_sequence():
    assert CacheSize.for_one_sequence(513, tokens_per_page=256, ring_tokens=7) == CacheSize(1, 3, 256, 7)
    assert CacheSize.for_one_sequence(0, tokens_per_page=256, ring_tokens=7).num_pages == 0


# --- properties ---


@pytest.mark.parametrize("spec", [SWA, HCA, CSA], ids=str)
def test_the_report_is_what_is_allocated(spec):
    pools = allocate_layer(spec, SIZE)
    allocated = 0
    for name, shape in pool_shapes(spec, SIZE).items():
        pool = getattr(pools, name)
        assert (pool.rows_per_block, pool.row_format, pool.width) == (
            shape.rows_per_block,
            shape.row_format,
            shape.width,
        )
        assert int(pool.storage.count_nonzero()) == 0
        allocated += pool.num_blocks * pool.block_stride_bytes
    missing = {"window", "state", "entries", "index_state", "index_keys"} - set(pool_shapes(spec, SIZE))
    assert all(getattr(pools, name) is None for name in missing)
    assert capacity_report([spec], SIZE).total_bytes == allocated


def test_per_token_and_per_sequence_bytes_stay_apart():
    """More pages change the bytes per sequence by nothing, and longer rings the bytes per token by nothing."""
    base = capacity_report([CSA, HCA], SIZE)
    more_pages = capacity_report([CSA, HCA], CacheSize(2, 50, 256, 32))
    longer_rings = capacity_report([CSA, HCA], CacheSize(2, 5, 256, 64))
    assert more_pages.bytes_per_sequence == base.bytes_per_sequence
    assert more_pages.total_bytes == base.total_bytes + 45 * base.bytes_per_page
    assert longer_rings.bytes_per_token == base.bytes_per_token
    assert longer_rings.bytes_per_sequence > base.bytes_per_sequence
    assert base.sequence_bytes(0) == base.bytes_per_sequence
    assert base.sequence_bytes(257) == base.bytes_per_sequence + 2 * base.bytes_per_page


def test_the_printed_report_names_both(seed):
    text = str(capacity_report([CSA, HCA], SIZE))
    assert "B per sequence" in text and "B per token" in text
    assert "window 128 + 1 entry per 4 tokens overlapping + index keys" in text


def test_small_widths_and_ratio_1():
    spec = LayerCacheSpec(16, RowFormat.FP32, 1, ratio=1, index_width=16, index_format=RowFormat.FP32)
    pools = allocate_layer(spec, CacheSize(1, 1, 1, 1))
    assert pools.entries is not None and pools.entries.num_slots == 1
    assert pools.window.num_slots == 2


def flash_specs() -> list[LayerCacheSpec]:
    """The layers of V4-Flash: two with a window alone, then CSA and HCA in turn."""
    return [SWA, SWA, *([CSA, HCA] * 21)[:41]]


def test_rings_of_flash_are_as_long_as_decoding_needs():
    """64 sequences with one draft each and steps of 4,096 tokens: once 85 GB of rings."""
    report = capacity_report(flash_specs(), CacheSize(64, 0, 256, 2, 4096))
    assert 64 * report.bytes_per_sequence <= 1.2e9 and report.step_area_bytes <= 100e6
    longer = capacity_report(flash_specs(), CacheSize(64, 0, 256, 2, 8192))
    assert longer.bytes_per_sequence == report.bytes_per_sequence, "rings do not grow with the step"
    assert longer.step_area_bytes == 2 * report.step_area_bytes


def test_all_layers_share_one_step_area():
    size = CacheSize(2, 4, 256, 1, 40)
    area = StepArea([CSA, HCA, SWA, CSA], size)
    first, hca, swa, second = (allocate_layer(spec, size, area=area).step for spec in (CSA, HCA, SWA, CSA))
    assert first.window is second.window is hca.window is swa.window and first.state is second.state
    assert hca.state is not first.state, "raw rows of another width"
    assert (swa.state, hca.index_state) == (None, None)
    assert all(pool.num_blocks == 1 and pool.rows_per_block == 40 for pool in (first.window, hca.state))
    pools = {id(pool): pool for one in (first, hca) for pool in (one.window, one.state, one.index_state) if pool}
    bytes_of_all = sum(pool.num_blocks * pool.block_stride_bytes for pool in pools.values())
    assert capacity_report([CSA, HCA, SWA], size).step_area_bytes == bytes_of_all
    assert allocate_layer(CSA, CacheSize(2, 4, 256, 1)).step == RowPools()


def test_snapshots_hold_what_continues_a_sequence():
    saved = allocate_layer(CSA, SIZE, num_snapshots=3).saved
    assert (saved.window.num_blocks, saved.window.rows_per_block) == (3, 127)
    assert (saved.state.rows_per_block, saved.index_state.rows_per_block) == (4, 4)
    assert allocate_layer(HCA, SIZE, num_snapshots=3).saved.state is None
    assert allocate_layer(CSA, SIZE).saved == RowPools()


# --- refusals ---


def test_refusals():
    with pytest.raises(ValueError, match="multiple of every layer's ratio; got 250 and ratio 128"):
        pool_shapes(HCA, CacheSize(1, 1, 250, 1))
    with pytest.raises(ValueError, match="width and window must be >= 1"):
        LayerCacheSpec(512, RowFormat.BF16, 0)
    with pytest.raises(ValueError, match="ratio must be >= 1"):
        LayerCacheSpec(512, RowFormat.BF16, 1, ratio=0)
    with pytest.raises(ValueError, match="go together"):
        LayerCacheSpec(512, RowFormat.BF16, 1, ratio=4, index_width=128)
    with pytest.raises(ValueError, match="need entries"):
        LayerCacheSpec(512, RowFormat.BF16, 1, overlap=True)
    with pytest.raises(ValueError, match="CacheSize"):
        CacheSize(0, 1, 1, 1)
    with pytest.raises(ValueError, match="max_tokens must be >= 0"):
        CacheSize.for_one_sequence(-1, tokens_per_page=1, ring_tokens=1)
    with pytest.raises(ValueError, match="must be >= 1"):
        fit_tokens_per_page([0])
    with pytest.raises(ValueError, match="FP8_ROPE_BF16: width"):
        allocate_layer(LayerCacheSpec(16, RowFormat.FP8_ROPE_BF16, 1), SIZE)
