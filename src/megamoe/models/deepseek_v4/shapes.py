# SPDX-License-Identifier: Apache-2.0
"""Every operation a DeepSeek-V4 calls, with the sizes of three models: the bundled tiny one, Flash and Pro.

Plain data, so that tests, verify and bench run the sizes that real models use and nobody makes up others. A row is one
call site: the operations that may serve it (which one depends on the weight's format and the recipe), where it is, and
its sizes. T, the tokens of a step, is the caller's choice and not listed; nor are page tables and positions. What one
checkpoint of any size calls under one recipe: calls.py.
The tiny model has no DSpark draft; its sizes in those rows are of one with two target layers and rank 8, for tests.

    T tokens  D hidden  H heads  C head channels  R rotary channels  G output groups  X streams  V vocabulary
    E experts  A active experts  F expert inner size  J cache entries a token attends to  Hi index heads
    N, K output and input channels of a linear; n, width the last dimension; scales, tensor scales if not one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

MODELS = ("tiny", "flash", "pro")


@dataclasses.dataclass(frozen=True)
class OpCall:
    """One operation, called at one place of one model.

    Attributes:
        op: name of the operation.
        model: "tiny", "flash" or "pro".
        where: which part of the model calls it.
        dims: size of each named dimension except T.
    """

    op: str
    model: str
    where: str
    dims: Mapping[str, int]

    def __str__(self) -> str:
        """Return a short id, for example "flash attn.wq_a N=1024 K=4096"."""
        return f"{self.model} {self.where} {' '.join(f'{name}={size}' for name, size in self.dims.items())}"


_LINEAR = "linear fp8_linear nvfp4_linear nvfp4_weight_only_linear"
_GROUPED = "grouped_linear fp8_grouped_linear nvfp4_grouped_linear nvfp4_weight_only_grouped_linear"
_EXPERTS = "experts fp8_experts nvfp4_experts nvfp4_weight_only_experts"
_QUANTIZE = "quantize_nvfp4 quantize_fp8_rows"

# Operations, place, and per dimension the sizes of (tiny, flash, pro).
TABLE: tuple[tuple[str, str, dict[str, tuple[int, int, int]]], ...] = (
    # Linears that may be quantized.
    (_LINEAR, "attn.wq_a", {"N": (128, 1024, 1536), "K": (256, 4096, 7168)}),
    (_LINEAR, "attn.wq_b", {"N": (2048, 32768, 65536), "K": (128, 1024, 1536)}),
    (_LINEAR, "attn.wkv", {"N": (512, 512, 512), "K": (256, 4096, 7168)}),
    (_LINEAR, "attn.wo_b", {"N": (256, 4096, 7168), "K": (128, 8192, 16384)}),
    # One matrix over another that multiplies the same input, where their formats allow it (stacked.py).
    ("linear fp8_linear", "attn.wq_a, attn.wkv", {"N": (640, 1536, 2048), "K": (256, 4096, 7168)}),
    (
        "nvfp4_linear nvfp4_weight_only_linear",
        "attn.wq_a, attn.wkv",
        {"N": (640, 1536, 2048), "K": (256, 4096, 7168), "scales": (640, 1536, 2048)},
    ),
    ("linear fp8_linear", "attn.wq_b, attn.indexer.wq_b", {"N": (4096, 40960, 73728), "K": (128, 1024, 1536)}),
    (
        "nvfp4_linear nvfp4_weight_only_linear",
        "attn.wq_b, attn.indexer.wq_b",
        {"N": (4096, 40960, 73728), "K": (128, 1024, 1536), "scales": (4096, 40960, 73728)},
    ),
    (_LINEAR, "attn.indexer.wq_b", {"N": (2048, 8192, 8192), "K": (128, 1024, 1536)}),
    (_LINEAR, "ffn.shared_experts.w1", {"N": (128, 2048, 3072), "K": (256, 4096, 7168)}),
    (_LINEAR, "ffn.shared_experts.w2", {"N": (256, 4096, 7168), "K": (128, 2048, 3072)}),
    (_LINEAR, "mtp.e_proj", {"N": (256, 4096, 7168), "K": (256, 4096, 7168)}),
    (_LINEAR, "mtp.main_proj", {"N": (256, 4096, 7168), "K": (512, 12288, 21504)}),
    (_GROUPED, "attn.wo_a", {"G": (2, 8, 16), "N": (64, 1024, 1024), "K": (1024, 4096, 4096)}),
    (
        _EXPERTS,
        "ffn.experts",
        {"E": (8, 256, 384), "A": (2, 6, 6), "D": (256, 4096, 7168), "F": (128, 2048, 3072)},
    ),
    # Linears that stay plain.
    ("linear", "head", {"N": (4096, 129280, 129280), "K": (256, 4096, 7168)}),
    ("linear", "mtp.markov_head.markov_w2", {"N": (4096, 129280, 129280), "K": (8, 256, 512)}),
    ("linear", "mtp.confidence_head.proj", {"N": (1, 1, 1), "K": (264, 4352, 7680)}),
    # wkv over wgate of a compressor; with ratio 4 also those of the index compressor, and weights_proj.
    ("linear", "attn.compressed (ratio 4)", {"N": (2576, 2624, 2624), "K": (256, 4096, 7168)}),
    ("linear", "attn.compressed (ratio 128)", {"N": (1024, 1024, 1024), "K": (256, 4096, 7168)}),
    ("route_experts", "ffn.gate", {"E": (8, 256, 384), "D": (256, 4096, 7168), "A": (2, 6, 6)}),
    (
        "route_experts",
        "ffn.gate (hash)",
        {"V": (4096, 129280, 129280), "E": (8, 256, 384), "D": (256, 4096, 7168), "A": (2, 6, 6)},
    ),
    # Inputs of quantized linears.
    (_QUANTIZE, "attn input, ffn input", {"K": (256, 4096, 7168)}),
    (_QUANTIZE, "attn.wq_b input", {"K": (128, 1024, 1536)}),
    (_QUANTIZE, "attn.wo_a input", {"G": (2, 8, 16), "K": (1024, 4096, 4096)}),
    (_QUANTIZE, "attn.wo_b input", {"K": (128, 8192, 16384)}),
    (_QUANTIZE, "ffn.w2 input", {"K": (128, 2048, 3072)}),
    (_QUANTIZE, "mtp.main_proj input", {"K": (512, 12288, 21504)}),
    ("clamped_swiglu", "ffn.shared_experts", {"F": (128, 2048, 3072)}),
    # Norms, rotations, streams.
    ("rms_norm rms_norm_quantize_nvfp4", "mtp.enorm, mtp.main_norm, mtp.norm", {"K": (256, 4096, 7168)}),
    ("rms_norm rms_norm_quantize_nvfp4", "attn.q_norm", {"K": (128, 1024, 1536)}),
    ("rms_norm", "attn queries", {"H": (4, 64, 128), "K": (512, 512, 512)}),
    ("rms_norm", "attn.kv_norm", {"K": (512, 512, 512)}),
    ("rms_norm", "mtp.hnorm", {"X": (4, 4, 4), "K": (256, 4096, 7168)}),
    ("rope", "attn queries, attn output", {"H": (4, 64, 128), "C": (512, 512, 512), "R": (64, 64, 64)}),
    ("rope", "attn latent", {"C": (512, 512, 512), "R": (64, 64, 64)}),
    ("rope", "attn.indexer queries", {"H": (16, 64, 64), "C": (128, 128, 128), "R": (64, 64, 64)}),
    ("hyper_connection_pre hyper_connection_pre_norm", "hc_attn, hc_ffn", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("hyper_connection_post", "hc_attn, hc_ffn", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("hyper_connection_post_pre_norm", "hc_attn, hc_ffn", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("hyper_connection_head hyper_connection_head_norm", "hc_head", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("embed_streams", "embed", {"V": (4096, 129280, 129280), "X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("embed_streams", "mtp embed", {"V": (4096, 129280, 129280), "X": (1, 1, 1), "D": (256, 4096, 7168)}),
    (
        "embed_streams",
        "mtp.markov_head.markov_w1",
        {"V": (4096, 129280, 129280), "X": (1, 1, 1), "D": (8, 256, 512)},
    ),
    ("rotate_queries", "attn queries", {"H": (4, 64, 128), "C": (512, 512, 512), "R": (64, 64, 64)}),
    ("write_latent", "attn latents", {"Q": (128, 1024, 1536), "C": (512, 512, 512), "R": (64, 64, 64)}),
    ("write_latent", "mtp latents", {"C": (512, 512, 512), "R": (64, 64, 64)}),
    ("round_index_query", "attn.indexer queries", {"Hi": (16, 64, 64), "K": (128, 128, 128), "R": (64, 64, 64)}),
    ("add_to_streams", "mtp input", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("mean_of_streams", "mtp taps", {"X": (4, 4, 4), "D": (256, 4096, 7168)}),
    ("hadamard", "attn.indexer queries", {"Hi": (16, 64, 64), "n": (128, 128, 128)}),
    ("quantize_mxfp4", "attn.indexer queries", {"Hi": (16, 64, 64), "K": (128, 128, 128)}),
    # Caches and attention. Raw compressor rows are values beside scores: 2 * coff * C wide. Rows of rings are copied
    # out of the step area and out of snapshots; those that continue a sequence at a page boundary are saved.
    ("write_cache read_cache copy_cache save_rows", "window latents", {"width": (512, 512, 512)}),
    ("copy_cache save_rows", "compressor rows (ratio 4)", {"width": (2048, 2048, 2048)}),
    ("copy_cache", "compressor rows (ratio 128)", {"width": (1024, 1024, 1024)}),
    ("copy_cache save_rows", "index compressor rows", {"width": (512, 512, 512)}),
    ("compress_kv", "attn.compressor (ratio 4)", {"ratio": (4, 4, 4), "coff": (2, 2, 2), "D": (512, 512, 512)}),
    ("compress_kv", "attn.compressor (ratio 128)", {"ratio": (128, 128, 128), "coff": (1, 1, 1), "D": (512, 512, 512)}),
    ("write_index_keys", "attn.indexer.compressor", {"ratio": (4, 4, 4), "D": (128, 128, 128)}),
    (
        "index_scores index_topk",
        "attn.indexer",
        {"Hi": (16, 64, 64), "K": (128, 128, 128), "top_k": (64, 512, 1024)},
    ),
    # W window entries, J compressed ones at the longest context (HCA: one per 128 tokens).
    (
        "sparse_attention",
        "attn (window only)",
        {"H": (4, 64, 128), "C": (512, 512, 512), "W": (128, 128, 128), "J": (0, 0, 0)},
    ),
    (
        "sparse_attention",
        "attn (DSpark block)",  # J: the rows of the block
        {"H": (4, 64, 128), "C": (512, 512, 512), "W": (128, 128, 128), "J": (5, 5, 5)},
    ),
    (
        "sparse_attention",
        "attn (ratio 4)",
        {"H": (4, 64, 128), "C": (512, 512, 512), "W": (128, 128, 128), "J": (64, 512, 1024)},
    ),
    (
        "sparse_attention",
        "attn (ratio 128)",
        {"H": (4, 64, 128), "C": (512, 512, 512), "W": (128, 128, 128), "J": (64, 8192, 8192)},
    ),
    # Integers only: the sizes are the step's and the block tables', and no model has a say in them.
    ("plan_slots write_block_tables", "step", {}),
    ("sample penalize token_logprobs", "logits", {"V": (4096, 129280, 129280)}),
)


def op_calls(model: str) -> tuple[OpCall, ...]:
    """Return every call of one model.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"op_calls: unknown model {model!r}; allowed are {', '.join(MODELS)}.")
    column = MODELS.index(model)
    return tuple(
        OpCall(op, model, where, {name: sizes[column] for name, sizes in dims.items()})
        for ops, where, dims in TABLE
        for op in ops.split()
    )


def op_shapes(op: str, models: Iterable[str] = MODELS) -> tuple[OpCall, ...]:
    """Return the calls of one operation in some models, each set of sizes once, as the first model's that has it.

    Raises:
        ValueError: no model calls this operation.
    """
    calls: dict[tuple[tuple[str, int], ...], OpCall] = {}
    for call in (call for model in models for call in op_calls(model) if call.op == op):
        calls.setdefault(tuple(call.dims.items()), call)
    if not calls:
        known = sorted({name for ops, _, _ in TABLE for name in ops.split()})
        raise ValueError(f"op_shapes: no model calls {op!r}; called are {', '.join(known)}.")
    return tuple(calls.values())
