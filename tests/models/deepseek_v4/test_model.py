# SPDX-License-Identifier: Apache-2.0
"""The bundled model in every recipe: prefill, decode and any chunking are one computation, bit for bit."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

import pytest
import torch

import megamoe
from megamoe.formats.cache_rows import RowFormat
from megamoe.models.deepseek_v4.cache import MAX_CHUNK
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.load import BUNDLED
from megamoe.models.recipe import RECIPES
from megamoe.ops.rms_norm import rms_norm
from megamoe.text.tokenizer import Tokenizer

from .oracle import ragged_chunks, step_through


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = (BUNDLED["tiny"] / "sample.txt").read_text(encoding="utf-8")
    return torch.tensor([0, *Tokenizer(BUNDLED["tiny"]).encode(text)])[:420]


@pytest.fixture(scope="module", params=list(RECIPES))
def model(request: pytest.FixtureRequest) -> Model:
    return megamoe.load("tiny", recipe=request.param)


# -- properties ---------------------------------------------------------------------------------------------------


def test_any_chunking_gives_the_same_bits(model: Model, ids: torch.Tensor, seed: int) -> None:
    want = model.logits(ids)
    assert want.shape == (len(ids), model.config.vocab_size) and want.dtype is torch.float32
    assert bool(torch.isfinite(want).all())
    for chunks in (ragged_chunks(len(ids), seed), [len(ids) - 1, 1], [1, len(ids) - 1]):
        assert torch.equal(step_through(model, ids, chunks), want), f"{model.recipe.name}: chunks {chunks}"


def test_one_token_decode_gives_the_same_bits(model: Model, ids: torch.Tensor) -> None:
    part = ids[:150]
    assert torch.equal(step_through(model, part, [1] * len(part)), model.logits(part))


def test_a_prefix_does_not_see_what_follows(model: Model, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[137:] = (changed[137:] + 1) % model.config.vocab_size
    got, want = model.logits(changed), model.logits(ids)
    assert torch.equal(got[:137], want[:137])
    assert not torch.equal(got[137:], want[137:])


def test_rewind_forgets(model: Model, ids: torch.Tensor) -> None:
    cache = model.new_cache(max_tokens=len(ids))
    want = model.step(ids, cache)
    for length in (417, 380, 200):
        cache.rewind(length)
        model.step((ids[length:] + 7) % model.config.vocab_size, cache)  # tokens that are then rejected
        cache.rewind(length)
        assert torch.equal(model.step(ids[length:], cache), want[length:])


def test_an_empty_step_changes_nothing(model: Model, ids: torch.Tensor) -> None:
    cache = model.new_cache(max_tokens=8)
    assert model.step(ids[:0], cache).shape == (0, model.config.vocab_size)
    assert model.logits([]).shape == (0, model.config.vocab_size)
    model.step(ids[:5], cache)
    assert cache.length == 5
    assert torch.equal(model.step(ids[5:6], cache)[0], model.logits(ids[:6])[5])


def test_drafts_do_not_depend_on_chunks(model: Model, ids: torch.Tensor) -> None:
    part = ids[:200]
    cache = model.new_cache(max_tokens=200)
    with torch.inference_mode():
        streams = model.advance(part[:-1], cache)
        want, _ = model.draft(streams, part[1:], cache)
        again = model.new_cache(max_tokens=200)
        got = [
            model.draft(s, n, again)[0]
            for s, n in zip(streams.split([1, 130, 1, 67]), part[1:].split([1, 130, 1, 67]), strict=True)
        ]
    assert torch.equal(torch.cat(got), want)


def test_notes_name_what_is_not_used(model: Model) -> None:
    assert model.notes == ()
    config = dataclasses.replace(model.config, unused_keys=("some_key",))
    weights = dataclasses.replace(model.weights, unused_draft=("mtp.0.main_norm.weight", "mtp.0.main_proj.weight"))
    other = Model(config, weights, model.recipe, model.device, name="other", directory=model.directory)
    assert other.notes == (
        "2 draft tensors are not used (mtp.0.main_norm.weight, ...)",
        "config.json keys that are not known and not used: some_key",
    )


# -- injected faults: each check above must notice -------------------------------------------------------------------


def patched(monkeypatch: pytest.MonkeyPatch, module: str, name: str, wrong: object) -> None:
    monkeypatch.setattr(importlib.import_module(f"megamoe.models.deepseek_v4.{module}"), name, wrong)


def test_f8_a_cache_that_is_never_written_is_noticed(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = megamoe.load("tiny")
    want = model.logits(ids[:64])

    def norm_alone(
        latent: torch.Tensor, kv: torch.Tensor, q_norm: torch.Tensor, *_: object, eps: float
    ) -> torch.Tensor:
        return rms_norm(latent, q_norm, eps=eps)

    patched(monkeypatch, "attention", "write_latent", norm_alone)
    assert not torch.equal(step_through(model, ids[:64], [60, 1, 1, 1, 1])[60:], want[60:])


def test_f18_index_numerics_that_differ_in_decode_are_noticed(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = megamoe.load("tiny")
    want = model.logits(ids)
    indexer = importlib.import_module("megamoe.models.deepseek_v4.indexer")
    right = indexer.round_index_query

    def plain_in_decode(q: torch.Tensor, *rows: object, **choices: object) -> object:
        return right(q, *rows, **choices | ({"key_format": RowFormat.BF16} if q.shape[0] == 1 else {}))

    patched(monkeypatch, "indexer", "round_index_query", plain_in_decode)
    got = step_through(model, ids, [340] + [1] * 80)
    assert not torch.equal(got[340:], want[340:])


@pytest.mark.parametrize("clamped", [True, False])
def test_f13_the_shared_expert_clamps_too(clamped: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = megamoe.load("tiny", recipe="exact").blocks[1].moe
    x = 300 * torch.randn(5, 256, generator=torch.Generator().manual_seed(seed))
    w1, w3, w2 = moe.weights.shared_w1, moe.weights.shared_w3, moe.weights.shared_w2
    gate, up = x @ w1.T, x @ w3.T
    assert float(gate.max()) > 20 and float(up.abs().max()) > 20, "the clamp must matter"
    want = (torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)) @ w2.T
    if not clamped:
        right = importlib.import_module("megamoe.models.deepseek_v4.moe").clamped_swiglu
        patched(monkeypatch, "moe", "clamped_swiglu", lambda gate, up, limit: right(gate, up, limit=None))
    error = float((moe.shared(x) - want).norm() / want.norm())
    assert (error < 1e-5) is clamped


def test_f18_the_top_k_really_drops_entries_here(ids: torch.Tensor) -> None:
    config = megamoe.load("tiny").config
    assert len(ids) // 4 > config.index_topk + 30


# -- refusals -------------------------------------------------------------------------------------------------------


def test_refuses_what_is_not_a_token(model: Model) -> None:
    for bad in ([-1], [model.config.vocab_size]):
        with pytest.raises(ValueError, match=r"token ids: allowed are 0 to"):
            model.logits(bad)
    with pytest.raises(ValueError, match=r"expected int64 \[T\]"):
        model.logits(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected int64 \[T\]"):
        model.logits(torch.zeros(2))


def test_refuses_to_overflow_a_cache(model: Model, ids: torch.Tensor) -> None:
    cache = model.new_cache(max_tokens=4)
    with pytest.raises(ValueError, match="holds 4 tokens and has 0; got 5 more"):
        model.step(ids[:5], cache)
    assert cache.length == 0
    for bad in (0, -1, model.config.max_position_embeddings + 1):
        with pytest.raises(ValueError, match="max_tokens must be in 1 to"):
            model.new_cache(max_tokens=bad)


def test_refuses_a_rewind_it_cannot_do(model: Model, ids: torch.Tensor) -> None:
    cache = model.new_cache(max_tokens=420)
    model.step(ids, cache)
    with pytest.raises(ValueError, match=f"at most {MAX_CHUNK} tokens below the longest"):
        cache.rewind(420 - MAX_CHUNK - 1)
    with pytest.raises(ValueError, match="length must be in 0 to 420"):
        cache.rewind(421)
    cache.rewind(300)
    with pytest.raises(ValueError, match="the sequence has been .420."):  # two short steps back are one long one
        cache.rewind(150)
    cache.rewind(0)
    assert torch.equal(model.step(ids[:5], cache), model.logits(ids[:5]))


def test_refuses_unknown_stages(model: Model, ids: torch.Tensor) -> None:
    cache = model.new_cache(max_tokens=8)
    streams = model.advance(ids[:2], cache)
    with pytest.raises(ValueError, match="no MTP stage 1"):
        model.draft(streams, ids[1:3], cache, stage=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fp4"}, "unknown recipe 'fp4'; allowed are exact, w4a16, w4a4"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": torch.float32}, "dtype may only be torch.float32 with recipe 'exact'"),
        ({"recipe": "exact", "dtype": torch.bfloat16}, "dtype may only be"),
        ({"model": "no-such-model"}, "no model 'no-such-model'"),
    ],
)
def test_load_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megamoe.load(**{"model": "tiny", **arguments})  # type: ignore[arg-type]


def test_cuda_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        megamoe.load("tiny", device="cuda")


def test_a_directory_without_a_config_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        megamoe.load(tmp_path)
