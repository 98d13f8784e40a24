# SPDX-License-Identifier: Apache-2.0
"""Operations on a GPU: megamoe bench OP… (or all).

For every operation, shape of models/*/shapes.py (Flash and Pro) and number of tokens: the result of a sample of
tokens is compared with the CPU reference first, and a wrong one is not timed; then kernel, baseline and the public
kernel of bench/public.py, where there is one, are timed in turn by bench/timing.py and set against the ceiling of
bench/roofline.py, whose rates are measured in the same run. The last line of standard output is one JSON document.

Exit codes: 0 all measured · 1 a kernel is wrong and was not timed, or not all was run · 2 no GPU here, or not the one
asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megamoe.bench import attention_baseline, cache_baselines, report, sampling_baselines, timing
from megamoe.bench.public import bound
from megamoe.bench.roofline import Ceiling, tensor_bytes
from megamoe.formats import fp8, nvfp4
from megamoe.formats.cache_rows import CachePool, RowFormat, decode_rows
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout, to_tiled_128x4
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.ops.containers import packed, unpacked
from megamoe.ops.hyper_connection import hyper_connection_pre
from megamoe.ops.index_topk import query_values
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots
from megamoe.ops.read_cache import row_views
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import RopeTable
from megamoe.verify.inputs import kernel_inputs
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.ops import DONE, NO_GPU, WRONG, NoGpuError, known_ops, open_gpu
from megamoe.verify.values import copied, mapped, moved

NUM_TOKENS = (1, 64, 4096)
MODELS = ("flash", "pro")
SAMPLE = 12
SETS_BYTES = 8 << 30
MATRIX = 8192


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a kernel is interleaved with.

    Attributes:
        name: named in every report.
        run: the same work by other means, from the operation's keyword arguments; it must not synchronize.
    """

    name: str
    run: Callable[..., Any]


@functools.cache
def _thresholds(device: torch.device) -> torch.Tensor:
    return torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)


def _eager_nvfp4(
    x: torch.Tensor, tensor_scale: torch.Tensor | None = None, scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
) -> Any:
    values = x.float().unflatten(-1, (-1, 16))
    amax = values.abs().amax(-1)
    g = amax.amax(-1).clamp(min=1e-12) / 2688.0 if tensor_scale is None else tensor_scale.expand(x.shape[:-1])
    scales = (amax / (6.0 * g[..., None])).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    quotient = values / (g[..., None] * scales.float())[..., None]
    codes = torch.bucketize(quotient.abs(), _thresholds(x.device)).to(torch.uint8) | (
        quotient.signbit().to(torch.uint8) << 3
    )
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    codes = pairs[..., 0] | (pairs[..., 1] << 4)
    scales = to_tiled_128x4(scales) if scale_layout is ScaleLayout.TILED_128X4 else scales
    return codes, scales, g if tensor_scale is None else tensor_scale.expand(x.shape[:-2])


def _eager_fp8_rows(x: torch.Tensor) -> Any:
    values = F.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2(values.abs().amax(-1).clamp(min=1e-4) / 448.0)))
    codes = (values / scale[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return codes[..., : x.shape[-1]], scale


def _eager_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    mixed = torch.einsum("tjk,tjd->tkd", comb, x.float())
    return (post[..., None] * y.float()[:, None] + mixed).to(x.dtype)


def _eager_rms_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _eager_rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor) -> Any:
    y = _eager_rms_norm(x, weight)
    return y, _eager_nvfp4(y)


def _eager_projection(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.float()
    flat = values.flatten(1)
    return values, (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)


def _eager_pre(x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> Any:
    values, m = _eager_projection(x, fn)
    pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + 1e-6
    post = 2.0 * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
    comb = (m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + 1e-6
    comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(2, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    return (pre[:, :, None] * values).sum(1).to(x.dtype), post, comb


def _two_kernels_pre_norm(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> Any:
    """Take the two kernels that one replaces."""
    u, post, comb = hyper_connection_pre(x, fn, base, scale)
    return rms_norm(u, weight), post, comb


def _eager_head(x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values, m = _eager_projection(x, fn)
    return ((torch.sigmoid(m * scale + base) + 1e-6)[:, :, None] * values).sum(1).to(x.dtype)


def _eager_post_pre_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    weight: torch.Tensor,
    **mixing: torch.Tensor,
) -> Any:
    streams = _eager_post(y, x, post, comb)
    u, *following = _eager_pre(streams, **mixing)
    return streams, _eager_rms_norm(u, weight), *following


def _eager_head_norm(x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None = None, **mixing: Any) -> Any:
    x = x if rows is None else x[rows.clamp(min=0)]
    y = _eager_rms_norm(_eager_head(x, **mixing), weight)
    return y if rows is None else y.masked_fill_((rows < 0)[:, None], 0.0)


def _eager_embed(table: torch.Tensor, token_ids: torch.Tensor, num_streams: int) -> torch.Tensor:
    rows = F.embedding(token_ids.clamp(min=0), table).masked_fill_((token_ids < 0)[:, None], 0.0)
    return rows[:, None].repeat(1, num_streams, 1)


def _eager_rope(x: torch.Tensor, pos: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Rotate by the complex product."""
    angles = pos.float()[:, None] * table.inv_freq
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    kept, turned = x.split((x.shape[-1] - table.rope_dim, table.rope_dim), -1)
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)))
    return torch.cat((kept, torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)), -1)


def _eager_rotate_queries(q: torch.Tensor, pos: torch.Tensor, table: RopeTable) -> torch.Tensor:
    return _eager_rope(_eager_rms_norm(q, None), pos, table)


@functools.cache
def _hadamard_matrix(width: int, device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    scaled: torch.Tensor = matrix * width**-0.5
    return scaled.bfloat16()


def _eager_round_index_query(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    head_scale: float,
    key_format: RowFormat,
    hadamard: bool,
) -> Any:
    """Take a product with the matrix, and MXFP4."""
    values = (_eager_rope(q, pos, table) @ _hadamard_matrix(q.shape[-1], q.device)).float().unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(values.abs().amax(-1).clamp(min=6.0 * 2.0**-126) / 6.0)))
    quotient = values / scale[..., None]
    codes = torch.bucketize(quotient.abs(), _thresholds(q.device)).to(torch.uint8)
    pairs = (codes | (quotient.signbit().to(torch.uint8) << 3)).flatten(-2).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), scale, head_weights * head_scale


def _eager_route(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None = None,
    expert_table: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> Any:
    scores = F.softplus((x @ gate.T).float()).sqrt()  # bf16 logits: cheaper than the operation allows
    if expert_table is not None:
        ids = expert_table[token_ids].long()
    else:
        ids = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * routed_scaling, ids


def _eager_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return (F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)).to(gate.dtype)


@functools.cache  # one per rotated weight; bench_case forgets them
def _bf16_of(codes: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor, form: str) -> torch.Tensor:
    """Return a weight in bf16, kept: the baseline multiplies, it does not decode."""
    return nvfp4.dequantize(unpacked([codes, scales.view(torch.uint8), tensor_scale], form), torch.bfloat16)


def _bf16(w: NvFp4Tensor) -> torch.Tensor:
    return _bf16_of(w.codes, w.scales, w.tensor_scale, packed(w)[1])


def _cublas(x: torch.Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return x @ _bf16(w).T


def _cublas_nvfp4(x: NvFp4Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return nvfp4.dequantize(x, torch.bfloat16) @ _bf16(w).T


@functools.cache  # one per rotated weight; bench_case forgets them
def _bf16_of_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return fp8.dequantize(Fp8BlockTensor(codes, scales), torch.bfloat16)


@functools.cache
def _bf16_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return fp8.dequantize(Fp8RowTensor(codes, scales), torch.bfloat16)


def _cublas_fp8(x: Fp8RowTensor, w: Fp8BlockTensor) -> torch.Tensor:
    return _bf16_rows(x.codes, x.scales) @ _bf16_of_fp8(w.codes, w.scales).T


def _eager_rounded(x: torch.Tensor) -> torch.Tensor:
    codes, scales, tensor_scale = _eager_nvfp4(x)
    return nvfp4.dequantize(NvFp4Tensor(codes, scales, tensor_scale, scale_per="row"), torch.bfloat16)


def _eager_experts(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: NvFp4Tensor,
    w3: NvFp4Tensor,
    w2: NvFp4Tensor,
    swiglu_limit: float,
    shared_weights: tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor] | None = None,
    rounded: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.bfloat16,
) -> torch.Tensor:
    """Multiply every token by every expert in bf16 and keep what was routed: no grouping, but no synchronization."""
    out, x = torch.zeros(x.shape, dtype=torch.float32, device=x.device), rounded(x)
    if shared_weights is not None:
        gate, up = (x @ _bf16(w).T for w in shared_weights[:2])
        out += rounded(_eager_swiglu(gate, up, swiglu_limit)) @ _bf16(shared_weights[2]).T
    gates, ups, downs = _bf16(w1), _bf16(w3), _bf16(w2)
    for expert in range(len(w1)):
        weight = (route_weights * (expert_ids == expert)).sum(-1, keepdim=True)
        gate = (x @ gates[expert].T).float().clamp(max=swiglu_limit)
        up = (x @ ups[expert].T).float().clamp(-swiglu_limit, swiglu_limit)
        out += rounded(F.silu(gate) * up * weight) @ downs[expert].T
    return out.bfloat16()


def _cublas_plain(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return x @ w.T  # bf16 where the operation may return fp32: cuBLAS writes less


def _eager_topk(
    q: torch.Tensor | MxFp4Tensor | Fp8RowTensor,
    head_weights: torch.Tensor,
    keys: CachePool,
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Score every entry that the tables have room for in bf16, torch.topk, sort: no order among equal ones."""
    data, scales = (one[block_tables.long()].flatten(0, 2) for one in (keys.data_rows, keys.scale_rows))
    values = decode_rows(data, scales, keys.row_format, keys.width).bfloat16()
    values = values.unflatten(0, (block_tables.shape[0], -1))  # [R, room, K]
    logits = query_values(q).bfloat16() @ values[requests.clamp(min=0).long()].mT  # [T, Hi, room]
    scores = (logits.float().clamp(min=0.0) * head_weights[..., None]).sum(1)
    is_hidden = torch.arange(scores.shape[1], device=scores.device) >= num_visible[:, None]
    best = scores.masked_fill(is_hidden, -torch.inf).topk(top_k, dim=1).indices
    last = torch.iinfo(torch.int32).max
    order = best.masked_fill(best >= num_visible[:, None], last).sort(dim=1).values
    return torch.where((order == last) | (requests[:, None] < 0), -1, order)


def _bmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)  # strided; a contiguous copy is left out


def _bmm_fp8(x: Fp8RowTensor, w: Fp8BlockTensor) -> torch.Tensor:
    return _bmm(_bf16_rows(x.codes, x.scales), _bf16_of_fp8(w.codes, w.scales))


def _bmm_weight_only(x: torch.Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return _bmm(x, _bf16(w))


def _bmm_nvfp4(x: NvFp4Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return _bmm(nvfp4.dequantize(x, torch.bfloat16), _bf16(w))


def _eager_copy(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    """Copy rows by index: -1 is the last row, for leaving it out would take a synchronization."""
    from_block, from_row = source_slots // source.rows_per_block, source_slots % source.rows_per_block
    to_block, to_row = target_slots // target.rows_per_block, target_slots % target.rows_per_block
    for read, written in zip(row_views(source), row_views(target), strict=True):
        if read.shape[-1]:
            written[to_block, to_row] = read[from_block, from_row]


def _eager_save(
    ring: CachePool, step: CachePool | None, target: CachePool, saves: torch.Tensor, block_tables: torch.Tensor
) -> None:
    """Copy every row from its ring, those of the step, too."""
    request, length, _, _, block = saves.unbind(1)
    row = torch.arange(target.rows_per_block, device=saves.device)
    position = (length[:, None] - target.rows_per_block + row).clamp(min=0)
    blocks = block_tables[request[:, None], position // ring.rows_per_block % block_tables.shape[1]]
    read = blocks.long() * ring.rows_per_block + position % ring.rows_per_block
    written = block.long()[:, None] * target.rows_per_block + row
    _eager_copy(ring, read.flatten(), target, written.flatten())


def _eager_slots(
    tokens: torch.Tensor, window: RowTables, kinds: tuple[EntryTables, ...], out: StepSlots, in_rings: bool
) -> None:
    ids, positions, requests, first_idx = tokens.unbind()
    for one, given in ((out.token_ids, ids), (out.positions, positions), (out.requests, requests)):
        one.copy_(given)
    out.first_idx.copy_(first_idx)
    _eager_ring(out.window_slots, out.window_kept, positions, requests, window, in_rings)
    for kind, slots in zip(kinds, out.entries, strict=True):
        _eager_ring(slots.state_slots, slots.state_kept, positions, requests, kind.state, in_rings)
        visible = (positions + 1) // kind.ratio
        slots.num_visible.copy_(visible)
        entry = torch.where(visible * kind.ratio == positions + 1, visible - 1, -1)
        slots.entry_slots.copy_(torch.where(entry >= 0, _eager_rows(entry, requests, kind.entries), -1))


def _eager_ring(
    slots: torch.Tensor,
    kept: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    tables: RowTables,
    in_rings: bool,
) -> None:
    """Leave out which rows of a long step a ring keeps."""
    in_ring = torch.where(positions >= 0, _eager_rows(positions, requests, tables), -1)
    slots.copy_(in_ring if in_rings else torch.arange(slots.shape[0], device=slots.device))
    kept.copy_(in_ring)


def _eager_rows(rows: torch.Tensor, requests: torch.Tensor, tables: RowTables) -> torch.Tensor:
    size = tables.rows_per_block
    return tables.block_tables[requests, rows // size % tables.block_tables.shape[1]] * size + rows % size


def _eager_tables(tables: torch.Tensor, changes: torch.Tensor) -> None:
    tables[changes[:, 0], changes[:, 1]] = changes[:, 2]  # nobody's changes go to the last row


BASELINES: dict[str, Baseline] = {
    "rms_norm": Baseline("torch F.rms_norm", _eager_rms_norm),
    "rms_norm_quantize_nvfp4": Baseline("torch eager", _eager_rms_norm_quantize),
    "quantize_nvfp4": Baseline("torch eager", _eager_nvfp4),
    "quantize_fp8_rows": Baseline("torch eager", _eager_fp8_rows),
    "clamped_swiglu": Baseline("torch eager", _eager_swiglu),
    "route_experts": Baseline("torch eager, bf16 logits", _eager_route),
    "nvfp4_linear": Baseline("cuBLAS bf16 after dequantizing x", _cublas_nvfp4),
    "nvfp4_weight_only_linear": Baseline("cuBLAS bf16", _cublas),
    "fp8_linear": Baseline("cuBLAS bf16, x and w dequantized before", _cublas_fp8),
    "nvfp4_experts": Baseline(
        "every expert through cuBLAS bf16, activations rounded",
        functools.partial(_eager_experts, rounded=_eager_rounded),
    ),
    "nvfp4_weight_only_experts": Baseline("every expert through cuBLAS bf16", _eager_experts),
    "linear": Baseline("cuBLAS bf16", _cublas_plain),
    "grouped_linear": Baseline("torch.bmm bf16", _bmm),
    "fp8_grouped_linear": Baseline("torch.bmm bf16, x and w dequantized before", _bmm_fp8),
    "nvfp4_grouped_linear": Baseline("torch.bmm bf16 after dequantizing x", _bmm_nvfp4),
    "nvfp4_weight_only_grouped_linear": Baseline("torch.bmm bf16", _bmm_weight_only),
    "hyper_connection_pre": Baseline("torch eager", _eager_pre),
    "hyper_connection_pre_norm": Baseline("hyper_connection_pre, rms_norm", _two_kernels_pre_norm),
    "hyper_connection_head": Baseline("torch eager", _eager_head),
    "hyper_connection_post": Baseline("torch eager", _eager_post),
    "hyper_connection_post_pre_norm": Baseline("torch eager", _eager_post_pre_norm),
    "hyper_connection_head_norm": Baseline("torch eager", _eager_head_norm),
    "embed_streams": Baseline("torch F.embedding, repeat", _eager_embed),
    "mean_of_streams": Baseline("torch mean", lambda x: x.mean(1)),
    "add_to_streams": Baseline("torch add", lambda x, e: x + e[:, None]),
    "rotate_queries": Baseline("torch F.rms_norm, complex product", _eager_rotate_queries),
    "round_index_query": Baseline("torch eager, bf16 matrix product", _eager_round_index_query),
    "plan_slots": Baseline("torch eager, nothing kept", _eager_slots),
    "write_block_tables": Baseline("torch index_put", _eager_tables),
    "copy_cache": Baseline("torch index, index_put", _eager_copy),
    "save_rows": Baseline("torch index, index_put, rings alone", _eager_save),
    "write_latent": Baseline("torch eager", cache_baselines.write_latent),
    "compress_kv": Baseline("torch eager, every token pools", cache_baselines.compress),
    "write_index_keys": Baseline("torch eager, every token pools", cache_baselines.write_index_keys),
    "index_topk": Baseline("torch eager, bf16 logits", _eager_topk),
    "sparse_attention": Baseline("torch eager, bf16 rows", attention_baseline.sparse_attention),
    "sample": Baseline("torch sort, cumsum", sampling_baselines.sample),
    "penalize": Baseline("torch index, index_put", sampling_baselines.penalize),
    "token_logprobs": Baseline("torch log_softmax, topk", sampling_baselines.token_logprobs),
}

WEIGHTS = ("w", "w1", "w3", "w2", "shared_weights")
"""Arguments that come from memory in every call of a model: rotated like tokens and pools. Gates and norms stay."""

FLOPS: dict[str, Callable[[Mapping[str, int], int], int]] = {
    "route_experts": lambda dims, tokens: 2 * tokens * dims["E"] * dims["D"],
    "nvfp4_linear": lambda dims, tokens: 2 * tokens * dims["N"] * dims["K"],
    "nvfp4_weight_only_linear": lambda dims, tokens: 2 * tokens * dims["N"] * dims["K"],
    "fp8_linear": lambda dims, tokens: 2 * tokens * dims["N"] * dims["K"],
    "nvfp4_experts": lambda dims, tokens: 6 * tokens * dims["A"] * dims["D"] * dims["F"],
    "nvfp4_weight_only_experts": lambda dims, tokens: 6 * tokens * dims["A"] * dims["D"] * dims["F"],
    "linear": lambda dims, tokens: 2 * tokens * dims["N"] * dims["K"],
    "grouped_linear": lambda dims, tokens: 2 * tokens * dims["G"] * dims["N"] * dims["K"],
    "fp8_grouped_linear": lambda dims, tokens: 2 * tokens * dims["G"] * dims["N"] * dims["K"],
    "nvfp4_grouped_linear": lambda dims, tokens: 2 * tokens * dims["G"] * dims["N"] * dims["K"],
    "nvfp4_weight_only_grouped_linear": lambda dims, tokens: 2 * tokens * dims["G"] * dims["N"] * dims["K"],
    "sparse_attention": lambda dims, tokens: 4 * tokens * dims["H"] * dims["C"] * (dims["W"] + dims["J"]),
}
"""Operation → products and sums that run on the matrix units; absent where memory alone counts."""


def matrix_tflops() -> float:
    """Return the rate of a large bf16 matrix product through cuBLAS."""
    a = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
    graph = timing.capture(lambda _: a @ b.T, 1, calls=4)
    times = timing.time_graphs({"cublas": graph}, 4, from_l2=False, rounds=7)
    return 2.0 * MATRIX**3 / times["cublas"].median_us / 1e6


def check_sample(call: OpCall, inputs: OpInputs, arguments: Arguments, got: Any, num_tokens: int) -> None:
    """Compare some tokens of a result with the CPU reference.

    Raises:
        AssertionError: one is wrong.
    """
    index = torch.unique(torch.linspace(0, num_tokens - 1, min(SAMPLE, num_tokens)).long())
    if inputs.together(arguments) > 1:
        index = torch.arange(num_tokens - inputs.together(arguments), num_tokens)
    sampled = {name: moved(value, "cpu") for name, value in inputs.only(arguments, index).items()}
    before = dict(sampled)
    for name in inputs.written:
        sampled[name] = copied(sampled[name], "cpu")
    want = inputs.part(inputs.run(sampled), sampled, torch.arange(len(index)))  # in the order of rows, as picked ones
    inputs.rule(call.op, moved(inputs.part(got, arguments, index), "cpu"), want, before)


def traffic(inputs: OpInputs, arguments: Arguments, result: Any) -> int:
    """Return the bytes that a call must move: inputs read once, outputs written once, of pools the rows it names."""
    whole = {name: value for name, value in arguments.items() if name not in inputs.partly}
    changed = [whole[name] for name in inputs.written if name in whole]
    return (
        tensor_bytes(whole)
        + tensor_bytes(tuple(changed))
        + inputs.partly_bytes(arguments)
        + tensor_bytes(inputs.returned(result))
    )


def bench_case(
    call: OpCall,
    inputs: OpInputs,
    num_tokens: int,
    copy_gbps: float,
    tflops: float,
    baseline: Baseline | None,
    device: str = "cuda",
) -> report.Row:
    """Check and time one case.

    Args:
        call, inputs, num_tokens: the case.
        copy_gbps, tflops: ceilings of this run.
        baseline: what the kernel is interleaved with.
        device: where the kernel runs; a test of this function itself has none.

    Raises:
        AssertionError: the kernel is wrong, so there is no time.
    """
    generator = torch.Generator(device).manual_seed(num_tokens)
    arguments = inputs.make(call.dims, num_tokens, generator)
    got = inputs.run({**arguments, **{name: copied(arguments[name], device) for name in inputs.written}})
    check_sample(call, inputs, arguments, got, num_tokens)
    turns = (*inputs.per_token, *inputs.written, *WEIGHTS)
    rotating = {name: one for name, one in arguments.items() if name in turns or isinstance(one, CachePool)}
    has_weights = not rotating.keys().isdisjoint(WEIGHTS)
    shared = {name: value for name, value in arguments.items() if name not in rotating}
    num_bytes, returned = traffic(inputs, arguments, got), tensor_bytes(inputs.returned(got))
    touched = {name: value for name, value in rotating.items() if name not in inputs.partly}
    rotated = tensor_bytes(touched) + inputs.partly_bytes(arguments) + returned
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    room = max(timing.MIN_SETS, SETS_BYTES // max(1, tensor_bytes(rotating) + returned))
    count = min(room, timing.num_sets(rotated, l2_bytes, SETS_BYTES, has_weights=has_weights))
    from_l2 = count * rotated < 2 * l2_bytes
    copies = ({name: mapped(one, torch.clone) for name, one in rotating.items()} for _ in range(count - 1))
    sets = [{**one, **shared} for one in (rotating, *copies)]
    public_name, public = bound(call.op, sets, got)
    del got
    calls = max(count, timing.CALLS if rotated < (64 << 20) else count)
    graphs = {"kernel": timing.capture(lambda index: inputs.door(**sets[index]), count, calls)}
    if baseline is not None:
        graphs["baseline"] = timing.capture(lambda index: baseline.run(**sets[index]), count, calls)
    if not isinstance(public, str):
        graphs["public"] = timing.capture(lambda index: public[index](), count, calls)
    times = timing.time_graphs(graphs, calls, from_l2)
    for cache in (_bf16_of, _bf16_of_fp8, _bf16_rows):
        cache.cache_clear()
    flops = FLOPS[call.op](call.dims, num_tokens) if call.op in FLOPS else 0
    ceiling = Ceiling(num_bytes, flops, copy_gbps, tflops)
    return report.Row(
        call.op,
        str(call),
        num_tokens,
        ceiling.us,
        num_bytes,
        flops,
        times["kernel"],
        baseline.name if baseline else None,
        times.get("baseline"),
        public_name,
        times.get("public"),
        public if isinstance(public, str) else "",
    )


def plan(names: Sequence[str], num_tokens: Sequence[int], models: Sequence[str]) -> list[tuple[OpCall, OpInputs, int]]:
    """Return what to measure, in order: the first number of tokens for all operations, then the next."""
    return [
        (call, inputs, tokens)
        for tokens in num_tokens
        for op in names
        for call in op_shapes(op, models)
        for inputs in kernel_inputs(op)
        if inputs.timed
    ]


def run(
    names: Sequence[str],
    *,
    num_tokens: Sequence[int] = NUM_TOKENS,
    models: Sequence[str] = MODELS,
    arch: str | None = None,
    pack: pathlib.Path | None = None,
    as_json: bool = False,
    csv_path: pathlib.Path | None = None,
    commit: str | None = None,
    seconds: float = math.inf,
) -> int:
    """Measure, print, and return the exit code. With as_json only the JSON document is on standard output."""
    try:
        ops = known_ops(names)
        open_gpu(arch, pack)
    except (NoGpuError, ValueError) as error:
        print(f"megamoe: error: bench: {error}", file=sys.stderr)
        return NO_GPU
    begin = time.perf_counter()
    copy_gbps, tflops = timing.copy_gbps(), matrix_tflops()
    log = sys.stderr if as_json else sys.stdout
    print(f"ceilings of this run: copy {copy_gbps:.0f} GB/s, bf16 matrix product {tflops:.0f} TFLOP/s", file=log)
    print(report.HEADER, file=log, flush=True)
    rows: list[report.Row] = []
    wrong: list[str] = []
    planned = plan(ops, num_tokens, models)
    for call, inputs, tokens in planned:
        if time.perf_counter() - begin > seconds:
            break
        try:
            row = bench_case(call, inputs, tokens, copy_gbps, tflops, BASELINES.get(call.op))
        except AssertionError as error:
            wrong.append(f"{call.op} {call} T={tokens}: {error}")
            print(f"WRONG, not timed: {wrong[-1]}", file=log, flush=True)
            continue
        rows.append(row)
        print(report.table_line(row), file=log, flush=True)
        torch.cuda.empty_cache()  # the graphs of this case are gone; their memory may be wanted in other sizes
    not_run = len(planned) - len(rows) - len(wrong)
    if not_run:
        print(f"{not_run} cases were not run: --seconds {seconds:g} had passed", file=log)
    if csv_path is not None:
        csv_path.write_text(report.as_csv(rows), encoding="utf-8")
    ceilings = {"copy_gbps": round(copy_gbps, 1), "bf16_tflops": round(tflops, 1)}
    document = report.as_document(rows, report.machine(commit), ceilings)
    print(json.dumps({**document, "wrong": wrong, "not_run": not_run}), flush=True)
    return WRONG if wrong or not_run else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m megamoe.bench.ops`: the same as megamoe bench OP…"""
    parser = argparse.ArgumentParser(prog="megamoe.bench.ops", description="Time kernels against their ceilings.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations; none or all for every one with a kernel")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(NUM_TOKENS), help="numbers of tokens")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="whose shapes: tiny, flash, pro")
    parser.add_argument("--arch", help="refuse to run on another GPU: sm90a, sm100a or sm103a")
    parser.add_argument("--pack", type=pathlib.Path, help="kernel pack to load from")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone on standard output")
    parser.add_argument("--csv", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further case after so many")
    parser.add_argument("--commit", help="recorded in the document; by default git is asked")
    given = parser.parse_args(arguments)
    return run(
        given.ops,
        num_tokens=given.tokens,
        models=given.models,
        arch=given.arch,
        pack=given.pack,
        as_json=given.json,
        csv_path=given.csv,
        commit=given.commit,
        seconds=given.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
