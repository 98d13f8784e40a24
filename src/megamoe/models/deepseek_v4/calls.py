# SPDX-License-Identifier: Apache-2.0
"""Which operations one checkpoint calls under one recipe, and at which sizes: from its configuration and its headers.

shapes.py lists what three models call in every format they could be stored in; this file says the same of any
checkpoint, and only of the formats it has. No tensor is read, so a model that a GPU has no kernels for is refused
before its weights are loaded, and a kernel pack can be built on a machine that could never hold them.
Tests compare: with shapes.py for its three models, and with the operations that a real run picks.

What an operation's reference does inside (read_cache, index_scores, the quantizers of the experts) is not listed: a
kernel does it in its own way.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Set

import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.formats import fp8
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig, load_config
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.shapes import OpCall
from megamoe.models.deepseek_v4.weights import WeightLoader
from megamoe.models.recipe import NvFp4Arithmetic, Recipe

_PLAIN = {"linear": "linear", "grouped": "grouped_linear", "experts": "experts"}
_FP8 = {"linear": "fp8_linear", "grouped": "fp8_grouped_linear", "experts": "fp8_experts"}
_NVFP4 = {
    NvFp4Arithmetic.WEIGHT_ONLY: {
        "linear": "nvfp4_weight_only_linear",
        "grouped": "nvfp4_weight_only_grouped_linear",
        "experts": "nvfp4_weight_only_experts",
    },
    NvFp4Arithmetic.NVFP4_ACTIVATIONS: {
        "linear": "nvfp4_linear",
        "grouped": "nvfp4_grouped_linear",
        "experts": "nvfp4_experts",
    },
}


def weight_ops(found: Format, recipe: Recipe) -> Mapping[str, str]:
    """Return the operation of a linear, a grouped linear and experts whose weights are stored in a format."""
    if recipe.dequantize_weights or found is Format.PLAIN:
        return _PLAIN
    return _FP8 if found is Format.FP8 else _NVFP4[recipe.nvfp4_arithmetic]


def model_calls(
    config: ModelConfig,
    formats: Mapping[str, Format] | None,
    recipe: Recipe,
    *,
    model: str = "checkpoint",
    num_mtp: int = 0,
    num_dspark: int = 0,
) -> tuple[OpCall, ...]:
    """Return every operation call of a model, each set of sizes once per place.

    Args:
        config: of the checkpoint.
        formats: native name → how the weight is stored, for every weight that may be quantized; None where nobody has
            seen the tensors, which stands for every format.
        recipe: under which it runs.
        model: what the calls say they belong to.
        num_mtp: stages of a classic draft that is to be used.
        num_dspark: stages of a DSpark draft that is to be used.
    """
    calls = _Calls(config, formats, recipe, model)
    calls.add(("plan_slots", "write_block_tables"), "step")
    blocks = list(zip(config.layer_kinds, config.ratios, config.hash_routed, strict=True))
    for layer, (kind, ratio, hash_routed) in enumerate(blocks):
        calls.block(f"layers.{layer}", kind, ratio, hash_routed)
    for stage in range(max(num_mtp, num_dspark)):
        calls.block(f"mtp.{stage}", LayerKind.SWA, 0, False)
    for stage in range(num_mtp):
        calls.mtp(f"mtp.{stage}")
    if num_dspark:
        calls.dspark()
    calls.head()
    return tuple(calls.found.values())


def checkpoint_calls(directory: str | os.PathLike[str], recipes: Iterable[Recipe]) -> tuple[OpCall, ...]:
    """Return every operation call of a checkpoint, its draft included, under some recipes.

    Args:
        directory: with config.json, and safetensors files whose headers are read; without any, every format a weight
            may have is assumed, and the draft that config.json names.
        recipes: which.

    Raises:
        CheckpointError: config.json or the headers are damaged or contradict each other.
    """
    folder = pathlib.Path(directory)
    config = load_config(folder)
    formats: Mapping[str, Format] | None = None
    num_mtp, num_dspark = (0, 1) if config.dspark is not None else (min(1, config.num_nextn_predict_layers), 0)
    if any(folder.glob("*.safetensors")):
        with CheckpointReader(folder) as reader:
            loader = WeightLoader(reader, config, dequantize=False, dtype=torch.bfloat16)
        formats, num_mtp, num_dspark = loader.formats, loader.num_mtp, loader.num_dspark
    return tuple(
        call
        for recipe in recipes
        for call in model_calls(config, formats, recipe, model=folder.name, num_mtp=num_mtp, num_dspark=num_dspark)
    )


class _Calls:
    """Collects; `found` has each operation, place and sizes once, in the order of the first."""

    def __init__(self, config: ModelConfig, formats: Mapping[str, Format] | None, recipe: Recipe, model: str) -> None:
        self.config = config
        self.formats = formats
        self.recipe = recipe
        self.model = model
        self.found: dict[tuple[str, str, tuple[tuple[str, int], ...]], OpCall] = {}

    def add(self, ops: str | Iterable[str], where: str, **dims: int) -> None:
        for op in [ops] if isinstance(ops, str) else ops:
            self.found.setdefault((op, where, tuple(dims.items())), OpCall(op, self.model, where, dims))

    def stored(self, names: Iterable[str]) -> Set[Format]:
        return set(Format) if self.formats is None else {self.formats[name] for name in names}

    def weight(self, kind: str, names: Iterable[str], where: str, **dims: int) -> Set[Format]:
        """Add the operation of a weight and return how it is stored."""
        stored = self.stored(names)
        self.add(dict.fromkeys(weight_ops(one, self.recipe)[kind] for one in Format if one in stored), where, **dims)
        return stored

    def quantized_input(self, where: str, stored: Set[Format], **dims: int) -> None:
        """Add the quantization of what is multiplied by weights stored like that."""
        ops = {weight_ops(one, self.recipe)["linear"] for one in stored}
        if "nvfp4_linear" in ops:
            self.add("quantize_nvfp4", where, **dims)
        if "fp8_linear" in ops:
            self.add("quantize_fp8_rows", where, **dims)

    def block(self, prefix: str, kind: LayerKind, ratio: int, hash_routed: bool) -> None:
        config = self.config
        streams = {"X": config.hc_mult, "D": config.hidden_size}
        # Before the first block and after the last one, of a draft too, the two are calls of their own.
        ops = ("hyper_connection_post_pre_norm", "hyper_connection_pre_norm", "hyper_connection_post")
        self.add(ops, "hc_attn, hc_ffn", **streams)
        read = self.attention(f"{prefix}.attn", kind, ratio)
        read |= self.moe(f"{prefix}.ffn", hash_routed)
        self.quantized_input("attn input, ffn input", read, K=config.hidden_size)

    def attention(self, prefix: str, kind: LayerKind, ratio: int) -> Set[Format]:
        """Add the calls of an attention layer; return how the weights that multiply its input are stored."""
        config = self.config
        hidden, latent, width = config.hidden_size, config.q_lora_rank, config.head_dim
        heads, rotary = config.num_attention_heads, config.qk_rope_head_dim
        groups, low_rank = config.o_groups, config.o_groups * config.o_lora_rank
        read = self.stack(prefix, {"wq_a": latent, "wkv": width}, hidden)
        self.add("write_latent", "attn latents", Q=latent, C=width, R=rotary)
        queries = {"wq_b": heads * width}
        if kind is LayerKind.CSA:
            queries["indexer.wq_b"] = config.index_n_heads * config.index_head_dim
        of_latent = self.stack(prefix, queries, latent)
        self.add("rotate_queries", "attn queries", H=heads, C=width, R=rotary)
        self.add(("copy_cache", "save_rows"), "window latents", width=width)
        if kind is not LayerKind.SWA:
            num_rows = (4 if kind is LayerKind.CSA else 2) * width
            if kind is LayerKind.CSA:
                num_rows += 4 * config.index_head_dim + config.index_n_heads
            self.add("linear", f"attn.compressed (ratio {ratio})", N=num_rows, K=hidden)
            self.compressor("attn.compressor", f" (ratio {ratio})", ratio, width, kind is LayerKind.CSA)
        if kind is LayerKind.CSA:
            self.indexer(ratio)
        window = {"H": heads, "C": width, "W": config.sliding_window}
        where = "window only" if kind is LayerKind.SWA else f"ratio {ratio}"
        chosen = {LayerKind.SWA: 0, LayerKind.CSA: config.index_topk}
        num_entries = chosen[kind] if kind in chosen else config.max_position_embeddings // ratio
        self.add("sparse_attention", f"attn ({where})", **window, J=num_entries)
        self.quantized_input("attn.wq_b input", of_latent, K=latent)
        sizes = {"G": groups, "N": config.o_lora_rank, "K": heads * width // groups}
        stored = self.weight("grouped", [f"{prefix}.wo_a"], "attn.wo_a", **sizes)
        self.quantized_input("attn.wo_a input", stored, G=groups, K=sizes["K"])
        stored = self.weight("linear", [f"{prefix}.wo_b"], "attn.wo_b", N=hidden, K=low_rank)
        self.quantized_input("attn.wo_b input", stored, K=low_rank)
        return read

    def stack(self, prefix: str, sizes: Mapping[str, int], num_columns: int) -> Set[Format]:
        """Add the calls of weights [N, K] of one input, by name; return how they are stored.

        They are one linear where one operation multiplies by all of them, and the blocks of FP8 weights do not lie
        across two of them; else one each. Where nobody has seen the tensors it may be either.
        """
        stored = {name: self.stored([f"{prefix}.{name}"]) for name in sizes}
        ops = {name: {weight_ops(one, self.recipe)["linear"] for one in found} for name, found in stored.items()}
        common = set.intersection(*ops.values())
        *before, _ = sizes.values()
        if any(size % fp8.BLOCK for size in before):
            common.discard("fp8_linear")
        where = ", ".join(f"attn.{name}" for name in sizes)
        order = [weight_ops(one, self.recipe)["linear"] for one in Format]
        num_rows = sum(sizes.values())
        for op in dict.fromkeys(op for op in order if op in common):  # NVFP4 matrices keep their tensor scales
            stacked_scales = {"scales": num_rows} if len(sizes) > 1 and op.startswith("nvfp4") else {}
            self.add(op, where, N=num_rows, K=num_columns, **stacked_scales)
        if len(sizes) > 1 and (self.formats is None or not common):
            for name, num_rows in sizes.items():
                self.weight("linear", [f"{prefix}.{name}"], f"attn.{name}", N=num_rows, K=num_columns)
        return set().union(*stored.values())

    def compressor(self, name: str, suffix: str, ratio: int, channels: int, overlap: bool) -> None:
        width = channels * (2 if overlap else 1)
        is_index = name == "attn.indexer.compressor"
        raw = "index compressor rows" if is_index else f"compressor rows{suffix}"
        # Where blocks do not overlap, a sequence continues at a page boundary without raw rows: none are saved.
        self.add(("copy_cache", "save_rows") if overlap else "copy_cache", raw, width=2 * width)
        if is_index:
            self.add("write_index_keys", name, ratio=ratio, D=channels)
        else:
            self.add("compress_kv", f"{name}{suffix}", ratio=ratio, coff=2 if overlap else 1, D=channels)

    def indexer(self, ratio: int) -> None:
        config = self.config
        heads, width = config.index_n_heads, config.index_head_dim
        self.compressor("attn.indexer.compressor", "", ratio, width, True)
        self.add("round_index_query", "attn.indexer queries", Hi=heads, K=width, R=config.qk_rope_head_dim)
        self.add("index_topk", "attn.indexer", Hi=heads, K=width, top_k=config.index_topk)

    def moe(self, prefix: str, hash_routed: bool) -> Set[Format]:
        """Add the calls of a mixture of experts; return how the shared weights that multiply its input are stored."""
        config = self.config
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        experts, active = config.n_routed_experts, config.num_experts_per_tok
        if hash_routed:
            self.add("route_experts", "ffn.gate (hash)", V=config.vocab_size, E=experts, D=hidden, A=active)
        else:
            self.add("route_experts", "ffn.gate", E=experts, D=hidden, A=active)
        names = (f"{prefix}.experts.{expert}.{part}" for expert in range(experts) for part in ("w1", "w2", "w3"))
        self.weight("experts", names, "ffn.experts", E=experts, A=active, D=hidden, F=inner)
        shared = f"{prefix}.shared_experts"
        both = [f"{shared}.w1", f"{shared}.w3"]
        read = self.weight("linear", both, "ffn.shared_experts.w1", N=inner, K=hidden)
        self.add("clamped_swiglu", "ffn.shared_experts", F=inner)
        stored = self.weight("linear", [f"{shared}.w2"], "ffn.shared_experts.w2", N=hidden, K=inner)
        self.quantized_input("ffn.w2 input", stored, K=inner)
        return read

    def head(self) -> None:
        config = self.config
        self.add("embed_streams", "embed", V=config.vocab_size, X=config.hc_mult, D=config.hidden_size)
        self.add("hyper_connection_head_norm", "hc_head", X=config.hc_mult, D=config.hidden_size)
        self.add("linear", "head", N=config.vocab_size, K=config.hidden_size)
        self.add(("sample", "penalize", "token_logprobs"), "logits", V=config.vocab_size)

    def mtp(self, prefix: str) -> None:
        hidden, num_streams = self.config.hidden_size, self.config.hc_mult
        self.add("embed_streams", "mtp embed", V=self.config.vocab_size, X=1, D=hidden)
        self.add("rms_norm", "mtp.enorm, mtp.main_norm, mtp.norm", K=hidden)
        self.add("rms_norm", "mtp.hnorm", X=num_streams, K=hidden)
        self.add("add_to_streams", "mtp input", X=num_streams, D=hidden)
        stored = self.weight("linear", [f"{prefix}.e_proj", f"{prefix}.h_proj"], "mtp.e_proj", N=hidden, K=hidden)
        self.quantized_input("attn input, ffn input", stored, K=hidden)

    def dspark(self) -> None:
        config, shape = self.config, self.config.dspark
        assert shape is not None
        hidden, width = config.hidden_size, len(shape.target_layer_ids) * config.hidden_size
        stored = self.weight("linear", ["mtp.0.main_proj"], "mtp.main_proj", N=hidden, K=width)
        self.quantized_input("mtp.main_proj input", stored, K=width)
        sizes = {"H": config.num_attention_heads, "C": config.head_dim, "W": config.sliding_window}
        self.add("mean_of_streams", "mtp taps", X=config.hc_mult, D=hidden)
        self.add("rms_norm", "mtp.enorm, mtp.main_norm, mtp.norm", K=hidden)
        self.add("write_latent", "mtp latents", C=config.head_dim, R=config.qk_rope_head_dim)
        self.weight("linear", ["mtp.0.attn.wkv"], "attn.wkv", N=config.head_dim, K=hidden)  # rows without queries
        self.add("hyper_connection_head", "hc_head", X=config.hc_mult, D=hidden)
        self.add("embed_streams", "mtp.markov_head.markov_w1", V=config.vocab_size, X=1, D=shape.markov_rank)
        self.add("sparse_attention", "attn (DSpark block)", **sizes, J=shape.block_size)
        self.add("linear", "mtp.markov_head.markov_w2", N=config.vocab_size, K=shape.markov_rank)
        self.add("linear", "mtp.confidence_head.proj", N=1, K=hidden + shape.markov_rank)


def pairs(calls: Iterable[OpCall]) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Yield (operation, sizes), as ops/dispatch.py takes them."""
    return ((call.op, call.dims) for call in calls)
