# SPDX-License-Identifier: Apache-2.0
"""Dummy weights: shapes, formats and orders of real ones, values that keep activations at a normal size."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest
import torch

import megamoe
from megamoe.checkpoint import CheckpointError
from megamoe.cli import main
from megamoe.engine.sampling_params import SamplingParams
from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models import BUNDLED
from megamoe.models.deepseek_v4.config import LayerKind, parse_config
from megamoe.models.deepseek_v4.dummy import DummyModel, DummyWeights, cut_layers, dummy_bytes, dummy_model
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.releases import RELEASED_CONFIGS, check_release
from megamoe.models.deepseek_v4.weights import ModelWeights
from megamoe.models.load import load
from megamoe.text.llm import LLM

from .checkpoints import FLASH, PRO

CPU = torch.device("cpu")


@pytest.fixture
def config_alone(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with nothing but config.json."""
    shutil.copy(BUNDLED["tiny"] / "config.json", tmp_path)
    return tmp_path


def make(model: DummyModel, **choices: Any) -> ModelWeights:
    return DummyWeights(model, **{"dtype": None, "device": CPU, "layouts": {}, **choices}).make()


def tensors(weights: Any) -> list[torch.Tensor]:
    """Return every tensor of a record of records, each storage once, as bytes."""
    found: dict[int, torch.Tensor] = {}

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        elif isinstance(value, tuple):
            for one in value:
                collect(one)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                collect(getattr(value, field.name))

    collect(weights)
    return list(found.values())


def test_releases_are_the_ones_of_their_config_files() -> None:
    for name, raw in (("flash", FLASH), ("pro", PRO)):
        assert parse_config(RELEASED_CONFIGS[name]) == parse_config(raw)
        assert not check_release(parse_config(RELEASED_CONFIGS[name]))


@pytest.mark.parametrize("recipe", ["exact", "w4a16", "w4a4"])
def test_activations_keep_a_normal_size(config_alone: pathlib.Path, recipe: str) -> None:
    model = load(config_alone, recipe=recipe, load_format="dummy")
    logits = model.logits(list(range(3, 150)))
    assert bool(logits.isfinite().all()) and 0.5 < float(logits.std()) < 2.0
    assert list(model.load_seconds) == ["headers", "kernels", "weights"]


def test_streams_stay_finite_through_many_layers() -> None:
    made = dummy_model("tiny", None)
    config = dataclasses.replace(
        made.config,
        num_hidden_layers=43,
        layer_kinds=(LayerKind.SWA,) * 43,
        ratios=(0,) * 43,
        hash_routed=(False,) * 43,
    )
    modules = {f"layers.{layer}.{name.split('.', 2)[2]}" for layer in range(43) for name in made.formats}
    weights = make(dataclasses.replace(made, config=config, formats=dict.fromkeys(modules, Format.NVFP4)))
    from megamoe.models.deepseek_v4.model import Model
    from megamoe.models.recipe import get_recipe

    model = Model(config, weights, get_recipe("w4a16"), CPU, name="deep", directory=pathlib.Path())
    streams = model.advance(torch.arange(3, 12), model.new_cache(16)).float()
    size = float(streams.square().mean().sqrt())
    assert 0.5 < size < 50.0


def test_every_weight_has_the_size_of_its_width() -> None:
    made = dummy_model("flash", 3)
    config = dataclasses.replace(made.config, n_routed_experts=2, num_experts_per_tok=2, vocab_size=64)
    small = dataclasses.replace(made, config=config)
    weights = DummyWeights(small, dtype=None, device=CPU, layouts={})
    w1, _, w2 = weights.experts("layers.2.ffn.experts")
    wq_a, wo_a = weights.linear("layers.2.attn.wq_a"), weights.grouped("layers.2.attn.wo_a")
    assert isinstance(w1, NvFp4Tensor) and isinstance(wq_a, Fp8BlockTensor) and isinstance(wo_a, Fp8BlockTensor)
    assert wo_a.shape == (8, 1024, 4096) and wo_a.scales.shape == (8, 8, 32)
    values = [nvfp4.dequantize(w1), nvfp4.dequantize(w2), fp8.dequantize(wq_a), fp8.dequantize(wo_a[0])]
    for value in values:
        assert bool(value.isfinite().all())
        assert 0.5 < float(value.float().square().mean().sqrt()) * value.shape[-1] ** 0.5 < 1.5


def test_the_order_of_kernels_holds_valid_codes() -> None:
    made = dummy_model("tiny", 1)
    layouts = dict.fromkeys(("linear", "grouped", "experts"), CodeLayout.FRAGMENT_16X64)
    relaid, plain = make(made, layouts=layouts), make(made)
    w1 = relaid.blocks[0].moe.w1
    assert isinstance(w1, NvFp4Tensor) and w1.code_layout is CodeLayout.FRAGMENT_16X64
    scales = w1.row_major().scales.float()
    assert 1.0 <= float(scales.min()) and float(scales.max()) <= 3.75
    assert relaid.num_relaid == 0, "nothing is converted"
    assert isinstance(plain.blocks[0].moe.w1, NvFp4Tensor)
    assert plain.blocks[0].moe.w1.code_layout is CodeLayout.ROW_MAJOR


def test_a_seed_gives_the_same_layer_in_any_company() -> None:
    whole, cut = make(dummy_model("tiny", None)), make(dummy_model("tiny", 2))
    for one, other in zip(tensors(whole.blocks[1]), tensors(cut.blocks[1]), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole.blocks[1].attn_norm, whole.blocks[2].attn_norm)
    assert not torch.equal(make(dummy_model("tiny", 1), seed=1).embed, cut.embed)


def test_experts_of_a_token_are_different(config_alone: pathlib.Path) -> None:
    table = make(dummy_model(str(config_alone), 1)).blocks[0].moe.expert_table
    assert table is not None and table.shape == (4096, 2) and bool((table[:, 0] != table[:, 1]).all())
    assert 0 <= int(table.min()) and int(table.max()) == 7


def test_bytes_are_those_that_are_made() -> None:
    made = dummy_model("tiny", None)
    held = sum(one.numel() for one in tensors(make(made)))
    assert held == pytest.approx(dummy_bytes(made, None), rel=0.01)  # stacks have a tensor scale a row
    held = sum(one.numel() for one in tensors(make(made, dtype=torch.float32)))
    assert held == dummy_bytes(made, torch.float32)


def test_first_layers_of_every_kind_are_kept() -> None:
    made = dummy_model("flash", 20)
    config = made.config
    assert config.layer_kinds[:4] == (LayerKind.SWA, LayerKind.SWA, LayerKind.CSA, LayerKind.HCA)
    assert config.hash_routed == (True,) * 3 + (False,) * 17 and len(config.ratios) == 20
    assert "20 of 43 layers: 20 to 42 are left out (12 CSA, 11 HCA)" in made.notes
    assert "no draft is made" in made.notes and config.dspark is None
    assert made.formats["layers.0.ffn.experts.0.w1"] is Format.NVFP4  # stored as MXFP4, recoded when loaded
    assert made.formats["layers.0.attn.wo_a"] is Format.FP8
    _, notes = cut_layers(parse_config(FLASH), None)
    assert notes == ("no draft is made",)


@pytest.mark.parametrize(
    "quantization, expert, linear",
    [
        ({"quant_method": "fp8", "moe_quant_algo": "NVFP4"}, Format.NVFP4, Format.FP8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.attn.*"]}, Format.NVFP4, Format.PLAIN),
        (None, Format.PLAIN, Format.PLAIN),
    ],
)
def test_formats_are_the_declared_ones(
    tmp_path: pathlib.Path, quantization: dict[str, Any] | None, expert: Format, linear: Format
) -> None:
    raw = json.loads((BUNDLED["tiny"] / "config.json").read_text())
    raw["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(raw))
    formats = dummy_model(str(tmp_path), None).formats
    assert formats["layers.1.ffn.experts.3.w2"] is expert and formats["layers.1.attn.wq_a"] is linear
    logits = load(tmp_path, load_format="dummy", num_layers=2).logits([1, 2, 3])
    assert bool(logits.isfinite().all())


def test_token_ids_need_no_tokenizer(config_alone: pathlib.Path) -> None:
    llm = LLM(config_alone, load_format="dummy", num_layers=1)
    (completion,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4 and completion.text == ""
    with pytest.raises(ValueError, match=r"was made without tokenizer\.json, so there is no text\. Pass token ids"):
        llm.generate("text")
    assert LLM("tiny", load_format="dummy", num_layers=1).generate("text")[0].prompt_tokens > 1


def test_refusals(config_alone: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"load: unknown load_format 'npy'; allowed are safetensors, dummy\."):
        megamoe.load("tiny", load_format="npy")
    with pytest.raises(ValueError, match="num_layers goes with load_format 'dummy'"):
        megamoe.load("tiny", num_layers=1)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"num_layers must be 1 to 4, the layers that the model has; got {count}"):
            megamoe.load("tiny", load_format="dummy", num_layers=count)
    with pytest.raises(CheckpointError, match="load: no model 'nothing'"):
        megamoe.load("nothing", load_format="dummy")
    assert main(["generate", "--model", str(config_alone), "--load-format", "dummy", "--prompt", "x"]) == 2
    assert "tokenizer: no file" in capsys.readouterr().err
    assert main(["serve", "--model", "flash", "--load-format", "dummy"]) == 2
    assert "tokenizer: no file flash/tokenizer.json" in capsys.readouterr().err
