# SPDX-License-Identifier: Apache-2.0
"""-1 means nobody: rows of nobody change no bit of other rows, cost no weights, and get what docs/numerics.md says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.kernels import KERNELS
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.experts import experts
from megamoe.ops.fp8_experts import fp8_experts
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.penalize import penalize
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.route_experts import route_experts
from megamoe.ops.sample import sample
from megamoe.ops.token_logprobs import token_logprobs
from megamoe.ops.write_cache import write_cache
from megamoe.verify.inputs import INPUTS

from .expert_cases import ExpertCase, make_case
from .invariance import assert_nobody_changes_nothing

DTYPES = [torch.bfloat16, torch.float32]
NUM_EXPERTS = 6  # of make_case


# --- router ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", ["scores", "bias", "table"])
def test_route_experts(select: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(11, 96, generator=generator).to(dtype)
    gate = torch.randn(16, 96, generator=generator).bfloat16()
    options: dict[str, Any] = {
        "scores": {},
        "bias": {"bias": torch.randn(16, generator=generator)},
        "table": {"expert_table": torch.randint(16, (20, 6), generator=generator)},
    }[select]
    token_ids = torch.randint(20, (11,), generator=generator)
    op = functools.partial(_route, gate=gate, options=options)
    assert_nobody_changes_nothing(op, (x, token_ids), (None, -1), (0.0, -1), seed=seed)


def _route(x: torch.Tensor, ids: torch.Tensor, gate: torch.Tensor, options: dict[str, Any]) -> Any:
    return route_experts(x, gate, token_ids=ids, top_k=6, routed_scaling=2.5, **options)


def test_a_row_of_nobody_may_hold_what_no_score_comes_from() -> None:
    x = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    weights, ids = _route(x, torch.tensor([0, -1]), torch.eye(6, 2), {})
    assert weights[1].tolist() == [0.0] * 6 and ids[1].tolist() == [-1] * 6 and bool(weights[0].isfinite().all())


# --- experts ---

Weights = Callable[[torch.Tensor], Any]
RECIPES: dict[str, tuple[Callable[..., torch.Tensor], Weights]] = {
    "experts": (experts, lambda w: w),
    "fp8_experts": (fp8_experts, fp8.quantize_blocks),
    "nvfp4_experts": (nvfp4_experts, nvfp4.quantize),
    "nvfp4_weight_only_experts": (nvfp4_weight_only_experts, nvfp4.quantize),
}
WITH_SHARED_WEIGHTS = ("nvfp4_experts", "nvfp4_weight_only_experts")
SHARED = [(name, "output") for name in RECIPES] + [(name, "weights") for name in WITH_SHARED_WEIGHTS]


def _experts(name: str, shared: str, case: ExpertCase) -> Callable[..., torch.Tensor]:
    """The operation of x, route weights, ids and shared output, which it leaves out where it has shared weights."""
    door, made = RECIPES[name]
    weights = tuple(made(w) for w in (case.w1, case.w3, case.w2))
    options = {"shared_weights": tuple(made(w[2]) for w in (case.w1, case.w3, case.w2))} if shared == "weights" else {}

    def run(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return door(x, route, ids, *weights, swiglu_limit=10.0, **(options or {"shared_output": output}))

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shared"), SHARED)
def test_experts(name: str, shared: str, dtype: torch.dtype, seed: int) -> None:
    case = make_case(19, seed, dtype)
    rows = case.x, case.route_weights, case.expert_ids, case.shared_output
    assert_nobody_changes_nothing(_experts(name, shared, case), rows, (None, None, -1, None), (0.0,), seed=seed)


@pytest.mark.parametrize(("name", "shared"), SHARED)
def test_what_a_row_of_nobody_holds_is_not_looked_at(name: str, shared: str, seed: int) -> None:
    case = make_case(3, seed)
    case.x[1], case.shared_output[1], case.route_weights[1], case.expert_ids[1] = torch.nan, torch.nan, torch.nan, -1
    run = _experts(name, shared, case)
    got = run(case.x, case.route_weights, case.expert_ids, case.shared_output)
    assert torch.equal(got[1], torch.zeros_like(got[1])) and bool(got.isfinite().all())


@pytest.mark.parametrize(("name", "shared"), SHARED)
def test_experts_of_other_ranks_add_nothing_and_the_shared_one_does(name: str, shared: str, seed: int) -> None:
    """Two ranks of three experts each: what each adds, and a token that only the shared expert is left of."""
    case = make_case(8, seed, torch.float32)
    run = _experts(name, shared, case)
    shared_alone = run(case.x, case.route_weights, torch.full_like(case.expert_ids, NUM_EXPERTS), case.shared_output)
    assert bool(shared_alone.abs().amax(1).gt(0).all())
    if shared == "output":
        assert torch.equal(shared_alone, case.shared_output)
    for here in (case.expert_ids < 3, case.expert_ids >= 3):
        for elsewhere in (NUM_EXPERTS, NUM_EXPERTS + 1000):
            ids = torch.where(here, case.expert_ids, elsewhere)
            got = run(case.x, case.route_weights, ids, case.shared_output)
            none = run(case.x, case.route_weights, torch.where(here, ids, -1), case.shared_output)
            some = here.any(1)
            assert torch.equal(got[some], none[some])  # -1 beside an expert is no expert, and the token somebody
            assert torch.equal(got[~some], shared_alone[~some])
            assert torch.equal(none[~some], torch.zeros_like(none[~some]))


@pytest.mark.parametrize(("name", "shared"), SHARED)
def test_no_weight_is_read_for_nobody(name: str, shared: str, seed: int) -> None:
    """Experts that only a -1, or an id of another rank, could mean hold NaN."""
    case = make_case(6, seed)
    ids = torch.where(case.expert_ids == 1, case.expert_ids, torch.where(case.expert_ids == 2, -1, NUM_EXPERTS))
    rows = case.x, case.route_weights, ids, case.shared_output
    want = _experts(name, shared, case)(*rows)
    door, made = RECIPES[name]
    weights = [made(w) for w in (case.w1, case.w3, case.w2)]
    spoiled = [w.clone() if isinstance(w, torch.Tensor) else w for w in weights]
    for w in spoiled:
        scales = w if isinstance(w, torch.Tensor) else w.scales
        scales.view(torch.uint8)[[0, 2, 3, 4, 5]] = 0xFF  # NaN in every format
    options = {"shared_weights": tuple(made(w[2]) for w in (case.w1, case.w3, case.w2))}
    options = options if shared == "weights" else {"shared_output": case.shared_output}
    assert torch.equal(door(*rows[:3], *spoiled, swiglu_limit=10.0, **options), want)


# --- cache rows ---


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_cache_rows(row_format: RowFormat, seed: int) -> None:
    width = 128 if row_format in (RowFormat.INDEX_FP4, RowFormat.INDEX_FP8) else 512
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, width, generator=generator)
    slots = torch.randperm(16, generator=generator)[:12]
    filled = CachePool.allocate(2, 8, row_format, width)
    write_cache(torch.randn(16, width, generator=generator), filled, torch.arange(16))

    def stored(*arguments: torch.Tensor) -> torch.Tensor:
        pool = CachePool.allocate(2, 8, row_format, width)
        pool.storage.fill_(0xAA)
        write_cache(*arguments[:1], pool, arguments[1]) if len(arguments) == 2 else copy_cache(
            filled, arguments[0], pool, arguments[1]
        )
        return pool.storage

    for places in ([12, 13], [0, 4, 5]):
        is_nobody = torch.zeros(12 + len(places), dtype=torch.bool)
        is_nobody[places] = True
        more = torch.full((len(is_nobody), width), torch.nan)
        more[~is_nobody] = rows
        none = torch.full((len(is_nobody),), -1)
        none[~is_nobody] = slots
        assert torch.equal(stored(more, none), stored(rows, slots))
        got = read_cache(filled, none)
        assert torch.equal(got[~is_nobody], read_cache(filled, slots)) and not bool(got[is_nobody].any())
        target = CachePool.allocate(2, 8, row_format, width)
        want = CachePool.allocate(2, 8, row_format, width)
        for pool in (target, want):
            pool.storage.zero_()
        anywhere = torch.where(none < 0, 3, none)
        copy_cache(filled, anywhere, target, none)
        copy_cache(filled, slots, want, slots)
        assert torch.equal(target.storage, want.storage)
        target.storage.zero_()
        copy_cache(filled, none, target, torch.arange(len(none)))
        assert torch.equal(read_cache(target, torch.arange(len(none))[~is_nobody]), read_cache(filled, slots))


# --- positions ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_rope(inverse: bool, dtype: torch.dtype, seed: int) -> None:
    table = rope_table(64, 10000.0)
    x = torch.randn(13, 3, 72, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def run(rows: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        return rope(rows, pos, table, inverse=inverse)

    assert_nobody_changes_nothing(run, (x, torch.arange(13) * 1003), (None, -1), (None,), seed=seed)


# --- sampling ---


def test_sample(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 99, generator=generator) * 3
    others = torch.rand(4, 20, generator=generator).clamp(min=0.01)
    top_k = torch.randint(0, 20, (20,), generator=generator)
    others[0, ::3] = 0.0  # the best token

    def run(*rows: torch.Tensor) -> torch.Tensor:
        return sample(rows[0], top_k=rows[1], temperature=rows[2], top_p=rows[3], min_p=rows[4], uniform=rows[5])

    rows = (logits, top_k, *others)
    assert_nobody_changes_nothing(run, rows, (None, -1, None, None, None, None), (-1,), seed=seed)
    logits[3], top_k[3] = torch.nan, -1
    assert run(logits, top_k, *others)[3] == -1


def test_penalize(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, factors = torch.randn(4, 30, generator=generator), torch.rand(3, 4, generator=generator) + 0.5
    pairs = torch.randperm(120, generator=generator)[:40]
    counts = torch.randint(0, 3, (40,), generator=generator).float()
    options = dict(zip(("repetition", "presence", "frequency"), factors, strict=True))

    def run(row_idx: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        penalize(changed, row_idx, token_ids, counts, **options)
        return changed

    want = run(pairs // 30, pairs % 30, counts)
    for places in ([40, 41, 42], [0, 7, 8]):
        is_nobody = torch.zeros(40 + len(places), dtype=torch.bool)
        is_nobody[places] = True
        for row, token in ((-1, -1), (-1, 3), (2, -1)):
            padded = [torch.full((len(is_nobody),), mark) for mark in (row, token)]
            padded[0][~is_nobody], padded[1][~is_nobody] = pairs // 30, pairs % 30
            more = torch.full((len(is_nobody),), torch.nan)
            more[~is_nobody] = counts
            assert torch.equal(run(*padded, more), want)
    nobody = torch.full((3,), -1)
    assert torch.equal(run(nobody, nobody, torch.ones(3)), logits)


@pytest.mark.parametrize("num_top", [0, 3])
def test_token_logprobs(num_top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(15, 50, generator=generator), torch.randint(50, (15,), generator=generator)

    def run(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(token_logprobs(*rows, num_top=num_top))

    assert_nobody_changes_nothing(run, (logits, ids), (None, -1), (0.0, -1, 0.0), seed=seed)
    logits[2], ids[2] = torch.nan, -1
    assert run(logits, ids)[0][2] == 0.0


# --- kernels ---

KERNEL_CASES = [
    (call, inputs, which)
    for op in ("route_experts", *WITH_SHARED_WEIGHTS)
    if op in KERNELS
    for call in op_shapes(op)[:2]
    for which, inputs in enumerate(INPUTS[op])
]
BUCKETS = (1, 2, 8, 16, 40, 200, 700, 1700)  # one token, few tokens, one tile, every path


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", BUCKETS)
@pytest.mark.parametrize(
    ("call", "inputs", "which"), KERNEL_CASES, ids=[f"{c.op}-{c.where}-{w}" for c, _, w in KERNEL_CASES]
)
def test_kernels_within_a_bucket(call: Any, inputs: Any, which: int, num_tokens: int, seed: int) -> None:
    """The same bucket with other contents in the rows of nobody, at the end and between others."""
    arguments = inputs.make(call.dims, num_tokens, torch.Generator("cuda").manual_seed(seed))
    is_routing = call.op == "route_experts"
    mark = "token_ids" if is_routing else "expert_ids"
    whole = _outputs(inputs.door(**arguments))
    for places in (list(range(num_tokens - num_tokens // 3 - 1, num_tokens)), list(range(0, num_tokens, 2))):
        is_nobody = torch.zeros(num_tokens, dtype=torch.bool, device="cuda")
        is_nobody[places] = True
        calls = []
        for contents in range(2):
            padded = {**arguments, mark: arguments[mark].clone()}
            padded[mark][is_nobody] = -1
            for name in set(inputs.per_token) - {mark}:
                if isinstance(padded.get(name), torch.Tensor):
                    padded[name] = padded[name].clone()
                    padded[name][is_nobody] = torch.randn_like(padded[name][is_nobody].float()).to(
                        padded[name].dtype
                    ) * (1.0 + 99.0 * contents)
            calls.append(_outputs(inputs.door(**padded)))
        for one, other, among in zip(*calls, whole, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one[~is_nobody], among[~is_nobody])
            assert torch.equal(one[is_nobody], torch.full_like(one[is_nobody], -1 if one.dtype is torch.int64 else 0))


def _outputs(output: Any) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", BUCKETS)
@pytest.mark.parametrize("op", WITH_SHARED_WEIGHTS)
def test_kernels_with_experts_of_other_ranks(op: str, num_tokens: int, seed: int) -> None:
    """Ids of E and more add what a -1 beside an expert adds: nothing; and nothing of a weight reaches the sum."""
    call = op_shapes(op)[0]
    for inputs in INPUTS[op]:
        arguments = inputs.make(call.dims, num_tokens, torch.Generator("cuda").manual_seed(seed))
        num_experts = arguments["w1"].shape[0]
        ids = arguments["expert_ids"] % num_experts  # some ways of calling come with nobody's
        arguments["expert_ids"] = ids
        here = ids % 2 == 0
        elsewhere = torch.where(here, ids, num_experts + ids)
        got = inputs.door(**{**arguments, "expert_ids": elsewhere})
        none = inputs.door(**{**arguments, "expert_ids": torch.where(here, ids, -1)})
        some = here.any(1)
        assert torch.equal(got[some], none[some]) and not bool(none[~some].any())
        zeroed = inputs.door(**{**arguments, "route_weights": torch.where(here, arguments["route_weights"], 0.0)})
        torch.testing.assert_close(
            got.float(), zeroed.float(), rtol=1e-2, atol=1e-3 * float(zeroed.float().abs().max())
        )


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", BUCKETS)
@pytest.mark.parametrize("op", WITH_SHARED_WEIGHTS)
def test_kernels_without_a_single_pair(op: str, num_tokens: int, seed: int) -> None:
    """Not one expert is streamed: everybody is nobody, or has all experts on other ranks."""
    call = op_shapes(op)[0]
    for inputs in INPUTS[op]:
        arguments = inputs.make(call.dims, num_tokens, torch.Generator("cuda").manual_seed(seed))
        num_experts = arguments["w1"].shape[0]
        ids = arguments["expert_ids"] % num_experts
        arguments["expert_ids"] = ids
        nobody = inputs.door(**{**arguments, "expert_ids": torch.full_like(ids, -1)})
        assert not bool(nobody.any())
        elsewhere = inputs.door(**{**arguments, "expert_ids": torch.full_like(ids, num_experts)})
        zeroed = inputs.door(**{**arguments, "route_weights": torch.zeros_like(arguments["route_weights"])})
        assert torch.equal(elsewhere, zeroed)
