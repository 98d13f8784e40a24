# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation with straight-through gradients: NVFP4 for linears, FP8 rows for keys and values.

NVFP4: E2M1 codes, one E4M3 scale per 16 values along K, one fp32 scale per tensor (weights) or per token (activations).
FP8 rows: E4M3 codes in groups of 64 with a power-of-two scale 2^ceil(log2(max(amax, 1e-4) / 448)).
"""

import torch

E2M1_MAX, E4M3_MAX = 6.0, 448.0


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 (and negatives), ties to the even code, saturating."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.copysign((torch.round(magnitude / step) * step).clamp(max=E2M1_MAX), x)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3, saturating at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def nvfp4_round_trip(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Quantise to NVFP4 and back.

    Args:
        x: [..., K] fp32, K a multiple of 16.
        tensor_scale: broadcasts against [..., K / 16, 1].
    """
    blocks = x.unflatten(-1, (-1, 16))  # [..., K/16, 16]
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = round_e4m3((amax / (E2M1_MAX * tensor_scale)).clamp(2.0**-9, E4M3_MAX)) * tensor_scale
    return (round_e2m1(blocks / scale) * scale).flatten(-2)


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
    """NVFP4 round trip of a bf16-rounded weight; `amax` overrides the tensor's own (w1 and w3 share one)."""
    weight = weight.bfloat16().float()
    amax = weight.abs().amax() if amax is None else amax
    return nvfp4_round_trip(weight, (amax / (E2M1_MAX * E4M3_MAX)).clamp(min=1e-12))


@torch.no_grad()
def quantize_activation(x: torch.Tensor) -> torch.Tensor:
    """NVFP4 round trip of activations with one scale per token (per row of the last dimension)."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return nvfp4_round_trip(x, (amax / (E2M1_MAX * E4M3_MAX)).unsqueeze(-1))


@torch.no_grad()
def quantize_kv_row(kv: torch.Tensor, num_rope: int) -> torch.Tensor:
    """FP8 round trip of the first channels of a KV row, BF16 of the last `num_rope`."""
    plain = kv[..., :-num_rope].unflatten(-1, (-1, 64))
    amax = plain.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / E4M3_MAX)))
    plain = (round_e4m3(plain / scale) * scale).flatten(-2)
    return torch.cat([plain, kv[..., -num_rope:].bfloat16().to(kv.dtype)], -1)


def straight_through(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The quantised value forwards, the identity backwards."""
    return x + (quantized - x).detach()
