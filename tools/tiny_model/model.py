# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 for training at a small size: full sequences, no cache, parameters named as in DeepSeek's checkpoints.

The module tree reproduces the checkpoint's tensor names, so `state_dict()` is the checkpoint up to dtypes. The
mathematics is that of the released models: hyper-connections with a Sinkhorn-projected mix, a 128-token window in
every layer, overlapping (ratio 4) and plain (ratio 128) key-value compression, the indexer's top-k for ratio 4, one
softmax with a sink per head, inverse rotation of the output, grouped low-rank output projection, sqrt-softplus
routing, hash-routed first layers, clamped SwiGLU, and one multi-token-prediction (MTP) layer.

Layout: windowed attention runs over chunks of `sliding_window` tokens with the keys of the previous and the same chunk,
so sequences are multiples of the window.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the computation needs."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: dict[str, float | str]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read config.json; keys this dataclass does not name are ignored."""
        raw = json.loads(path.read_text())
        raw["compress_ratios"] = tuple(raw["compress_ratios"])
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


@dataclass
class Mode:
    """How one forward pass runs, and what it collects on the way.

    Attributes:
        select: which compressed entries a ratio-4 layer attends to: "all", "topk" (the indexer's), "random", "none".
            "none" drops the entries of ratio-128 layers too.
        index_queries: number of queries per sequence on which the indexer's loss is computed; 0 switches it off.
        quantized: fake quantisation of linears and of key-value rows.
        index_losses: one term per ratio-4 layer.
        loads: per routed layer the number of tokens each expert received.
    """

    select: str = "all"
    index_queries: int = 0
    quantized: bool = False
    index_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """w * x / rms(x) over the last dimension, in fp32."""
    x = x.float()
    if weight is not None:
        return F.rms_norm(x, (x.shape[-1],), weight.float(), eps)
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32, under autocast too: routing and hyper-connections are fp32 in the released models."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


def rope_frequencies(config: Config, ratio: int) -> Tensor:
    """Rotation frequencies of a layer: plain for ratio 0, YaRN on the compressed base otherwise. [R/2]"""
    num_rope = config.qk_rope_head_dim
    base = config.compress_rope_theta if ratio else config.rope_theta
    freqs = base ** (-torch.arange(0, num_rope, 2, dtype=torch.float32) / num_rope)
    if not ratio:
        return freqs
    scaling = config.rope_scaling

    def correction(rotations: float) -> float:
        original = float(scaling["original_max_position_embeddings"])
        return num_rope * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(float(scaling["beta_fast"]))), 0)
    high = min(math.ceil(correction(float(scaling["beta_slow"]))), num_rope - 1)
    ramp = ((torch.arange(num_rope // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs / float(scaling["factor"]) * ramp + freqs * (1 - ramp)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of the trailing channels.

    Args:
        x: [..., C].
        cos, sin: broadcast against [..., R/2]; negate sin for the inverse rotation.
    """
    num_rope = 2 * cos.shape[-1]
    plain, pairs = x[..., :-num_rope], x[..., -num_rope:].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([plain, turned.to(plain.dtype)], -1)


def query_heads(q: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Unweighted RMS norm per head, then rotation. q [B, T, H, C]; cos, sin [T, 1, R/2]."""
    q = q.float()
    return rope(q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps), cos, sin)


def unrotate_heads(out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Inverse rotation of attention outputs. out [B, T, H, C]; cos, sin [T, 1, R/2]."""
    return rope(out, cos, -sin)


def collapse_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """Weighted sum of the streams: [N, n, D], [N, n] -> [N, D]."""
    out = pre[:, 0, None] * streams[:, 0]
    for j in range(1, streams.shape[1]):
        out = out + pre[:, j, None] * streams[:, j]
    return out


def mix_streams(streams: Tensor, mix: Tensor, post: Tensor, y: Tensor) -> Tensor:
    """X'_k = post_k y + sum_j C_jk X_j for streams [N, n, D], mix [j, k, N], post [N, n], y [N, D]."""
    n = streams.shape[1]
    rows = []
    for k in range(n):
        row = post[:, k, None] * y
        for j in range(n):
            row = row + mix[j, k, :, None] * streams[:, j]
        rows.append(row)
    return torch.stack(rows, 1)


def compile_pointwise() -> None:
    """Fuse the memory-bound pieces with torch.compile; the meaning stays the same."""
    torch._dynamo.config.recompile_limit = 64
    for name in ("query_heads", "unrotate_heads", "collapse_streams", "mix_streams", "sinkhorn"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)


class Linear(nn.Module):
    """y = x W^T without bias. `nvfp4` marks the linears whose exported form is NVFP4."""

    def __init__(self, num_in: int, num_out: int, *, nvfp4: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) * gain * num_in**-0.5)
        self.nvfp4 = nvfp4

    def forward(self, x: Tensor, mode: Mode, x_quantized: bool = False, amax: Tensor | None = None) -> Tensor:
        """Multiply; with mode.quantized and nvfp4 both sides take the NVFP4 round trip first."""
        weight = self.weight
        if mode.quantized and self.nvfp4:
            weight = quantize.straight_through(weight, quantize.quantize_weight(weight, amax))
            if not x_quantized:
                x = quantize_input(x, mode)
        return F.linear(x, weight)


def quantize_input(x: Tensor, mode: Mode) -> Tensor:
    """NVFP4 round trip of a linear's input when the mode asks for it."""
    return quantize.straight_through(x, quantize.quantize_activation(x.float()).to(x.dtype)) if mode.quantized else x


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class Compressor(nn.Module):
    """Pool blocks of `ratio` tokens into one entry by a softmax per channel; ratio 4 also reads the block before."""

    def __init__(self, config: Config, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.width, self.overlap = ratio, width, ratio == 4
        columns = width * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(ratio, columns))
        self.wkv = Linear(config.hidden_size, columns)
        self.wgate = Linear(config.hidden_size, columns, gain=0.5)
        self.norm = Norm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> Tensor:
        """Compress [B, T, D] (T a multiple of the ratio) into rotated entries [B, T / ratio, width]."""
        values = self.wkv(x, mode).float().unflatten(1, (-1, self.ratio))  # [B, n, r, columns]
        scores = self.wgate(x, mode).float().unflatten(1, (-1, self.ratio)) + self.ape
        if self.overlap:
            width = self.width
            values = torch.cat([F.pad(values[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)), values[..., width:]], 2)
            before = F.pad(scores[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=-math.inf)
            scores = torch.cat([before, scores[..., width:]], 2)
        pooled = (values * scores.softmax(2)).sum(2)  # [B, n, width]
        return rope(self.norm(pooled), cos[:: self.ratio], sin[:: self.ratio])


class Indexer(nn.Module):
    """Score compressed entries per query; the top scores decide what a ratio-4 layer attends to."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.num_heads * self.width, nvfp4=True)
        self.weights_proj = Linear(config.hidden_size, self.num_heads)
        self.compressor = Compressor(config, 4, self.width)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> Tensor:
        """Index keys [B, T / 4, width]."""
        return self.compressor(x, cos, sin, mode)

    def scores(self, x: Tensor, qr: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> Tensor:
        """Scores [B, Q, n] of the given queries; cos and sin [Q, R/2] or [B, Q, R/2] are theirs."""
        q = self.wq_b(qr, mode).float().unflatten(-1, (self.num_heads, self.width))  # [B, Q, Hi, width]
        q = rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2))
        head_weights = self.weights_proj(x, mode).float() * (self.width * self.num_heads) ** -0.5  # [B, Q, Hi]
        dots = torch.bmm(q.flatten(1, 2), keys.float().transpose(1, 2)).relu()  # [B, Q*Hi, n]
        dots = dots.unflatten(1, (-1, self.num_heads)).flatten(0, 1)  # [B*Q, Hi, n]
        return torch.bmm(head_weights.flatten(0, 1).unsqueeze(1), dots).view(*q.shape[:2], -1)


def index_loss(scores: Tensor, mass: Tensor, allowed: Tensor) -> Tensor:
    """Mean KL(attention mass || softmax(scores)) over queries with at least two allowed entries. All [B, Q, n]."""
    target = mass.masked_fill(~allowed, 0.0)
    total = target.sum(-1, keepdim=True)
    target = target / total.clamp(min=1e-20)
    log_probs = scores.masked_fill(~allowed, -1e30).log_softmax(-1)
    loss = (target * (target.clamp(min=1e-20).log() - log_probs)).masked_fill(~allowed, 0.0).sum(-1)
    valid = (allowed.sum(-1) >= 2) & (total.squeeze(-1) > 1e-12)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


class Attention(nn.Module):
    """One latent per token as key and value of every head; window and compressed entries under one softmax."""

    def __init__(self, config: Config, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        num_heads, width, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        self.attn_sink = nn.Parameter(torch.zeros(num_heads))
        self.wq_a = Linear(hidden, config.q_lora_rank, nvfp4=True)
        self.q_norm = Norm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, num_heads * width, nvfp4=True)
        self.wkv = Linear(hidden, width, nvfp4=True)
        self.kv_norm = Norm(width, config.rms_norm_eps)
        self.wo_a = Linear(num_heads * width // config.o_groups, config.o_groups * config.o_lora_rank, nvfp4=True)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, hidden, nvfp4=True, gain=0.3)
        if ratio:
            self.compressor = Compressor(config, ratio, width)
        if ratio == 4:
            self.indexer = Indexer(config)
        self.register_buffer("freqs", rope_frequencies(config, ratio), persistent=False)

    def allowed_entries(
        self, x: Tensor, qr: Tensor, num_entries: int, tables: tuple[Tensor, Tensor], mode: Mode
    ) -> tuple[Tensor, Tensor | None]:
        """Which compressed entries each query may attend to ([B or 1, T, n] bool) and the indexer's scores or None."""
        num_tokens = x.shape[1]
        position = torch.arange(num_tokens, device=x.device)
        entry = torch.arange(num_entries, device=x.device)
        visible = (entry[None] < ((position + 1) // self.ratio)[:, None]).unsqueeze(0)  # [1, T, n]
        if mode.select == "none":
            return torch.zeros_like(visible), None
        if self.ratio != 4 or mode.select == "all" or num_entries <= self.config.index_topk:
            return visible, None
        with torch.no_grad():
            if mode.select == "random":
                scores = torch.rand(x.shape[0], num_tokens, num_entries, device=x.device)
            else:
                keys = self.indexer.keys(x, *tables, mode)
                pieces = []
                for start in range(0, num_tokens, 256):  # bounds the memory of the per-head dot products
                    piece = slice(start, start + 256)
                    rows = (tables[0][piece], tables[1][piece])
                    pieces.append(self.indexer.scores(x[:, piece], qr[:, piece], keys, *rows, mode))
                scores = torch.cat(pieces, 1)
            scores = scores.masked_fill(~visible, -math.inf)
            chosen = scores.topk(self.config.index_topk, -1).indices
            selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return visible & selected, scores

    def forward(self, x: Tensor, mode: Mode) -> Tensor:
        """Attend within [B, T, D]; T is a multiple of the window (and of the ratio)."""
        config = self.config
        num_batch, num_tokens, _ = x.shape
        num_heads, width, window = config.num_attention_heads, config.head_dim, config.sliding_window
        num_chunks = num_tokens // window
        angles = torch.arange(num_tokens, device=x.device).float()[:, None] * self.freqs
        cos, sin = angles.cos(), angles.sin()  # [T, R/2]

        x_in = quantize_input(x, mode)
        qr = self.q_norm(self.wq_a(x_in, mode, x_quantized=True))
        q = self.wq_b(qr, mode).unflatten(-1, (num_heads, width))  # [B, T, H, C]
        q = query_heads(q, cos[:, None], sin[:, None], config.rms_norm_eps)
        kv = rope(self.kv_norm(self.wkv(x_in, mode, x_quantized=True)), cos, sin)  # [B, T, C]
        if mode.quantized:
            kv = quantize.straight_through(kv, quantize.quantize_kv_row(kv, config.qk_rope_head_dim))

        chunks = kv.unflatten(1, (num_chunks, window))
        keys = torch.cat([F.pad(chunks[:, :-1], (0, 0, 0, 0, 1, 0)), chunks], 2).flatten(0, 1)  # [B*c, 2W, C]
        q_chunks = q.reshape(num_batch * num_chunks, window * num_heads, width)
        bias = window_bias(num_chunks, window, num_heads, x.device)  # [c, W*H, 2W]
        bias = bias.expand(num_batch, -1, -1, -1).reshape(num_batch * num_chunks, window * num_heads, 2 * window)
        scale = width**-0.5
        parts = [torch.baddbmm(bias.to(q.dtype), q_chunks, keys.to(q.dtype).transpose(1, 2), alpha=scale)]
        parts[0] = parts[0].view(num_batch, num_tokens, num_heads, 2 * window)
        parts.append(self.attn_sink.to(q.dtype).view(1, 1, -1, 1).expand(num_batch, num_tokens, -1, 1))
        entries = None
        if self.ratio and mode.select != "none":
            entries = self.compressor(x, cos, sin, mode)  # [B, n, C]
            if mode.quantized:
                entries = quantize.straight_through(entries, quantize.quantize_kv_row(entries, config.qk_rope_head_dim))
            allowed, _ = self.allowed_entries(x, qr, entries.shape[1], (cos, sin), mode)
            entry_bias = torch.zeros(allowed.shape, dtype=q.dtype, device=x.device).masked_fill_(~allowed, -math.inf)
            entry_bias = entry_bias.unsqueeze(2).expand(num_batch, -1, num_heads, -1).flatten(1, 2)
            logits = torch.baddbmm(entry_bias, q.flatten(1, 2), entries.to(q.dtype).transpose(1, 2), alpha=scale)
            parts.append(logits.view(num_batch, num_tokens, num_heads, -1))
        probs = torch.cat(parts, -1).softmax(-1)  # [B, T, H, 2W + 1 + n]
        near = probs[..., : 2 * window].reshape(num_batch * num_chunks, window * num_heads, 2 * window)
        out = torch.bmm(near, keys.to(near.dtype)).view(num_batch, num_tokens * num_heads, width)
        if entries is not None:
            far = probs[..., 2 * window + 1 :]
            out = torch.baddbmm(out, far.flatten(1, 2), entries.to(far.dtype))
            if self.ratio == 4 and mode.index_queries:
                self.add_index_loss(x, qr, far, allowed, (cos, sin), mode)
        out = unrotate_heads(out.view(num_batch, num_tokens, num_heads, width), cos[:, None], sin[:, None])

        grouped = out.reshape(num_batch * num_tokens, config.o_groups, -1)  # [B*T, G, H/G*C]
        weight = self.wo_a.weight
        if mode.quantized:
            weight = quantize.straight_through(weight, quantize.quantize_weight(weight))
            grouped = quantize_input(grouped, mode)
        weight = weight.view(config.o_groups, config.o_lora_rank, -1).to(grouped.dtype)
        low = torch.cat([F.linear(grouped[:, g], weight[g]) for g in range(config.o_groups)], -1)
        return self.wo_b(low, mode).view(num_batch, num_tokens, -1)

    def add_index_loss(
        self, x: Tensor, qr: Tensor, far: Tensor, allowed: Tensor, tables: tuple[Tensor, Tensor], mode: Mode
    ) -> None:
        """Append the indexer's KL term, on random query positions, with everything but the indexer detached."""
        x, qr, far = x.detach(), qr.detach(), far.detach()
        position = torch.randperm(x.shape[1], device=x.device)[: mode.index_queries]
        keys = self.indexer.keys(x, *tables, mode)
        rows = (tables[0][position], tables[1][position])
        scores = self.indexer.scores(x[:, position], qr[:, position], keys, *rows, mode)
        mass = far[:, position].float().sum(2)  # [B, Q, n]
        mode.index_losses.append(index_loss(scores, mass, allowed[:, position].expand_as(mass)))


_WINDOW_BIAS: dict[tuple[int, int, int, str], Tensor] = {}


def window_bias(num_chunks: int, window: int, num_heads: int, device: torch.device) -> Tensor:
    """0 / -inf for queries of a chunk against the keys of the previous and the same chunk. [c, W*H, 2W]"""
    key = (num_chunks, window, num_heads, str(device))
    if key not in _WINDOW_BIAS:
        query = torch.arange(window)[:, None]
        offset = torch.arange(2 * window)[None]
        seen = ((offset > query) & (offset <= query + window)).expand(num_chunks, -1, -1).clone()
        seen[0, :, :window] = False
        bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        _WINDOW_BIAS[key] = bias.repeat_interleave(num_heads, 1).to(device)
    return _WINDOW_BIAS[key]


class Expert(nn.Module):
    """Clamped SwiGLU: w2(silu(min(w1 x, 10)) * clamp(w3 x, -10, 10))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(hidden, inner, nvfp4=True)
        self.w2 = Linear(inner, hidden, nvfp4=True, gain=0.3)
        self.w3 = Linear(hidden, inner, nvfp4=True)

    def forward(self, x: Tensor, route_weight: Tensor | None, mode: Mode) -> Tensor:
        """x [T, D], already quantised where the mode asks for it; the route weight is applied before w2."""
        amax = None
        if mode.quantized:
            with torch.no_grad():
                amax = torch.maximum(self.w1.weight.bfloat16().abs().amax(), self.w3.weight.bfloat16().abs().amax())
                amax = amax.float()
        gate = self.w1(x, mode, x_quantized=True, amax=amax).clamp(max=self.limit)
        up = self.w3(x, mode, x_quantized=True, amax=amax).clamp(-self.limit, self.limit)
        inner = F.silu(gate) * up
        if route_weight is not None:
            inner = inner * route_weight.to(inner.dtype)
        return self.w2(inner, mode)


class Gate(nn.Module):
    """Router: sqrt(softplus) scores; a bias steers the selection only; hash layers look the experts up by token id."""

    def __init__(self, config: Config, hashed: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.randn(config.n_routed_experts, config.hidden_size) * 0.5 * config.hidden_size**-0.5
        )
        if hashed:
            generator = torch.Generator().manual_seed(20)
            noise = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            self.register_buffer("tid2eid", noise.topk(config.num_experts_per_tok, -1).indices)
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self.hashed = hashed

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert ids [T, A] and weights [T, A] for x [T, D]."""
        scores = F.softplus(linear_fp32(x, self.weight)).sqrt()
        if self.hashed:
            chosen = self.tid2eid[ids]
        else:
            chosen = (scores.detach() + self.bias).topk(self.config.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor


class MoE(nn.Module):
    """Routed experts plus one shared expert."""

    def __init__(self, config: Config, hashed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hashed)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))
        self.shared_experts = Expert(config)

    def forward(self, x: Tensor, ids: Tensor, mode: Mode, name: str) -> Tensor:
        """x [B, T, D] -> [B, T, D]; tokens are sorted by expert, each expert multiplies only its own."""
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat, ids.flatten())
        num_active = chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)
        loads = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        if not self.gate.hashed:
            mode.loads[name] = loads
        flat_in = quantize_input(flat, mode)
        token = order // num_active
        sorted_x = flat_in[token]
        sorted_weight = weights.flatten()[order].unsqueeze(-1)
        outs, start = [], 0
        for expert, count in zip(self.experts, loads.tolist(), strict=True):
            piece = slice(start, start + count)
            outs.append(expert(sorted_x[piece], sorted_weight[piece], mode))
            start += count
        shared = self.shared_experts(flat_in, None, mode)
        return shared.index_add(0, token, torch.cat(outs).to(shared.dtype)).view_as(x)


def sinkhorn(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    """Softmax over k, then alternating normalisation starting and ending with columns. logits [j, k, N]."""
    mix = logits.softmax(1) + eps
    mix = mix / (mix.sum(0, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        mix = mix / (mix.sum(1, keepdim=True) + eps)
        mix = mix / (mix.sum(0, keepdim=True) + eps)
    return mix


class Block(nn.Module):
    """Attention and MoE, each wrapped by hyper-connections over the residual streams."""

    def __init__(self, config: Config, layer: int, name: str) -> None:
        super().__init__()
        self.config, self.name = config, name
        ratio = config.compress_ratios[layer]
        self.attn = Attention(config, ratio)
        self.ffn = MoE(config, layer < config.num_hash_layers)
        self.attn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        n = config.hc_mult
        for index, part in enumerate(("attn", "ffn")):
            # Start near a plain residual: one stream read a little more, post 1, mix close to the identity.
            pre = torch.full((n,), math.log(0.15 / 0.85))
            pre[(2 * layer + index) % n] = math.log(0.55 / 0.45)
            base = torch.cat([pre, torch.zeros(n), 3.5 * torch.eye(n).flatten()])
            self.register_parameter(
                f"hc_{part}_fn", nn.Parameter(torch.randn((2 + n) * n, n * config.hidden_size) * 0.02)
            )
            self.register_parameter(f"hc_{part}_base", nn.Parameter(base))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.full((3,), 0.1)))

    def hyper(self, streams: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """Collapsed input [N, D], post weights [N, n] and mix [j, k, N] for streams [N, n, D]."""
        config, n = self.config, self.config.hc_mult
        fn, base, scale = (getattr(self, f"hc_{part}_{leaf}") for leaf in ("fn", "base", "scale"))
        flat = streams.flatten(1).float()
        m = linear_fp32(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)  # [N, 24]
        pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + config.hc_eps
        post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = (m[:, 2 * n :] * scale[2] + base[2 * n :]).t().contiguous().unflatten(0, (n, n))  # [j, k, N]
        mix = sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)
        return collapse_streams(streams.float(), pre), post, mix

    def forward(self, streams: Tensor, ids: Tensor, mode: Mode) -> Tensor:
        """Run the block on streams [B, T, n, D]."""
        num_batch, num_tokens = streams.shape[:2]
        flat = streams.flatten(0, 1)
        for part in ("attn", "ffn"):
            collapsed, post, mix = self.hyper(flat, part)
            if part == "attn":
                x = self.attn_norm(collapsed).view(num_batch, num_tokens, -1)
                y = self.attn(x, mode)
            else:
                x = self.ffn_norm(collapsed).view(num_batch, num_tokens, -1)
                y = self.ffn(x, ids, mode, self.name)
            flat = mix_streams(flat.float(), mix, post, y.flatten(0, 1).float())
        return flat.view_as(streams)


class Head(nn.Module):
    """Mixin: collapse the streams with `hc_head_*`, then the final norm."""

    def add_head(self, config: Config) -> None:
        """Create the parameters on this module."""
        n = config.hc_mult
        self.hc_head_fn = nn.Parameter(torch.randn(n, n * config.hidden_size) * 0.02)
        self.hc_head_base = nn.Parameter(torch.full((n,), math.log(0.25 / 0.75)))
        self.hc_head_scale = nn.Parameter(torch.full((1,), 0.1))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def collapse(self, streams: Tensor, config: Config) -> Tensor:
        """[..., n, D] -> normed [..., D]."""
        flat = streams.flatten(-2).float()
        m = linear_fp32(flat, self.hc_head_fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        pre = torch.sigmoid(m * self.hc_head_scale + self.hc_head_base) + config.hc_eps
        return self.norm((pre.unsqueeze(-1) * streams.float()).sum(-2))


class Mtp(Block, Head):
    """Predict token i+2 from the streams at i and the embedding of token i+1."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.num_hidden_layers, "mtp.0")
        self.add_head(config)
        self.enorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.e_proj = Linear(config.hidden_size, config.hidden_size, nvfp4=True)
        self.h_proj = Linear(config.hidden_size, config.hidden_size, nvfp4=True)

    def hidden(self, streams: Tensor, next_embed: Tensor, next_ids: Tensor, mode: Mode) -> Tensor:
        """Normed hidden state [B, T, D] whose logits predict the token after `next_ids`."""
        e = self.e_proj(self.enorm(next_embed), mode)
        x = e.unsqueeze(2) + self.h_proj(self.hnorm(streams), mode)
        return self.collapse(self.forward(x.float(), next_ids, mode), self.config)


class Table(nn.Module):
    """A weight [V, D] used as embedding or as output head."""

    def __init__(self, num_rows: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width) * std)


class Model(Head):
    """The whole network. `state_dict()` has the checkpoint's tensor names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = Table(config.vocab_size, config.hidden_size, 0.1)
        self.layers = nn.ModuleList(Block(config, i, f"layers.{i}") for i in range(config.num_hidden_layers))
        self.add_head(config)
        self.head = Table(config.vocab_size, config.hidden_size, 0.02)
        self.mtp = nn.ModuleList([Mtp(config)])

    def streams(self, ids: Tensor, mode: Mode) -> Tensor:
        """Residual streams [B, T, n, D] after the last layer, for ids [B, T] with T a multiple of the window."""
        x = F.embedding(ids, self.embed.weight).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for layer in self.layers:
            x = layer(x, ids, mode)
        return x

    def logits(self, ids: Tensor, mode: Mode) -> Tensor:
        """Next-token logits [B, T, V] for any T: pads with token 0 at the end, which causality makes harmless."""
        num_tokens = ids.shape[1]
        padded = F.pad(ids, (0, -num_tokens % self.config.sliding_window))
        hidden = self.collapse(self.streams(padded, mode), self.config)[:, :num_tokens]
        return F.linear(hidden, self.head.weight)

    def losses(self, rows: Tensor, mode: Mode, with_mtp: bool) -> tuple[Tensor, Tensor | None]:
        """Mean next-token loss and, if asked, the MTP loss, for rows [B, T + 2]."""
        ids, labels, labels_after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        streams = self.streams(ids, mode)
        hidden = self.collapse(streams, self.config)
        loss = F.cross_entropy(F.linear(hidden, self.head.weight).flatten(0, 1).float(), labels.flatten())
        if not with_mtp:
            return loss, None
        next_embed = F.embedding(labels, self.embed.weight)
        hidden = self.mtp[0].hidden(streams, next_embed, labels, mode)
        logits = F.linear(hidden, self.head.weight).flatten(0, 1).float()
        return loss, F.cross_entropy(logits, labels_after.flatten())
