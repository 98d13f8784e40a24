# SPDX-License-Identifier: Apache-2.0
"""The memory plan: published bytes per token and fixed state, and weights divided over GPUs."""

from __future__ import annotations

import pytest

from megamoe.formats.cache_rows import RowFormat, row_bytes
from megamoe.models.deepseek_v4.config import ModelConfig, parse_config
from megamoe.models.deepseek_v4.inventory import Entry, Role, inventory
from megamoe.models.deepseek_v4.memory import (
    CACHE_FORMATS,
    Split,
    WeightBytes,
    cache_plan,
    can_split,
    kind_of_weight,
)

from . import checkpoints

MIB = 2**20
CONFIGS: dict[str, ModelConfig] = {"flash": parse_config(checkpoints.FLASH), "pro": parse_config(checkpoints.PRO)}


# Known answers.


@pytest.mark.parametrize(
    ("model", "form", "per_token", "gib_at_a_million"),
    [
        ("flash", 0, 3850, 3.76),
        ("flash", 1, 3514, 3.43),
        ("flash", 2, 6880, 6.72),
        ("pro", 0, 5511, 5.38),
        ("pro", 1, 5031, 4.91),
        ("pro", 2, 9848, 9.62),
    ],
)
def test_growth_is_the_published_one(model, form, per_token, gib_at_a_million):
    plan = cache_plan(CONFIGS[model], CACHE_FORMATS[form])
    assert int(plan.bytes_per_token) == per_token
    assert plan.growing_bytes(2**20) / 2**30 == pytest.approx(gib_at_a_million, abs=0.006)
    assert plan.growing_bytes(2**20) == pytest.approx(plan.bytes_per_token * 2**20)


@pytest.mark.parametrize(("model", "window", "compressor"), [("flash", 3.1, 11.6), ("pro", 4.3, 17.8)])
def test_fixed_state_is_the_published_one(model, window, compressor):
    plan = cache_plan(CONFIGS[model], CACHE_FORMATS[0])
    assert round(plan.window_bytes / MIB, 1) == window or plan.window_bytes / MIB == pytest.approx(window, abs=0.06)
    assert round(plan.compressor_bytes / MIB, 1) == compressor
    assert plan.draft_window_bytes == 0
    assert plan.sequence_bytes(0) == plan.fixed_bytes == plan.window_bytes + plan.compressor_bytes


def test_rows_worked_by_hand():
    plan = cache_plan(CONFIGS["flash"], CACHE_FORMATS[0], num_draft_layers=3)
    assert plan.window_bytes == 43 * 128 * 584 and plan.draft_window_bytes == 3 * 128 * 584
    assert plan.compressor_bytes == 21 * (8 * 1024 * 2 * 4 + 8 * 256 * 2 * 4) + 20 * 128 * 512 * 2 * 4
    assert plan.grown == ((21 * (584 + 132), 4), (20 * 584, 128))
    assert plan.growing_bytes(3) == 0 and plan.growing_bytes(4) == 21 * 716
    assert plan.growing_bytes(127) == 31 * 21 * 716 and plan.growing_bytes(128) == 32 * 21 * 716 + 20 * 584


# Properties.


@pytest.mark.parametrize(("head_dim", "rope_dim", "index_dim"), [(512, 64, 128), (256, 64, 64), (128, 64, 128)])
def test_row_sizes_are_those_of_the_formats(head_dim, rope_dim, index_dim):
    raw = {**checkpoints.FLASH, "head_dim": head_dim, "qk_rope_head_dim": rope_dim, "index_head_dim": index_dim}
    config = parse_config(raw)
    entries = [RowFormat.FP8_ROPE_BF16, RowFormat.FP8_ROPE_BF16, RowFormat.BF16]
    keys = [RowFormat.INDEX_FP8, RowFormat.INDEX_FP4, RowFormat.BF16]
    for form, entry, key in zip(CACHE_FORMATS, entries, keys, strict=True):
        assert form.entry_bytes(config) == sum(row_bytes(entry, head_dim))
        assert form.index_bytes(config) == sum(row_bytes(key, index_dim))


def test_weights_per_gpu():
    weights = WeightBytes(experts=800, divided=80, replicated=20)
    assert weights.total == 900
    assert [weights.per_gpu(gpus, Split.DATA) for gpus in (1, 2, 8)] == [900, 500, 200]
    assert [weights.per_gpu(gpus, Split.TENSOR) for gpus in (1, 2, 8)] == [900, 460, 130]
    assert WeightBytes(7, 5, 1).per_gpu(2, Split.TENSOR) == 4 + 3 + 1  # the GPU that holds most


def test_what_can_be_divided():
    flash, pro = CONFIGS["flash"], CONFIGS["pro"]
    assert all(can_split(flash, gpus, split) for gpus in (1, 2, 4, 8) for split in Split)
    assert can_split(flash, 16, Split.DATA) and not can_split(flash, 16, Split.TENSOR)  # 8 output groups
    assert can_split(pro, 16, Split.TENSOR) and not can_split(pro, 5, Split.DATA)


def test_every_weight_is_counted_once():
    kinds = {entry.name: kind_of_weight(entry) for entry in inventory(CONFIGS["flash"], num_mtp=1)}
    assert {name for name in kinds if ".experts.0.w1" in name and "shared" not in name} <= {
        name for name, kind in kinds.items() if kind == "experts"
    }
    assert kinds["embed.weight"] == kinds["layers.5.attn.wq_b"] == kinds["mtp.0.attn.wo_a"] == "divided"
    assert kinds["layers.5.ffn.shared_experts.w2"] == kinds["layers.5.attn.attn_sink"] == "divided"
    assert kinds["layers.2.attn.indexer.wq_b"] == kinds["layers.5.attn.wkv"] == kinds["norm.weight"] == "replicated"
    assert kind_of_weight(Entry("layers.0.ffn.experts.3.w1", (1, 1), Role.EXPERT)) == "experts"
