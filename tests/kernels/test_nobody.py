# SPDX-License-Identifier: Apache-2.0
"""Expert ids outside 0 .. E - 1 are nobody's: they cost no weight bytes, are counted nowhere and add nothing.

-1 is no expert, E or more an expert of another rank. A token with nothing but -1 is nobody, and its result is 0,
whatever its row holds; the shared expert has no part in it. The PTX of sort_pairs, gather_rows and sum_slots runs on
the CPU (simt.py); whole operations run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import struct
from collections.abc import Callable, Sequence

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.compile import Request, compile_objects
from megamoe.kernels.experts import gather_rows_config, sort_pairs_config, sum_slots_config
from megamoe.kernels.experts.expert_stream import stream_limit
from megamoe.kernels.experts.sort_pairs import max_passes
from megamoe.kernels.experts.sort_pairs_config import NO_PAIR, SHARED_EXPERT
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts

from .simt import Block

EXPERTS, SLOTS, WIDTH, INNER = 8, 2, 256, 128
UNTOUCHED = -77


def some_ids(
    generator: torch.Generator, num_tokens: int, num_slots: int, num_experts: int, absent: float
) -> torch.Tensor:
    """Return expert ids [T, A]: a share of them absent, -1 or of another rank; every fifth token is nobody."""
    shape = num_tokens, num_slots
    ids = torch.randint(num_experts, shape, generator=generator)
    elsewhere = torch.randint(num_experts, 2**33, shape, generator=generator)
    elsewhere = torch.where(torch.rand(shape, generator=generator) < 0.5, -1, elsewhere)
    ids = torch.where(torch.rand(shape, generator=generator) < absent, elsewhere, ids)
    ids[3::5] = -1
    return ids


# The three kernels that look at ids and order, their PTX on the CPU.


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compile a kernel and return its PTX."""

    @functools.cache
    def compiled(config: object) -> str:
        folder: pathlib.Path = tmp_path_factory.mktemp("nobody")
        (one,) = compile_objects([Request.of(config)], "sm90a", folder, keep_code=True)
        assert one.ptx is not None
        return one.ptx.read_text()

    return compiled


def address(buffer: int) -> int:
    return (buffer + 1) << 32


def vector(buffer: int, size: int) -> bytes:
    return struct.pack("<qii", address(buffer), size, 0)


def rows(buffer: int, count: int, stride: int) -> bytes:
    return struct.pack("<qiiq", address(buffer), count, 0, stride)


def sorted_pairs(text: str, ids: torch.Tensor, num_experts: int, per_pass: int, shared: bool) -> list[torch.Tensor]:
    """Run sort_pairs; return order, passes and counters."""
    num_pairs, num_shared = ids.numel(), ids.shape[0] if shared else 0
    bound = max_passes(num_pairs, num_experts, per_pass) + -(-num_shared // per_pass)
    out = [torch.full(shape, UNTOUCHED, dtype=torch.int32) for shape in ((num_pairs + num_shared,), (bound, 4), (3,))]
    params = [vector(0, num_pairs), vector(1, num_pairs + num_shared), vector(2, bound), struct.pack("<q", address(3))]
    Block(text, 512, params, [ids.contiguous().view(-1), *out]).run()
    return out


def wanted_pairs(ids: torch.Tensor, num_experts: int, per_pass: int, shared: bool) -> tuple[list[int], list[list[int]]]:
    """Return order and passes, worked out the plain way."""
    flat, num_tokens = ids.view(-1).tolist(), ids.shape[0]
    order, passes = [], []
    for expert in range(num_experts):
        own = [pair for pair, one in enumerate(flat) if one == expert]
        for start in range(0, len(own), per_pass):
            passes.append([expert, len(order) + start, min(per_pass, len(own) - start), 0])
        order += own
    order += [NO_PAIR] * (len(flat) - len(order))
    if shared:
        own = [len(flat) + token for token in range(num_tokens) if (ids[token] != -1).any()]
        for start in range(0, len(own), per_pass):
            passes.append([SHARED_EXPERT, len(flat) + start, min(per_pass, len(own) - start), 0])
        order += own + [NO_PAIR] * (num_tokens - len(own))
    return order, passes


@pytest.mark.kernels
@pytest.mark.parametrize(("num_experts", "per_pass", "num_slots"), [(8, 8, 2), (256, 16, 6), (33, 32, 1)])
def test_pairs_of_nobody_have_no_place_and_no_pass(
    ptx: Callable[..., str], num_experts: int, per_pass: int, num_slots: int, seed: int
) -> None:
    text, generator = ptx(sort_pairs_config.Config(num_experts, per_pass)), torch.Generator().manual_seed(seed)
    many = 600 if num_slots == 1 else 100  # more than one round of the block's threads, in tokens or in pairs
    cases = [(1, 0.0), (5, 0.6), (33, 1.0), (many, 0.5)]
    for (num_tokens, absent), shared in itertools.product(cases, (False, True)):
        ids = some_ids(generator, num_tokens, num_slots, num_experts, absent)
        order, passes, counters = sorted_pairs(text, ids, num_experts, per_pass, shared)
        want_order, want_passes = wanted_pairs(ids, num_experts, per_pass, shared)
        assert order.tolist() == want_order
        assert counters.tolist() == [len(want_passes), 0, 0]
        assert passes[: len(want_passes)].tolist() == want_passes
        if want_passes:
            assert passes[len(want_passes) :].eq(UNTOUCHED).all()


@pytest.mark.kernels
@pytest.mark.parametrize("shared", [False, True])
def test_without_any_pair_the_first_pass_can_be_looked_at(ptx: Callable[..., str], shared: bool) -> None:
    """A block without work reads the first pass and the order's first place; there must be something harmless."""
    ids = torch.full((40, SLOTS), -1)
    order, passes, counters = sorted_pairs(ptx(sort_pairs_config.Config(EXPERTS, 8)), ids, EXPERTS, 8, shared)
    assert order.eq(NO_PAIR).all() and counters.tolist() == [0, 0, 0]
    assert passes[0].tolist() == [0, 0, 1, 0] and passes[1:].eq(UNTOUCHED).all()


@pytest.mark.kernels
def test_rows_of_no_pair_are_not_gathered(ptx: Callable[..., str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text, num_tokens = ptx(gather_rows_config.Config(WIDTH, "bf16")), 7
    x = torch.randn(num_tokens, WIDTH, generator=generator).bfloat16()
    route = torch.rand(num_tokens, SLOTS, generator=generator)
    order = torch.tensor([3, 0, 13, NO_PAIR, NO_PAIR, 14, 20, NO_PAIR], dtype=torch.int32)
    gathered = torch.full((len(order), WIDTH), -1.0, dtype=torch.bfloat16)
    weights = torch.full((len(order),), -1.0)
    buffers = [x, order, route, gathered, weights]
    params = [vector(0, num_tokens), vector(1, 8), vector(2, route.numel()), vector(3, 8), vector(4, 8)]
    for position in range(len(order)):
        Block(text, 128, [*params, struct.pack("<i", SLOTS)], buffers, (position, 0)).run()
    tokens = [1, 0, 6, None, None, 0, 6, None]  # of pairs; the shared expert's are 14 + token
    for position, token in enumerate(tokens):
        assert torch.equal(gathered[position], torch.full((WIDTH,), -1.0).bfloat16() if token is None else x[token])
    routed = route.view(-1)
    assert weights.tolist() == [routed[3], routed[0], routed[13], -1.0, -1.0, 1.0, 1.0, -1.0]


@pytest.mark.kernels
@pytest.mark.parametrize("shared", [None, "bf16", "f32"])
@pytest.mark.parametrize("out_name", ["bf16", "f32"])
def test_slots_of_nobody_are_not_read(ptx: Callable[..., str], shared: str | None, out_name: str, seed: int) -> None:
    generator, dtypes = torch.Generator().manual_seed(seed), {"bf16": torch.bfloat16, "f32": torch.float32}
    ids = torch.tensor([[0, 5], [-1, 3], [-1, -1], [8, 2**40], [7, -1], [-1, 8]])
    num_tokens = ids.shape[0]
    present, somebody = (ids >= 0) & (ids < EXPERTS), (ids != -1).any(1)
    outputs = torch.randn(num_tokens, SLOTS, WIDTH, generator=generator).bfloat16()
    total = torch.where(present[..., None], outputs, 0.0).float().unbind(1)
    want = total[0] + total[1]
    outputs[~present] = float("nan")  # memory that no kernel has written
    buffers, params = [outputs], [rows(0, num_tokens * SLOTS, WIDTH)]
    if shared is not None:
        extra = torch.randn(num_tokens, WIDTH, generator=generator).to(dtypes[shared])
        want = want + torch.where(somebody[:, None], extra.float(), 0.0)
        extra[~somebody] = float("nan")
        buffers, params = [*buffers, extra], [*params, rows(1, num_tokens, WIDTH)]
    out = torch.full((num_tokens, WIDTH), -1.0, dtype=dtypes[out_name])
    params += [vector(len(buffers), ids.numel()), rows(len(buffers) + 1, num_tokens, WIDTH), struct.pack("<i", EXPERTS)]
    text = ptx(sum_slots_config.Config(WIDTH, SLOTS, shared, out_name))
    for token in range(num_tokens):
        Block(text, 128, params, [*buffers, ids.view(-1), out], (0, token)).run()
    assert torch.equal(out, want.to(out.dtype)) and not out[2].any()


# Whole operations, on a GPU.


def experts_weights(generator: torch.Generator) -> tuple[list[NvFp4Tensor], list[NvFp4Tensor]]:
    """Return weights of the routed experts, and the same with scales of NaN in the last expert."""
    shapes = ((EXPERTS, INNER, WIDTH), (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER))
    clean = [nvfp4.quantize(torch.randn(shape, generator=generator) * shape[-1] ** -0.5) for shape in shapes]
    good, poisoned = ([one.to("cuda").fragments() for one in clean] for _ in range(2))
    for one in poisoned:
        one.scales.view(torch.uint8)[-1].fill_(0x7F)
    return good, poisoned


@pytest.mark.gpu
@pytest.mark.parametrize("door", [nvfp4_experts, nvfp4_weight_only_experts])
@pytest.mark.parametrize("shared", ["none", "output", "weights"])
@pytest.mark.parametrize("num_tokens", [1, 5, stream_limit(SLOTS, EXPERTS), stream_limit(SLOTS, EXPERTS) + 1, 300])
def test_absent_experts_and_padded_rows_change_nobodys_bits(
    door: Callable[..., torch.Tensor], shared: str, num_tokens: int, seed: int
) -> None:
    """The same bits as with a weight of 0 for every absent pair; rows of nobody hold NaN, and come out as 0."""
    generator = torch.Generator().manual_seed(seed)
    good, poisoned = experts_weights(generator)
    ids = some_ids(generator, num_tokens, SLOTS, EXPERTS - 1, 0.4)  # never the last expert, whose scales are NaN
    ids = torch.where(ids >= EXPERTS - 1, ids + 1, ids)
    absent, nobody = (ids < 0) | (ids >= EXPERTS), (ids == -1).all(1)
    route = torch.rand(num_tokens, SLOTS, generator=generator)
    x = torch.randn(num_tokens, WIDTH, generator=generator).bfloat16()
    more: dict[str, object] = {}
    if shared == "output":
        more["shared_output"] = torch.randn(num_tokens, WIDTH, generator=generator).bfloat16().cuda()
    if shared == "weights":
        shapes = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
        weights = (nvfp4.quantize(torch.randn(shape, generator=generator) * shape[-1] ** -0.5) for shape in shapes)
        more["shared_weights"] = tuple(one.to("cuda").fragments() for one in weights)
    filled, weighted = torch.where(absent, 0, ids), torch.where(absent, 0.0, route)
    want = door(x.cuda(), weighted.cuda(), filled.cuda(), *good, swiglu_limit=7.0, **more)
    want[nobody.cuda()] = 0.0
    for content in (float("nan"), 1.0):
        padded = torch.where(nobody[:, None], content, x).bfloat16().cuda()
        got = door(padded, route.cuda(), ids.cuda(), *poisoned, swiglu_limit=7.0, **more)
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("door", [nvfp4_experts, nvfp4_weight_only_experts])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 300])
def test_a_step_of_nobody_is_zeros(door: Callable[..., torch.Tensor], num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, poisoned = experts_weights(generator)
    x = torch.full((num_tokens, WIDTH), float("nan"), dtype=torch.bfloat16, device="cuda")
    ids, route = torch.full((num_tokens, SLOTS), -1, device="cuda"), torch.rand(num_tokens, SLOTS, device="cuda")
    shared: Sequence[torch.Tensor | None] = (None, x.clone())
    for output in shared:
        got = door(x, route, ids, *poisoned, shared_output=output, swiglu_limit=None)
        assert torch.equal(got, torch.zeros_like(x))
