# SPDX-License-Identifier: Apache-2.0
"""DSpark against a second implementation in float64 loops, by hand, in the engine, and with faults injected."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import megamoe
from megamoe.cache.batch import Batch, Commit, Save
from megamoe.cache.pools import CacheSize
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.formats import fp8
from megamoe.models.deepseek_v4 import dspark as dspark_module
from megamoe.models.deepseek_v4 import model as model_module
from megamoe.models.deepseek_v4.cache import SharedCache
from megamoe.models.deepseek_v4.config import DSparkConfig
from megamoe.models.deepseek_v4.dspark import DSpark
from megamoe.models.deepseek_v4.dspark_drafter import DSparkDrafter, Tapped
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.mtp_drafter import MtpDrafter
from megamoe.models.deepseek_v4.weights import DSparkWeights
from megamoe.models.recipe import get_recipe
from megamoe.ops.rms_norm import rms_norm

from . import checkpoints
from .checkpoints import DSPARK, HEAD_DIM, HEADS, STREAMS, VOCAB, Tensors, make_dspark_master, make_master, save

WINDOW, BLOCK, NOISE = DSPARK["sliding_window"], DSPARK["dspark_block_size"], DSPARK["dspark_noise_token_id"]
EPS = 1e-6


@pytest.fixture(scope="module")
def master() -> Tensors:
    return make_dspark_master(1)


@pytest.fixture(scope="module")
def model(master: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(master, tmp_path_factory.mktemp("dspark"))


def load(master: Tensors, directory: pathlib.Path, config: dict[str, Any] = DSPARK) -> Model:
    return megamoe.load(save(directory, master, config), "exact")


def shared(
    model: Model, *, rings: int = 3, step_tokens: int = 64, snapshots: int = 2, ring_tokens: int = 2
) -> SharedCache:
    """Return a cache in which ring r has pages 2 r and 2 r + 1."""
    pages = model.tokens_per_page
    size = CacheSize(rings, 2 * rings, pages, ring_tokens, step_tokens)
    cache = model.new_shared_cache(size, snapshots, max_tokens=2 * pages, with_drafts=True)
    for ring in range(rings):
        cache.set_pages(ring, [2 * ring, 2 * ring + 1])
    return cache


def batch_of(ids: list[list[int]], starts: list[int], rings: list[int]) -> Batch:
    return Batch(
        np.array([one for sequence in ids for one in sequence]),
        np.array(starts),
        np.array([len(sequence) for sequence in ids]),
        np.array(rings),
    )


def commit_of(
    batch: Batch,
    next_ids: list[int],
    wants: list[bool],
    rows: list[int] | None = None,
    saves: tuple[Save, ...] = (),
) -> Commit:
    return Commit(
        rows=np.arange(len(batch.token_ids)) if rows is None else np.array(rows),
        rings=batch.rings,
        starts=batch.starts,
        counts=batch.counts,
        first_ids=batch.token_ids[np.concatenate(([0], batch.counts.cumsum()[:-1]))],
        next_ids=np.array(next_ids),
        wants_drafts=np.array(wants),
        saves=saves,
    )


def greedy(logits: torch.Tensor, ahead: int) -> torch.Tensor:
    return logits.argmax(-1)


@torch.inference_mode()
def feed(
    model: Model,
    cache: SharedCache,
    drafter: DSparkDrafter,
    ids: list[int],
    newest: int,
    *,
    ring: int = 0,
    chunks: tuple[int, ...] = (),
    start: int = 0,
    num_tokens: int = BLOCK,
    choose: Callable[[torch.Tensor, int], torch.Tensor] = greedy,
    saves: tuple[Save, ...] = (),
) -> torch.Tensor:
    """Run ids of one sequence in chunks, and draft after the last: [1, BLOCK]. `saves` are of the last chunk."""
    drafts, at = torch.empty(0), 0
    for count in chunks or (len(ids),):
        batch = batch_of([ids[at : at + count]], [start + at], [ring])
        here = saves if at + count == len(ids) else ()
        batch = dataclasses.replace(batch, saves=here)
        plan = cache.plan(batch)
        hidden = model.run(plan, cache)
        cache.finish(plan)
        assert isinstance(hidden, Tapped)
        at += count
        following = [*ids[at - count + 1 : at], ids[at] if at < len(ids) else newest]
        commit = commit_of(batch, following, [at == len(ids)], saves=here)
        drafts = drafter.observe(hidden, commit, num_tokens, choose)
    assert at == len(ids)
    return drafts


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- a second implementation: float64, one token, one head, one expert at a time ------------------------------------


class Second:
    """DSpark as its description says, without a cache, from the checkpoint's own tensors."""

    def __init__(self, master: Tensors, num_stages: int = 3) -> None:
        self.w = {name: tensor.double().numpy() for name, tensor in master.items()}
        self.num_stages = num_stages
        self.last = f"mtp.{num_stages - 1}"

    def norm(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        y = x / math.sqrt(sum(float(one) ** 2 for one in x) / len(x) + EPS)
        return y if weight is None else y * weight

    def rotate(self, x: np.ndarray, position: int, sign: int = 1) -> np.ndarray:
        y, width = x.copy(), DSPARK["qk_rope_head_dim"]
        for pair in range(width // 2):
            angle = position * 10000.0 ** (-2 * pair / width)
            c, s = math.cos(angle), sign * math.sin(angle)
            even, odd = HEAD_DIM - width + 2 * pair, HEAD_DIM - width + 2 * pair + 1
            y[even], y[odd] = x[even] * c - x[odd] * s, x[odd] * c + x[even] * s
        return y

    def mix(self, streams: np.ndarray, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the sublayer reads, and how its output and the streams are put together."""
        n = STREAMS
        flat = streams.reshape(-1)
        m = self.w[f"{prefix}_fn"] @ flat / math.sqrt(float(flat @ flat) / len(flat) + EPS)
        base, scale = self.w[f"{prefix}_base"], self.w[f"{prefix}_scale"]
        pre = [1 / (1 + math.exp(-(m[j] * scale[0] + base[j]))) + EPS for j in range(n)]
        post = [2 / (1 + math.exp(-(m[n + j] * scale[1] + base[n + j]))) for j in range(n)]
        c = np.zeros((n, n))
        for j in range(n):
            row = [m[2 * n + n * j + k] * scale[2] + base[2 * n + n * j + k] for k in range(n)]
            total = sum(math.exp(one - max(row)) for one in row)
            c[j] = [math.exp(one - max(row)) / total + EPS for one in row]
        for step in range(2 * DSPARK["hc_sinkhorn_iters"] - 1):
            axis = 0 if step % 2 == 0 else 1
            c = c / (c.sum(axis=axis, keepdims=True) + EPS)
        return sum(pre[j] * streams[j] for j in range(n)), np.array(post), c

    def around(self, streams: np.ndarray, prefix: str, norm: str, sublayer: Callable[[list[np.ndarray]], list[Any]]):
        """Run a sublayer over all tokens of a block: streams [K, X, D]."""
        mixed = [self.mix(one, prefix) for one in streams]
        outputs = sublayer([self.norm(u, self.w[norm]) for u, _, _ in mixed])
        return np.stack(
            [
                np.stack([post[k] * y + sum(c[j, k] * x[j] for j in range(STREAMS)) for k in range(STREAMS)])
                for x, y, (_, post, c) in zip(streams, outputs, mixed, strict=True)
            ]
        )

    def row(self, x: np.ndarray, stage: str, position: int) -> np.ndarray:
        kv = self.norm(self.w[f"{stage}.attn.wkv.weight"] @ x, self.w[f"{stage}.attn.kv_norm.weight"])
        return self.rotate(kv, position)

    def attend(self, xs: list[np.ndarray], stage: str, window: list[np.ndarray], first: int) -> list[np.ndarray]:
        a = f"{stage}.attn"
        rows = window + [self.row(x, stage, first + k) for k, x in enumerate(xs)]
        out = []
        for k, x in enumerate(xs):
            latent = self.norm(self.w[f"{a}.wq_a.weight"] @ x, self.w[f"{a}.q_norm.weight"])
            queries = (self.w[f"{a}.wq_b.weight"] @ latent).reshape(HEADS, HEAD_DIM)
            heads = []
            for h in range(HEADS):
                q = self.rotate(self.norm(queries[h], None), first + k)
                z = [float(q @ row) / math.sqrt(HEAD_DIM) for row in rows]
                total = sum(map(math.exp, z)) + math.exp(self.w[f"{a}.attn_sink"][h])
                o = sum(math.exp(one) / total * row for one, row in zip(z, rows, strict=True))
                heads.append(self.rotate(o, first + k, sign=-1))
            groups = DSPARK["o_groups"]
            wo_a = self.w[f"{a}.wo_a.weight"].reshape(groups, DSPARK["o_lora_rank"], -1)
            per = HEADS // groups
            low = [wo_a[g] @ np.concatenate(heads[g * per : (g + 1) * per]) for g in range(groups)]
            out.append(self.w[f"{a}.wo_b.weight"] @ np.concatenate(low))
        return out

    def expert(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = np.minimum(self.w[f"{prefix}.w1.weight"] @ x, 10.0)
        up = np.clip(self.w[f"{prefix}.w3.weight"] @ x, -10.0, 10.0)
        return self.w[f"{prefix}.w2.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def experts(self, xs: list[np.ndarray], stage: str) -> list[np.ndarray]:
        f = f"{stage}.ffn"
        out = []
        for x in xs:
            scores = np.sqrt(np.log1p(np.exp(self.w[f"{f}.gate.weight"] @ x)))
            chosen = np.argsort(-(scores + self.w[f"{f}.gate.bias"]), kind="stable")[: DSPARK["num_experts_per_tok"]]
            total = sum(scores[e] for e in chosen)
            routed = sum(scores[e] / total * 1.5 * self.expert(x, f"{f}.experts.{e}") for e in chosen)
            out.append(routed + self.expert(x, f"{f}.shared_experts"))
        return out

    def main(self, taps: np.ndarray) -> list[np.ndarray]:
        return [self.norm(self.w["mtp.0.main_proj.weight"] @ one, self.w["mtp.0.main_norm.weight"]) for one in taps]

    def hidden(self, taps: np.ndarray, newest: int) -> np.ndarray:
        """Return the collapsed streams [K, D] of a block after the positions whose taps these are."""
        main, length = self.main(taps), len(taps)
        embed = self.w["embed.weight"]
        streams = np.stack([np.stack([embed[one]] * STREAMS) for one in [newest] + [NOISE] * (BLOCK - 1)])
        for idx in range(self.num_stages):
            stage = f"mtp.{idx}"
            window = [self.row(main[t], stage, t) for t in range(max(0, length - WINDOW), length)]
            streams = self.around(
                streams,
                f"{stage}.hc_attn",
                f"{stage}.attn_norm.weight",
                lambda xs, stage=stage, window=window: self.attend(xs, stage, window, length),
            )
            streams = self.around(
                streams,
                f"{stage}.hc_ffn",
                f"{stage}.ffn_norm.weight",
                lambda xs, stage=stage: self.experts(xs, stage),
            )
        w = self.w
        collapsed = []
        for one in streams:
            flat = one.reshape(-1)
            m = w[f"{self.last}.hc_head_fn"] @ flat / math.sqrt(float(flat @ flat) / len(flat) + EPS)
            pre = 1 / (1 + np.exp(-(m * w[f"{self.last}.hc_head_scale"] + w[f"{self.last}.hc_head_base"]))) + EPS
            collapsed.append(sum(pre[j] * one[j] for j in range(STREAMS)))
        return np.stack(collapsed)

    def draft(self, taps: np.ndarray, newest: int) -> tuple[list[int], np.ndarray, list[float]]:
        """Return the greedy drafts, the logits they were chosen from [K, V], and the confidences."""
        hidden = self.hidden(taps, newest)
        w1, w2 = (self.w[f"{self.last}.markov_head.markov_w{one}.weight"] for one in (1, 2))
        before, drafted, logits, confidences = newest, [], [], []
        for h in hidden:
            base = self.w["head.weight"] @ self.norm(h, self.w[f"{self.last}.norm.weight"])
            logits.append(base + w2 @ w1[before])
            score = float(self.w[f"{self.last}.confidence_head.proj.weight"][0] @ np.concatenate((h, w1[before])))
            confidences.append(1 / (1 + math.exp(-score)))
            before = int(np.argmax(logits[-1]))
            drafted.append(before)
        return drafted, np.stack(logits), confidences


@torch.inference_mode()
def taps_of(model: Model, ids: list[int]) -> np.ndarray:
    """Return the taps of a sequence by the single-sequence path, taken off the blocks' own outputs."""
    cache, outputs = model.new_cache(len(ids)), []
    plan = cache.plan(torch.tensor(ids))
    streams = model.embed(plan.token_ids)[:, None, :].repeat(1, STREAMS, 1)
    for block, pools in zip(model.blocks, cache.layers, strict=True):
        streams = block(streams, plan, pools).mixed()
        outputs.append(streams.double().numpy())
    return np.concatenate([outputs[layer].mean(axis=1) for layer in DSPARK["dspark_target_layer_ids"]], axis=1)


# -- known answers -----------------------------------------------------------------------------------------------------


def difference(model: Model, master: Tensors, length: int) -> float:
    """Return the largest difference of any logit of a block; the drafts are followed in both alike."""
    ids, newest = random_ids(length, length), 7
    cache = shared(model)
    drafted, logits, _ = Second(master).draft(taps_of(model, ids), newest)
    seen: list[torch.Tensor] = []

    def follow(one: torch.Tensor, ahead: int) -> torch.Tensor:
        seen.append(one)
        return torch.tensor([drafted[ahead]])

    feed(model, cache, model.new_drafter(cache, BLOCK), ids, newest, choose=follow)
    return float(np.abs(torch.cat(seen).numpy() - logits).max())


TOLERANCE = 1e-5  # fp32 sums of up to 480 terms through three stages; the largest found was 5e-7


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
def test_it_is_what_the_second_implementation_computes(model: Model, master: Tensors, length: int) -> None:
    assert difference(model, master, length) < TOLERANCE


def run_with(change: Callable[[list[Any]], None]) -> Callable[..., torch.Tensor]:
    """Return the function that runs a stage, with its arguments changed before."""
    right = dspark_module._run

    def wrong(*arguments: Any) -> torch.Tensor:
        changed = list(arguments)
        change(changed)
        return right(*changed)

    return wrong


def causal(arguments: list[Any]) -> None:
    row = torch.arange(len(arguments[2].num_visible), dtype=torch.int32) % BLOCK
    arguments[2] = dataclasses.replace(arguments[2], num_visible=row + 1)


def a_position_late(arguments: list[Any]) -> None:
    arguments[2] = dataclasses.replace(arguments[2], positions=arguments[2].positions + 1)


def sliding_window(arguments: list[Any]) -> None:
    """Let every row of the block see a window that ends at itself, as ordinary tokens do."""
    arguments[2] = dataclasses.replace(arguments[2], window_ends=arguments[2].positions)


@pytest.mark.parametrize("change", [causal, a_position_late, sliding_window])
def test_a_wrong_block_is_noticed(
    model: Model, master: Tensors, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], None]
) -> None:
    monkeypatch.setattr(dspark_module, "_run", run_with(change))
    assert difference(model, master, 2 * WINDOW) > 10 * TOLERANCE


def test_rows_made_as_in_the_backbone_are_noticed(
    model: Model, master: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages' rows are made of main_x itself, without the norm that stands before attention elsewhere."""
    right = DSpark.main

    def normed(self: DSpark, taps: torch.Tensor) -> torch.Tensor:
        return rms_norm(right(self, taps), self.weights.stages[0].attn_norm, eps=EPS)

    monkeypatch.setattr(DSpark, "main", normed)
    assert difference(model, master, 2 * WINDOW) > 10 * TOLERANCE


def test_taps_of_one_stream_are_noticed(model: Model, master: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "mean_of_streams", lambda streams, out: out.copy_(streams[:, 0]))
    assert difference(model, master, 2 * WINDOW) > 10 * TOLERANCE


def test_confidence(model: Model, master: Tensors) -> None:
    ids, newest = random_ids(20, 3), 5
    cache = shared(model)
    drafter = model.new_drafter(cache, BLOCK)
    assert isinstance(drafter, DSparkDrafter) and model.dspark is not None
    drafts = feed(model, cache, drafter, ids, newest)
    with torch.inference_mode():
        block = torch.tensor([[newest] + [NOISE] * (BLOCK - 1)])
        last = cache.draft_plan(batch_of([[newest]], [len(ids) - 1], [0]))
        hidden = model.dspark.block(model.weights.embed, block, last, cache.draft_layers)
        found = model.dspark.confidence(hidden, torch.tensor([newest]), drafts)
    _, _, expected = Second(master).draft(taps_of(model, ids), newest)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


def test_the_chain_by_hand() -> None:
    """Three tokens, rank 2. w1: 0 -> (1, 0), 1 -> (0, 1), 2 -> (1, 1). w2: 0 -> (0, 0), 1 -> (2, 0), 2 -> (0, 3).

    So after 0 the table adds (0, 2, 0), after 1 it adds (0, 0, 3), after 2 it adds (0, 2, 3).
    """
    w1, w2 = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[0.0, 0], [2, 0], [0, 3]])
    draft = object.__new__(DSpark)
    draft.weights = dataclasses.replace(_NO_WEIGHTS, markov_w1=w1, markov_w2=w2)
    draft.recipe = get_recipe("exact")
    base = torch.tensor([[[1.5, 0, 0], [1, 0, 0], [9, 0, 4]], [[0, 0, 5], [4, 0, 0.5], [0, 0, 0]]])
    #                     0 first: (1.5, 2, 0) -> 1; (1, 0, 3) -> 2; (9, 2, 7) -> 0
    #                     1 first: (0, 0, 8) -> 2; (4, 2, 3.5) -> 0; (0, 2, 0) -> 1
    seen: list[list[list[float]]] = []

    def choose(logits: torch.Tensor, ahead: int) -> torch.Tensor:
        assert ahead == len(seen)
        seen.append(logits.tolist())
        return logits.argmax(-1)

    assert draft.chain(base, torch.tensor([0, 1]), 3, choose).tolist() == [[1, 2, 0], [2, 0, 1]]
    assert seen == [[[1.5, 2, 0], [0, 0, 8]], [[1, 0, 3], [4, 2, 3.5]], [[9, 2, 7], [0, 2, 0]]]
    assert draft.chain(base, torch.tensor([0, 1]), 1, greedy).tolist() == [[1], [2]]


_NO_WEIGHTS = DSparkWeights(*[None] * 8)  # type: ignore[arg-type]


# -- properties --------------------------------------------------------------------------------------------------------


def storages(cache: SharedCache) -> list[torch.Tensor]:
    return [pools.window.storage.clone() for pools in cache.draft_layers]


@pytest.mark.parametrize("chunks", [(1,) * 40, (24, 16), (7, 1, 1, 20, 11)])
def test_chunked_prefill_fills_the_same_rows_and_drafts_the_same(model: Model, chunks: tuple[int, ...]) -> None:
    ids = random_ids(40, 2)
    whole, parts = shared(model), shared(model)
    expected = feed(model, whole, model.new_drafter(whole, BLOCK), ids, 3)
    drafts = feed(model, parts, model.new_drafter(parts, BLOCK), ids, 3, chunks=chunks)
    assert torch.equal(drafts, expected)
    assert all(map(torch.equal, storages(parts), storages(whole)))


@torch.inference_mode()
def test_drafting_changes_no_cache(model: Model) -> None:
    ids = random_ids(30, 4)
    cache = shared(model)
    drafter = model.new_drafter(cache, BLOCK)
    batch = batch_of([ids[:20]], [0], [0])
    hidden = model.run(cache.plan(batch), cache)
    assert drafter.observe(hidden, commit_of(batch, ids[1:21], [False]), BLOCK, greedy).shape == (0, BLOCK)
    before = [*storages(cache), *(pools.window.storage.clone() for pools in cache.layers)]
    drafts = drafter.observe(hidden, commit_of(batch, ids[1:21], [True]), BLOCK, greedy)
    assert drafts.shape == (1, BLOCK)
    after = [*storages(cache), *(pools.window.storage for pools in cache.layers)]
    assert all(map(torch.equal, before, after))


@torch.inference_mode()
def test_drafts_do_not_depend_on_company_or_ring(model: Model) -> None:
    sequences = [random_ids(length, length) for length in (5, 17, 23)]
    cache = shared(model)
    drafter = model.new_drafter(cache, BLOCK)
    batch = batch_of(sequences, [0, 0, 0], [2, 0, 1])
    hidden = model.run(cache.plan(batch), cache)
    following = [one for sequence in sequences for one in [*sequence[1:], 9]]
    together = drafter.observe(hidden, commit_of(batch, following, [True, False, True]), 3, greedy)
    for drafts, ids in zip(together, (sequences[0], sequences[2]), strict=True):
        alone = shared(model)
        assert torch.equal(feed(model, alone, model.new_drafter(alone, BLOCK), ids, 9)[0, :3], drafts)


@torch.inference_mode()
def test_rejected_drafts_leave_no_trace(model: Model) -> None:
    """A step runs two more tokens than turn out certain; what is drafted next is as if they had never been."""
    ids = random_ids(24, 6)
    cache = shared(model)
    drafter = model.new_drafter(cache, BLOCK)
    feed(model, cache, drafter, ids[:20], ids[20])
    step = batch_of([[*ids[20:22], 1, 2]], [20], [0])  # ids[20:22] are certain, 1 and 2 are rejected
    hidden = model.run(cache.plan(step), cache)
    certain = batch_of([ids[20:22]], [20], [0])
    drafts = drafter.observe(hidden, commit_of(certain, ids[21:23], [True]), BLOCK, greedy)
    fresh = shared(model)
    assert torch.equal(drafts, feed(model, fresh, model.new_drafter(fresh, BLOCK), ids[:22], ids[22]))


def test_every_row_of_a_block_sees_all_of_it(model: Model) -> None:
    """No causal mask: another token at one place changes the logits at all others."""
    assert model.dspark is not None
    cache = shared(model)
    feed(model, cache, model.new_drafter(cache, BLOCK), random_ids(20, 8), 3)
    last = cache.draft_plan(batch_of([[3]], [19], [0]))

    @torch.inference_mode()
    def hidden(ids: torch.Tensor) -> torch.Tensor:
        assert model.dspark is not None
        return model.dspark.block(model.weights.embed, ids, last, cache.draft_layers)[0]

    base = torch.tensor([[3, NOISE, NOISE, NOISE, NOISE]])
    for place in range(BLOCK):
        other = base.clone()
        other[0, place] = 11
        assert (hidden(other) != hidden(base)).any(dim=1).all()


def test_a_snapshot_continues_a_sequence(model: Model) -> None:
    page = model.tokens_per_page
    ids = random_ids(page + 3, 9)
    cache = shared(model)
    drafter = model.new_drafter(cache, BLOCK)
    chunks = (64,) * (page // 64)
    feed(model, cache, drafter, ids[:page], ids[page], chunks=chunks, saves=(Save(0, page, 1, 63),))
    whole = feed(model, cache, drafter, ids[page:], 5, start=page)
    feed(model, cache, drafter, random_ids(30, 10), 1, ring=2)  # somebody else was there before
    cache.restore(1, 2, page)
    drafter.restore(1, 2, page)
    cache.set_pages(2, [0, 1])  # the first sequence's pages
    batch = batch_of([ids[page:]], [page], [2])
    with torch.inference_mode():
        hidden = model.run(cache.plan(batch), cache)
        commit = commit_of(batch, [*ids[page + 1 :], 5], [True])
        assert torch.equal(drafter.observe(hidden, commit, BLOCK, greedy), whole)


def quantized(recipe: str) -> Model:
    """Return the bundled model with a DSpark draft made of its own classic stage, twice, and random projections."""
    model = megamoe.load("tiny", recipe)
    config, stage = model.config, model.weights.mtp[0]
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    draft = DSparkWeights(
        stages=(stage.block, stage.block),
        main_proj=fp8.quantize_blocks(random(config.hidden_size, 2 * config.hidden_size), torch.float8_e8m0fnu),
        main_norm=stage.hnorm,
        norm=stage.norm,
        hc_head=stage.hc_head,
        markov_w1=random(config.vocab_size, 8),
        markov_w2=random(config.vocab_size, 8),
        confidence=random(1, config.hidden_size + 8),
    )
    config = dataclasses.replace(config, dspark=DSparkConfig(4, 2, (0, 3), 8))
    weights = dataclasses.replace(model.weights, mtp=(), dspark=draft)
    return Model(config, weights, model.recipe, model.device, name="tiny", directory=model.directory)


@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
def test_quantized_recipes(recipe: str) -> None:
    """FP8 rows, FP8 and NVFP4 weights: any chunking drafts alike, and drafts change nothing."""
    model = quantized(recipe)
    ids = [one + 3 for one in random_ids(30, 14)]
    whole, parts = shared(model), shared(model)
    expected = feed(model, whole, model.new_drafter(whole, 4), ids, 3, num_tokens=4)
    drafts = feed(model, parts, model.new_drafter(parts, 4), ids, 3, chunks=(11, 1, 1, 17), num_tokens=4)
    assert torch.equal(drafts, expected) and all(map(torch.equal, storages(parts), storages(whole)))
    assert generate(model, 4, [ids])[0] == generate(model, 0, [ids])[0]


# -- in the engine -----------------------------------------------------------------------------------------------------


def generate(model: Model, num_drafts: int, prompts: list[list[int]], **params: Any) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, EngineConfig(max_sequences=2, prefill_chunk=64, speculative_tokens=num_drafts))
    for idx, prompt in enumerate(prompts):
        engine.add(str(idx), prompt, SamplingParams(max_tokens=24, **params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)] += output.token_ids
    return outputs, engine


PROMPTS = [random_ids(length, length) for length in (3, 40, 21)]


@pytest.mark.parametrize("num_drafts", [1, 3, BLOCK])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_drafts_never_change_what_comes_out(model: Model, num_drafts: int, params: dict[str, Any]) -> None:
    """Random weights: nearly every draft is rejected, at different places."""
    plain, _ = generate(model, 0, PROMPTS, **params)
    drafted, engine = generate(model, num_drafts, PROMPTS, **params)
    assert drafted == plain and engine.stats().draft_tokens > 0


def predictable(seed: int) -> tuple[Tensors, dict[str, Any]]:
    """A checkpoint whose next token depends on the newest one alone, with a table that knows it.

    Layers add nothing, so the logits are a function f of the newest token; after token u the table adds 900 to f(u).
    """
    master = make_dspark_master(seed)
    for name, tensor in master.items():
        if name.startswith("layers.") and (".wo_b." in name or ".w2." in name):
            tensor.zero_()
    embed, norm = master["embed.weight"].double(), master["norm.weight"].double()
    normed = embed * (embed.square().mean(1, keepdim=True) + EPS).rsqrt() * norm
    follows = (normed @ master["head.weight"].double().T).argmax(1)
    master["mtp.2.markov_head.markov_w1.weight"] = 30 * torch.eye(VOCAB).bfloat16()
    master["mtp.2.confidence_head.proj.weight"] = torch.zeros(1, checkpoints.HIDDEN + VOCAB).bfloat16()
    table = torch.zeros(VOCAB, VOCAB)
    table[follows, torch.arange(VOCAB)] = 30.0
    master["mtp.2.markov_head.markov_w2.weight"] = table.bfloat16()
    return master, {**DSPARK, "dspark_markov_rank": VOCAB}


def test_right_drafts_are_accepted(tmp_path: pathlib.Path) -> None:
    master, config = predictable(3)
    model = megamoe.load(save(tmp_path, master, config), "exact", accept=["values-zero"])  # zeros make it predictable
    plain, slow = generate(model, 0, PROMPTS, ignore_eos=True)
    drafted, fast = generate(model, BLOCK, PROMPTS, ignore_eos=True)
    assert drafted == plain
    stats = fast.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 3 * 15
    assert stats.steps < slow.stats().steps / 3


def test_f22_reused_prefixes_draft_as_computed_ones(model: Model) -> None:
    """F22: a prefix hit restores the stages' rows as well; drafts after it are those of a computed prompt."""
    page = model.tokens_per_page
    prompt = random_ids(page + 9, 12)
    engine = Engine(model, EngineConfig(max_sequences=2, prefill_chunk=64, speculative_tokens=BLOCK, num_snapshots=4))
    drafted: list[list[list[int]]] = []
    for name in ("computed", "reused"):
        engine.add(name, prompt, SamplingParams(max_tokens=12))
        tokens = []
        while engine.has_work():
            tokens += [list(output.token_ids) for output in engine.step()]
        drafted.append([one for one in tokens if one])
    assert engine.stats().prefix_hit_tokens == page
    assert drafted[0] == drafted[1]


# -- choosing a drafter ------------------------------------------------------------------------------------------------


def test_the_checkpoint_says_which_drafter(model: Model, tmp_path: pathlib.Path) -> None:
    assert isinstance(model.new_drafter(shared(model), BLOCK), DSparkDrafter) and model.num_draft_stages == 3
    classic = load(make_master(1), tmp_path / "mtp", checkpoints.CONFIG)
    assert isinstance(classic.new_drafter(shared(classic), 9), MtpDrafter) and classic.num_draft_stages == 1
    neither = load(make_master(1, num_mtp=0), tmp_path / "none", DSPARK)
    assert neither.dspark is None and neither.num_draft_stages == 0
    with pytest.raises(ValueError, match=r"^drafts: .* has no draft weights"):
        neither.new_drafter(shared(neither), 1)


def test_a_longer_draft_than_a_block_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"^drafts: model .* drafts 5 tokens at once; got 6"):
        model.new_drafter(shared(model), BLOCK + 1)


def test_nothing_is_tapped_without_drafts(model: Model) -> None:
    size = CacheSize(1, 1, model.tokens_per_page, 8)
    cache = model.new_shared_cache(size, 0, max_tokens=8, with_drafts=False)
    cache.set_pages(0, [0])
    batch = batch_of([[1, 2]], [0], [0])
    with torch.inference_mode():
        assert isinstance(model.run(cache.plan(batch), cache), torch.Tensor)
