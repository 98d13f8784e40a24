# SPDX-License-Identifier: Apache-2.0
"""tools/fake_checkpoint.py: true headers, sparse files, and the same structure as checkpoints written by hand."""

from __future__ import annotations

import json
import re
import sys

import pytest

from megamoe.checkpoint.headers import read_headers
from megamoe.models.deepseek_v4.names import fused_experts, native_name

from ..fake_files import fake
from ..models.deepseek_v4 import checkpoints

LAYOUTS_BY_HAND = {"preview": "official", "base": "base", "nvidia": "nvidia", "nvfp4": "all_nvfp4", "bf16": "bf16"}


def without_numbers(names: object) -> set[str]:
    """Return names with every layer and expert number put aside."""
    return {re.sub(r"\.\d+\.", ".#.", str(name)) for name in names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", LAYOUTS_BY_HAND)
def test_names_are_those_of_checkpoints_written_by_hand(tmp_path, seed, layout):
    tensors, _ = checkpoints.encode_all(checkpoints.make_master(seed), checkpoints.LAYOUTS[LAYOUTS_BY_HAND[layout]])
    headers = read_headers(fake.write_fake(tmp_path, "small", layout))
    assert without_numbers(headers.infos) == without_numbers(tensors)


def test_a_full_size_checkpoint_is_sparse(tmp_path):
    directory = fake.write_fake(tmp_path, "flash", "dspark")
    files = list(directory.iterdir())
    assert len([path for path in files if path.suffix == ".safetensors"]) == 48
    assert sum(path.stat().st_size for path in files) > 166_878_536_440
    assert sum(path.stat().st_blocks * 512 for path in files) < 64 * 2**20
    headers = read_headers(directory)
    assert (len(headers.infos), headers.num_bytes, headers.problems) == (72_317, 166_878_536_440, ())
    assert headers.total_size == headers.num_bytes


def test_nvidias_index_claims_too_little_as_published_ones_do(tmp_path):
    headers = read_headers(fake.write_fake(tmp_path, "small", "nvidia"))
    assert headers.total_size is not None and headers.total_size < headers.num_bytes


def test_metadata_schemas_differ():
    new, old = (fake.config_of("small", layout)["quantization_config"] for layout in ("nvidia", "nvidia-old"))
    assert new["quant_algo"] == "MIXED_PRECISION" and old["quant_algo"] is None and old["awq_block_size"] == 16
    assert list(new["quantized_layers"])[0] == "layers.0.ffn.experts"
    assert list(old["quantized_layers"])[0] == "layers.0.ffn.experts.0.w1"


def test_modules_are_named_as_transformers_names_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = fake.config_of("small", "resave-modules")
    known = set(transformers.DeepseekV4Config().to_dict())
    config = transformers.DeepseekV4Config(**{key: raw[key] for key in raw if key in known and key != "architectures"})
    state = transformers.DeepseekV4ForCausalLM(config).state_dict()
    headers = read_headers(fake.write_fake(tmp_path, "small", "resave-modules"))
    assert set(headers.infos) == set(state)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: info.shape for name, info in headers.infos.items()
    }


def test_every_name_has_a_native_one(tmp_path):
    for layout in fake.LAYOUTS:
        headers = read_headers(fake.write_fake(tmp_path / layout, "small", layout))
        for name in headers.infos:
            native = native_name(name)
            assert fused_experts(native) or re.fullmatch(
                r"(layers|mtp)\.\d+\.(attn|ffn|hc_|attn_norm|ffn_norm|enorm|hnorm|norm|e_proj|h_proj|main_|markov_|conf).*"
                r"|(embed|head|norm)\.weight|hc_head_(fn|base|scale)",
                native,
            ), (layout, name, native)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["fake_checkpoint.py", "--model", "small", "--layout", "base", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    fake.main()
    assert "in 5 files" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["expert_dtype"] == "fp8"
