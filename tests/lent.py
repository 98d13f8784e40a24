# SPDX-License-Identifier: Apache-2.0
"""Operations that have no kernel for this GPU yet, lent their references, run by torch on the GPU.

Everything else is then what it will be. What is lent is printed. A lent operation may ask the device, so a step with
one among its operations cannot be captured; those that choose tokens stand outside of graphs and may be lent.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch

import megamoe.ops
from megamoe.kernels import KERNELS
from megamoe.kernels.plan import module_for
from megamoe.kernels.store import target_of

REFERENCES = {
    "linear": "linear.reference",
    "grouped_linear": "grouped_linear.reference",
    "nvfp4_grouped_linear": "grouped_linear.reference_nvfp4",
    "nvfp4_weight_only_grouped_linear": "grouped_linear.reference",
    "nvfp4_experts": "nvfp4_experts.reference",
    "copy_cache": "copy_cache.reference",
    "compress_kv": "compress_kv.reference",
    "index_topk": "index_topk.reference",
    "sparse_attention": "sparse_attention.reference",
    "sample": "sample.reference",
    "penalize": "penalize.reference",
    "token_logprobs": "token_logprobs.reference",
    "embed_streams": "embed_streams.reference",
    "hyper_connection_post_pre_norm": "hyper_connection.reference_post_pre_norm",
    "hyper_connection_head_norm": "hyper_connection.reference_head_norm",
    "plan_slots": "plan_slots.reference",
    "rotate_queries": "rotate_queries.reference",
    "round_index_query": "round_index_query.reference",
    "save_rows": "save_rows.reference",
    "write_block_tables": "write_block_tables.reference",
    "write_index_keys": "write_index_keys.reference",
    "write_latent": "write_latent.reference",
    "mean_of_streams": "streams.reference_mean",
    "add_to_streams": "streams.reference_add",
}

OUTSIDE_OF_GRAPHS = {"sample", "penalize", "token_logprobs", "copy_cache", "save_rows"}


def lend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give operations without a kernel for this GPU their references as kernels; return which."""
    target = target_of(torch.device("cuda"))
    missing = [op for op in REFERENCES if module_for(op, target) is None]
    for op in missing:
        file, _, name = REFERENCES[op].partition(".")
        module = types.ModuleType(f"megamoe_lent_{op}")
        module.run = _lend(getattr(importlib.import_module(f"megamoe.ops.{file}"), name))  # type: ignore[attr-defined]
        module.configs = lambda dims: ()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(KERNELS, op, {target.rstrip("a"): module.__name__})
    print(f"lent by torch: {', '.join(missing) or 'nothing'}")
    return missing


def _lend(reference: Any) -> Any:
    def run(*arguments: Any) -> Any:
        with megamoe.ops.use("reference"):
            return reference(*arguments)

    return run
