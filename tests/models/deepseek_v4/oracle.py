# SPDX-License-Identifier: Apache-2.0
"""transformers 5.24.0 as oracle: random checkpoints that exercise every mechanism, saved the ways people save them.

Run as a script (`make oracle`) it prints the table of docs/numerics.md: per case, way of saving and way of stepping,
the largest absolute difference of the logits.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class OracleCase:
    """One random model.

    Attributes:
        name: shown in the table and in test ids.
        layer_types: transformers' layer types.
        hca_ratio: compress ratio of HCA layers (CSA is always 4).
        lengths: sequence lengths checked by a full pass; the longest is also stepped in chunks.
        overrides: DeepseekV4Config arguments.
    """

    name: str
    layer_types: tuple[str, ...]
    hca_ratio: int
    lengths: tuple[int, ...]
    num_hash_layers: int
    overrides: dict[str, Any]


CASES = (
    OracleCase("small", (SWA, CSA, HCA, CSA), 8, (1, 2, 3, 4, 5, 8, 41), 2, {}),
    OracleCase(
        "ratios-4-128-window-128",
        (HCA, HCA, CSA, HCA, CSA),
        128,
        (1, 127, 128, 129, 511, 512, 700),
        3,
        {"sliding_window": 128, "index_topk": 24, "index_n_heads": 32},
    ),
    OracleCase(
        "64-heads-8-groups",
        (SWA, SWA, CSA, HCA, CSA),
        128,
        (1, 130, 300),
        1,
        {
            "num_attention_heads": 64,
            "o_groups": 8,
            "o_lora_rank": 16,
            "sliding_window": 64,
            "index_topk": 16,
            "index_n_heads": 64,
            "hidden_size": 64,
        },
    ),
    OracleCase(
        "head-512-rope-64",
        (SWA, CSA, HCA, CSA),
        128,
        (1, 129, 260),
        1,
        {
            "head_dim": 512,
            "partial_rotary_factor": 0.125,
            "sliding_window": 128,
            "index_head_dim": 128,
            "index_topk": 32,
            "index_n_heads": 32,
            "hidden_size": 128,
            "q_lora_rank": 64,
            "n_routed_experts": 16,
            "num_experts_per_tok": 6,
        },
    ),
)


def build(case: OracleCase, seed: int) -> Any:
    """Return a transformers model of `case` in fp32 with random, non-degenerate weights."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    arguments: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": len(case.layer_types),
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "max_position_embeddings": 2048,
        "layer_types": list(case.layer_types),
        "compress_rates": {CSA: 4, HCA: case.hca_ratio},
        "mlp_layer_types": ["hash_moe"] * case.num_hash_layers
        + ["moe"] * (len(case.layer_types) - case.num_hash_layers),
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 3,
        "swiglu_limit": 10.0,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "attn_implementation": "eager",
    }
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**{**arguments, **case.overrides})).eval().float()
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if "inv_freq" not in name:
                tensor.copy_(_random_like(name, tensor, model.config.n_routed_experts, generator))
    return model


def _random_like(name: str, tensor: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return values of the size a trained model would have for the tensor called `name`."""
    noise = torch.randn(tensor.shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        order = torch.rand(tensor.shape[0], num_experts, generator=generator).argsort(-1)
        return order[:, : tensor.shape[1]].to(tensor.dtype)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if leaf in ("sinks", "position_bias", "e_score_correction_bias", "base", "hc_base"):
        return 0.5 * noise
    if leaf in ("scale", "hc_scale"):
        return 1.0 + 0.2 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return noise / math.sqrt(tensor.shape[-1]) if "lm_head" in name else noise
    return noise / math.sqrt(tensor.shape[-1])


def save(model: Any, directory: pathlib.Path, way: str) -> None:
    """Write `model` into `directory`: "save_pretrained fp32", "save_pretrained bf16" or "state_dict fp32"."""
    if way == "save_pretrained fp32":
        model.save_pretrained(directory)
    elif way == "save_pretrained bf16":
        model.to(torch.bfloat16).save_pretrained(directory)
    elif way == "state_dict fp32":
        from safetensors.torch import save_file

        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file({n: t for n, t in tensors.items() if "inv_freq" not in n}, directory / "model.safetensors")
    else:
        raise ValueError(f"save: unknown way {way!r}")


WAYS = ("save_pretrained fp32", "save_pretrained bf16", "state_dict fp32")


def reference_model(directory: pathlib.Path, case: OracleCase, seed: int, way: str) -> Any:
    """Save a random model and return what transformers computes with after reading it back, in fp32."""
    model = build(case, seed)
    save(model, directory, way)
    if way.endswith("bf16"):  # what was saved is rounded: read it back, and compute in fp32
        from transformers import DeepseekV4ForCausalLM

        model = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def token_ids(length: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Return random ids [T]."""
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed + 1))


def ragged_chunks(length: int, seed: int) -> list[int]:
    """Return chunk sizes that sum to `length`: empty ones, single tokens, and sizes around 4 and 128."""
    sizes, left = [0, 1, 3, 5, 127, 130, 2, 64, 1, 1], length
    generator = torch.Generator().manual_seed(seed)
    chunks = []
    while left > 0:
        pick = sizes[len(chunks) % len(sizes)] if len(chunks) < 10 else 0
        pick = pick or int(torch.randint(1, 90, (), generator=generator))
        chunks.append(min(pick, left))
        left -= chunks[-1]
    return [0, *chunks]


def step_through(model: Any, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Return the logits of `ids` computed chunk by chunk with one cache."""
    cache = model.new_cache(max_tokens=ids.shape[0])
    return torch.cat([model.step(part, cache) for part in ids.split(chunks)])


def main() -> int:
    """Print the oracle table; exit code 1 if any difference is above the bound."""
    import megamoe

    rows, worst = [], 0.0
    for case in CASES:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as name, torch.inference_mode():
                directory = pathlib.Path(name)
                theirs = reference_model(directory, case, 0, way)
                ours = megamoe.load(directory, recipe="exact", dtype=torch.float32)
                ids = token_ids(max(case.lengths), theirs.config.vocab_size, 0)
                want = theirs(ids[None], use_cache=False).logits[0]
                by_length = max(float((ours.logits(ids[:n]) - want[:n]).abs().max()) for n in case.lengths)
                one = float((step_through(ours, ids, [1] * len(ids)) - want).abs().max())
                ragged = float((step_through(ours, ids, ragged_chunks(len(ids), 0)) - want).abs().max())
                rows.append((case.name, way, max(case.lengths), float(want.std()), by_length, one, ragged))
                worst = max(worst, by_length, one, ragged)
    print("| case | saved by | tokens | logit std | full pass | token by token | ragged chunks |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case_name, way, length, std, full, one, ragged in rows:
        print(f"| {case_name} | {way} | {length} | {std:.2f} | {full:.1e} | {one:.1e} | {ragged:.1e} |")
    print(f"largest absolute difference {worst:.2e}; allowed {TOLERANCE:g}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
