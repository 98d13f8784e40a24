# SPDX-License-Identifier: Apache-2.0
"""Division by a number gives the same bits on every device, and nothing in this room divides in another way."""

from __future__ import annotations

import importlib
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamoe.formats import cache_rows, e2m1, e4m3, e8m0, fp8, fragment_layout, mxfp4, nvfp4, scale_layout
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.formats.division import divide
from megamoe.formats.scale_search import ScaleSearch, quantize_weights

from ..divisions import RefuseReciprocals

# --- known answers ---


@pytest.mark.parametrize("divisor", [6.0, 448.0, 2688.0, 7168.0])
def test_a_quotient_is_rounded_once(divisor: float, seed: int) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(seed)).exp()
    want = (x.double() / divisor).float()  # 53 bits are enough to round a quotient of 24-bit numbers twice
    assert torch.equal(divide(x, divisor), want)
    assert not torch.equal(x * torch.tensor(1.0 / divisor), want), "a product with the reciprocal is something else"


def test_zeros_infinities_and_the_smallest_numbers() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, 2.0**-126, 2.0**-149])
    got = divide(x, 6.0)
    assert np.array_equal(got.numpy().view(np.int32), (x.numpy() / np.float32(6.0)).view(np.int32))
    assert divide(torch.ones(0, 3), 6.0).shape == (0, 3) and divide(torch.tensor(3.0), 6.0).item() == 0.5
    assert divide(torch.ones(2, dtype=torch.float64), 3.0).dtype == torch.float64


# --- nothing else divides by a number ---


def values(device: str = "cpu") -> Tensor:
    """Return [37, 256]: rows of every magnitude, zeros of both signs, ties, both ends of the range."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(37, 256, generator=generator)
    x *= torch.randint(-30, 31, (37, 1), generator=generator).float().exp2()
    x[1] = torch.where(torch.arange(256) % 3 == 0, -0.0, 0.0)
    x[2] = (torch.arange(256) % 97) * 0.0625
    x[3], x[4] = x[2] * 2.0**-130, x[2] * 2.0**124
    return x.to(device)


def powers(device: str = "cpu") -> Tensor:
    return torch.arange(-126, 127).float().exp2().to(device)


def some_bytes(last: int, device: str = "cpu") -> Tensor:
    return torch.arange(last + 1, dtype=torch.uint8, device=device).repeat(16).view(16, -1)


def _scales(device: str) -> Tensor:
    return torch.full((), 4.0 / 2688.0, device=device)


def _top(device: str) -> Tensor:
    return torch.full((), 100, dtype=torch.int32, device=device)


def _e4m3(device: str) -> Tensor:
    return some_bytes(0x7E, device).view(torch.float8_e4m3fn)


def _rows(row_format: RowFormat, device: str) -> Any:
    return cache_rows.encode_rows(values(device), row_format)


def _decoded(row_format: RowFormat, device: str) -> Tensor:
    return cache_rows.decode_rows(*_rows(row_format, device), row_format, 256)


def _pool(device: str) -> Tensor:
    return CachePool.allocate(3, 5, RowFormat.INDEX_FP8, 128, device).storage


# Module, and public function → what it gives on a device: every function of this room that makes numbers.
CASES: dict[str, dict[str, tuple[Callable[[str], Any], ...]]] = {
    "division": {"divide": tuple(lambda d, by=by: divide(values(d), by) for by in (6.0, 448.0, 2688.0))},
    "e2m1": {
        "encode_e2m1": (lambda d: e2m1.encode_e2m1(values(d)), lambda d: e2m1.encode_e2m1(values(d).bfloat16())),
        "round_to_e2m1": (lambda d: e2m1.round_to_e2m1(values(d)),),
        "decode_e2m1": (lambda d: e2m1.decode_e2m1(some_bytes(15, d)),),
        "lookup_e2m1": (lambda d: e2m1.lookup_e2m1(some_bytes(15, d)),),
        "decode_packed": (lambda d: e2m1.decode_packed(some_bytes(255, d)),),
        "pack": (lambda d: e2m1.pack(some_bytes(15, d)),),
        "unpack": (lambda d: e2m1.unpack(some_bytes(255, d)),),
        "as_float32": (lambda d: e2m1.as_float32("f", values(d).bfloat16()),),
    },
    "e4m3": {
        "encode_e4m3": (lambda d: e4m3.encode_e4m3(values(d)), lambda d: e4m3.encode_e4m3(values(d).bfloat16())),
        "round_to_e4m3": (lambda d: e4m3.round_to_e4m3(values(d)),),
        "decode_e4m3": (lambda d: e4m3.decode_e4m3(_e4m3(d)),),
        "lookup_e4m3": (lambda d: e4m3.lookup_e4m3(_e4m3(d)),),
    },
    "e8m0": {
        "pow2_ceil": (lambda d: e8m0.pow2_ceil(values(d).abs().clamp(max=2.0**127)),),
        "ceil_to_e8m0": (lambda d: e8m0.ceil_to_e8m0(values(d).abs().clamp(2.0**-126, 2.0**127)),),
        "encode_e8m0": (lambda d: e8m0.encode_e8m0(powers(d)),),
        "decode_e8m0": (lambda d: e8m0.decode_e8m0(e8m0.e8m0_from_bytes(some_bytes(254, d))),),
        "e8m0_from_bytes": (lambda d: e8m0.e8m0_from_bytes(some_bytes(254, d)),),
    },
    "nvfp4": {
        "quantize": (
            lambda d: nvfp4.quantize(values(d)),
            lambda d: nvfp4.quantize(values(d), scale_per="row"),
            lambda d: nvfp4.quantize(values(d).bfloat16(), tensor_scale=_scales(d)),
            lambda d: nvfp4.quantize(values(d).clamp(-100, 100).half(), scale_per="row").tiled(),
            lambda d: nvfp4.quantize(values(d)[:32], scale_per="row").fragments(),
        ),
        "dequantize": (
            lambda d: nvfp4.dequantize(nvfp4.quantize(values(d))),
            lambda d: nvfp4.dequantize(nvfp4.quantize(values(d), scale_per="row"), torch.bfloat16),
        ),
        "block_scale_values": (lambda d: nvfp4.block_scale_values("f", _e4m3(d)),),
    },
    "mxfp4": {
        "quantize": (lambda d: mxfp4.quantize(values(d)), lambda d: mxfp4.quantize(values(d).bfloat16())),
        "quantize_groups": (lambda d: mxfp4.quantize_groups("f", values(d)),),
        "dequantize": (lambda d: mxfp4.dequantize(mxfp4.quantize(values(d)), torch.bfloat16),),
        "shared_top_exponent": (lambda d: mxfp4.shared_top_exponent(mxfp4.quantize(values(d))),),
        "mxfp4_to_nvfp4": (
            lambda d: mxfp4.mxfp4_to_nvfp4(mxfp4.quantize(values(d))),
            lambda d: mxfp4.mxfp4_to_nvfp4(mxfp4.quantize(values(d)), top_exponent=_top(d)),
        ),
        "nvfp4_to_mxfp4": (lambda d: mxfp4.nvfp4_to_mxfp4(nvfp4.quantize(values(d), scale_per="row")),),
        "mxfp4_to_nvfp4_lossless": (lambda d: mxfp4.mxfp4_to_nvfp4_lossless(mxfp4.quantize(values(d)[2:3])),),
        "nvfp4_to_mxfp4_lossless": (
            lambda d: mxfp4.nvfp4_to_mxfp4_lossless(
                mxfp4.mxfp4_to_nvfp4_lossless(mxfp4.quantize(values(d)[2:3])),
            ),
        ),
    },
    "fp8": {
        "quantize_blocks": (
            lambda d: fp8.quantize_blocks(values(d)),
            lambda d: fp8.quantize_blocks(values(d)[:, :200].bfloat16(), torch.float32),
        ),
        "quantize_rows": (
            lambda d: fp8.quantize_rows(values(d)),
            lambda d: fp8.quantize_rows(values(d)[:, :200], group=64, scale_dtype=torch.float32),
        ),
        "quantize_groups": (lambda d: fp8.quantize_groups("f", values(d), 64, torch.float32),),
        "dequantize": (
            lambda d: fp8.dequantize(fp8.quantize_rows(values(d)[:, :200], group=64, scale_dtype=torch.float32)),
            lambda d: fp8.dequantize(fp8.quantize_blocks(values(d)), torch.bfloat16),
        ),
    },
    "scale_layout": {
        "to_tiled_128x4": (lambda d: scale_layout.to_tiled_128x4(_e4m3(d)),),
        "from_tiled_128x4": (lambda d: scale_layout.from_tiled_128x4(scale_layout.to_tiled_128x4(_e4m3(d)), 16, 127),),
    },
    "fragment_layout": {
        "codes_to_fragments": (lambda d: fragment_layout.codes_to_fragments(some_bytes(255, d)),),
        "codes_from_fragments": (lambda d: fragment_layout.codes_from_fragments(some_bytes(255, d)),),
        "scales_to_fragments": (lambda d: fragment_layout.scales_to_fragments(some_bytes(255, d)),),
        "scales_from_fragments": (lambda d: fragment_layout.scales_from_fragments(some_bytes(255, d)),),
    },
    "cache_rows": {
        "encode_rows": tuple(lambda d, f=f: _rows(f, d) for f in RowFormat),
        "decode_rows": tuple(lambda d, f=f: _decoded(f, d) for f in RowFormat),
        "CachePool": (_pool,),
    },
    "scale_search": {
        "quantize_weights": tuple(
            lambda d, s=s: quantize_weights([values()[2:], values()[5:].bfloat16()], s) for s in ScaleSearch
        )
    },
}
NO_NUMBERS = {
    *("row_bytes", "page_bytes", "fits_fragments", "tiled_128x4_bytes", "scale_shape_hint"),  # of sizes
    *("refuse_non_finite", "refuse_non_finite_amax", "refuse_tensor_scale", "require_e8m0", "require_output_dtype"),
    "require_one_device",
}
HOST_ONLY = ("scale_search", "recode")
"""Files that work on bytes of the CPU, when a checkpoint is converted."""

NAMED = [(f"{module}.{name}-{i}", call) for module, functions in CASES.items() for name, calls in functions.items()
         for i, call in enumerate(calls)]  # fmt: skip
IDS = [name for name, _ in NAMED]


@pytest.mark.parametrize(("name", "call"), NAMED, ids=IDS)
def test_nothing_divides_by_a_number_of_the_host(name: str, call: Callable[[str], Any]) -> None:
    with RefuseReciprocals():
        call("cpu")


def test_every_function_of_the_room_is_a_case(repository: pathlib.Path) -> None:
    for path in (repository / "src/megamoe/formats").glob("*.py"):
        if path.stem in ("__init__", "recode"):
            continue
        module = importlib.import_module(f"megamoe.formats.{path.stem}")
        public = {name for name, one in vars(module).items() if inspect.isfunction(one) and name[0] != "_"}
        own = {name for name in public if vars(module)[name].__module__ == module.__name__}
        assert own - NO_NUMBERS <= set(CASES[path.stem]), path.stem


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: x / 6.0,
    "number in place": lambda x: x.clone().div_(6),
    "out": lambda x: torch.div(x, 6.0, out=torch.empty_like(x)),
    "integers": lambda x: x.int() / 3,
    "rounded": lambda x: torch.div(x, 6.0, rounding_mode="floor"),
    "floor": lambda x: x // 6.0,
    "tensor of the host": lambda x: x / torch.tensor(6.0),
    "of a number": lambda x: 6.0 / x,
    "reciprocal": lambda x: x.reciprocal() * 6.0,
    "mean": lambda x: x.mean(-1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_way_to_divide_by_a_number_is_found(fault: str) -> None:
    x = values()[5:]
    with pytest.raises(AssertionError, match="reciprocal"), RefuseReciprocals():
        FAULTS[fault](x)


@pytest.mark.parametrize("module", ["nvfp4", "fp8", "mxfp4", "scale_search"])
def test_k1_the_fault_as_it_was_is_found(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"megamoe.formats.{module}.divide", lambda x, divisor: x / divisor)
    name = {"scale_search": "quantize_weights", "fp8": "quantize_rows"}.get(module, "quantize")
    with pytest.raises(AssertionError, match="a CUDA device multiplies by the reciprocal"), RefuseReciprocals():
        CASES[module][name][0]("cpu")


def test_what_is_exact_on_every_device_is_let_through() -> None:
    x = values()[5:]
    with RefuseReciprocals():
        x / x.amax(-1, keepdim=True), x / torch.full((), 6.0), x / x.amax(), torch.arange(9) // 2, x.sum(-1)  # noqa: B018


# --- the same bytes on a GPU ---


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    else:
        yield from (one for one in vars(value).values() if isinstance(one, Tensor))


ON_DEVICES = [one for one in NAMED if not one[0].startswith(HOST_ONLY)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "call"), ON_DEVICES, ids=[name for name, _ in ON_DEVICES])
def test_k1_bytes_are_the_same_on_cuda(name: str, call: Callable[[str], Any]) -> None:
    got, want = list(tensors(call("cuda"))), list(tensors(call("cpu")))
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.is_cuda and one.dtype == other.dtype and one.shape == other.shape
        left, right = (part.contiguous().reshape(-1).view(torch.uint8) for part in (one.cpu(), other))
        assert torch.equal(left, right), f"{int((left != right).sum())} of {left.numel()} bytes differ"
