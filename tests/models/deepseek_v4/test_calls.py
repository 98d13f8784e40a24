# SPDX-License-Identifier: Apache-2.0
"""Which operations a checkpoint calls: against the literal table, and against what a run of the bundled model picks."""

from __future__ import annotations

from typing import Any

import pytest

from megamoe.models.deepseek_v4.calls import model_calls
from megamoe.models.deepseek_v4.config import ModelConfig, parse_config
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls
from megamoe.models.recipe import get_recipe

from .test_config import raw_config

RANKS = {"tiny": ([0, 3], 8), "flash": ([40, 41, 42], 256), "pro": ([58, 59, 60], 512)}
# What references do inside: a kernel of the outer operation needs none.
INNER = {"read_cache", "index_scores", "rope", "hadamard", "quantize_mxfp4", "write_cache"}
INNER_PLACES = {("rms_norm", f"attn{part}") for part in (".q_norm", " queries", ".kv_norm")}
UNUSED = {"rms_norm_quantize_nvfp4", "hyper_connection_pre"}  # not called by the model: fused, not yet; alone, no more
QUANTIZED = ("w4a16", "w4a4")


def config_of(model: str, repository: Any) -> ModelConfig:
    layers, rank = RANKS[model]
    draft = {"dspark_target_layer_ids": layers, "dspark_markov_rank": rank, "dspark_noise_token_id": 0}
    return parse_config({**raw_config(model, repository), **draft, "dspark_block_size": 5})


@pytest.mark.parametrize("model", MODELS)
def test_the_table_and_the_function_agree(model: str, repository: Any) -> None:
    """Every format a checkpoint could be stored in, both drafts, both quantized recipes."""
    config = config_of(model, repository)
    found = {
        (call.op, call.where, tuple(call.dims.items()))
        for recipe in QUANTIZED
        for draft in ({"num_mtp": 1}, {"num_dspark": 1})
        for call in model_calls(config, None, get_recipe(recipe), **draft)
    }
    table = {(call.op, call.where, tuple(call.dims.items())) for call in op_calls(model)}
    missing = {one for one in table - found if one[0] not in INNER | UNUSED and one[:2] not in INNER_PLACES}
    assert missing == set()
    assert found - table == set()
