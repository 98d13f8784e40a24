# SPDX-License-Identifier: Apache-2.0
"""fp8_linear beside cuBLAS on one GPU, weights rotated so that L2 does not help.

python benchmarks/fp8_linear.py OUT.csv [PACK]

Baselines: cuBLAS bf16 on random numbers, and torch._scaled_mm on the same codes and scales (1x128 and 128x128, fp32),
which adds with Hopper's FP8 instructions; no value where torch refuses. Every call of a captured graph takes another
copy of the weight, at least 450 MB in all. A result is compared with fp64 over a sample of tokens before it is timed.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import sys

import torch
from matrix_kernels import ROTATED_BYTES, copy_gbps, graph_us

import megamoe
from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.kernels.store import store_for, target_of
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.quantize import quantize_fp8_rows
from megamoe.verify.inputs import rows_of
from megamoe.verify.tolerance import assert_within

SHAPES = ((8192, 8192), (32768, 1024), (4096, 8192), (65536, 1536), (7168, 16384), (512, 4096), (1536, 7168))
TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
SAMPLE = 8


def scaled_mm(x: Fp8RowTensor, w: Fp8BlockTensor) -> torch.Tensor:
    """Multiply with torch's own blockwise kernel; scales must have been made fp32 before."""
    return torch._scaled_mm(x.codes, w.codes.T, x.scales, w.scales.T, out_dtype=torch.bfloat16)


def with_float_scales(x: Fp8RowTensor, w: Fp8BlockTensor) -> tuple[Fp8RowTensor, Fp8BlockTensor]:
    """Return operands for scaled_mm: token scales with tokens contiguous, as it asks for."""
    scales = x.scales.float().T.contiguous().T
    return dataclasses.replace(x, scales=scales), dataclasses.replace(w, scales=w.scales.float())


def check(x: Fp8RowTensor, w: Fp8BlockTensor, got: torch.Tensor) -> None:
    """Compare some tokens with fp64."""
    index = torch.linspace(0, x.shape[0] - 1, min(SAMPLE, x.shape[0])).long()
    want = fp8.dequantize(rows_of(x, index)).double() @ fp8.dequantize(w).double().T
    assert_within("fp8_linear", got[index.to(got.device)], want.to(got.dtype))


def measure(num_rows: int, width: int, bandwidth: float) -> list[dict[str, object]]:
    """Measure all numbers of tokens of one weight."""
    lines = []
    weight_bytes = num_rows * width
    base = fp8.quantize_blocks(torch.randn(num_rows, width, device="cuda"))
    count = max(3, ROTATED_BYTES // weight_bytes + 1)
    weights = [dataclasses.replace(base, codes=base.codes.clone(), scales=base.scales) for _ in range(count)]
    count = max(3, ROTATED_BYTES // (2 * weight_bytes) + 1)
    plain = [torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    for num_tokens in TOKENS:
        values = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
        x, replays = quantize_fp8_rows(values), 9 if num_tokens <= 64 else 5
        check(x, base, fp8_linear(x, base))
        some = slice(None) if num_tokens <= 64 else slice(4)
        us = graph_us([functools.partial(fp8_linear, x, w) for w in weights[some]], replays)
        cublas = graph_us([functools.partial(torch.matmul, values, w.T) for w in plain[some]], replays)
        try:
            others = [functools.partial(scaled_mm, *with_float_scales(x, w)) for w in weights[some]]
            others[0]()
            scaled: float | None = graph_us(others, replays)
        except RuntimeError:
            scaled = None
        lines.append(
            {
                "op": "fp8_linear",
                "shape": f"{num_rows}x{width}",
                "num_tokens": num_tokens,
                "kernel_us": round(us, 1),
                "cublas_bf16_us": round(cublas, 1),
                "scaled_mm_us": "" if scaled is None else round(scaled, 1),
                "weight_bytes": weight_bytes,
                "copy_gbps": round(bandwidth),
                "share_of_byte_floor": round(weight_bytes / bandwidth / 1e3 / us, 3),
                "tflops": round(2 * num_rows * width * num_tokens / us / 1e6, 1),
            }
        )
        print(*lines[-1].values(), flush=True)
    return lines


if __name__ == "__main__":
    if len(sys.argv) > 2:
        store_for(target_of(torch.device("cuda"))).use_pack(pathlib.Path(sys.argv[2]), version=megamoe.__version__)
    torch.manual_seed(0)
    measured = copy_gbps()
    table = []
    for shape in SHAPES:
        table += measure(*shape, measured)
        torch.cuda.empty_cache()
        with pathlib.Path(sys.argv[1]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
