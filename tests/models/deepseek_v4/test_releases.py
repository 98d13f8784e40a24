# SPDX-License-Identifier: Apache-2.0
"""A released model's config.json is compared where no tensor shows what it says.

Row C4 of docs/faults.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

import megamoe
from megamoe.models.deepseek_v4 import releases
from megamoe.models.deepseek_v4.config import parse_config
from megamoe.models.deepseek_v4.convert import ConvertOptions, plan
from megamoe.models.deepseek_v4.examine import examine
from megamoe.models.deepseek_v4.releases import RELEASES, check_release, note_yarn
from megamoe.verify.checkpoint import Verdict, inspect_checkpoint

from ...fake_files import Files, fake
from .checkpoints import FLASH, PRO

DSPARK = fake.config_of("flash", "dspark")


@pytest.mark.parametrize("raw", [FLASH, PRO, DSPARK], ids=["flash", "pro", "flash-dspark"])
def test_releases_are_what_they_are(raw):
    config = parse_config(raw)
    assert releases.release_of(config) is not None
    assert check_release(config) == [] and note_yarn(config) == []


@pytest.mark.parametrize("layout", ["preview", "dspark", "resave"])
@pytest.mark.parametrize("model", ["flash", "pro"])
def test_every_spelling_of_a_release_is_what_it_is(model, layout):
    assert check_release(parse_config(fake.config_of(model, layout))) == []


def set_to(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change fields."""
    return lambda raw: raw.update(fields)


def scaling(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change fields of rope_scaling."""
    return lambda raw: raw["rope_scaling"].update(fields)


EDITS = [
    (
        lambda raw: raw.pop("rope_scaling"),
        "rope_scaling",
        "no rope_scaling, so its compressed layers would run without",
    ),
    (set_to(rope_scaling=None), "rope_scaling", "has factor 16 over 65536 positions"),
    (scaling(type="default"), "rope_scaling", "without YaRN"),
    (scaling(factor=40), "rope_scaling.factor", "rope_scaling.factor is 40; DeepSeek-V4-Flash has 16."),
    (scaling(beta_fast=16), "rope_scaling.beta_fast", "is 16; DeepSeek-V4-Flash has 32."),
    (scaling(beta_slow=2), "rope_scaling.beta_slow", "is 2; DeepSeek-V4-Flash has 1."),
    (
        scaling(original_max_position_embeddings=4096),
        "rope_scaling.original_max_position_embeddings",
        "is 4096; DeepSeek-V4-Flash has 65536.",
    ),
    (set_to(rope_theta=1000000), "rope_theta", "rope_theta is 1000000; DeepSeek-V4-Flash has 10000."),
    (set_to(compress_rope_theta=10000), "compress_rope_theta", "is 10000; DeepSeek-V4-Flash has 160000."),
    (
        set_to(routed_scaling_factor=2.5),
        "routed_scaling_factor",
        "routed_scaling_factor is 2.5; DeepSeek-V4-Flash has 1.5: Pro's config.json?",
    ),
    (set_to(index_topk=1024), "index_topk", "is 1024; DeepSeek-V4-Flash has 512: Pro's config.json?"),
    (set_to(rms_norm_eps=1e-5), "rms_norm_eps", "is 1e-05; DeepSeek-V4-Flash has 1e-06."),
    (set_to(hc_eps=1e-5), "hc_eps", "is 1e-05; DeepSeek-V4-Flash has 1e-06."),
    (set_to(hc_sinkhorn_iters=3), "hc_sinkhorn_iters", "is 3; DeepSeek-V4-Flash has 20."),
    (set_to(sliding_window=256), "sliding_window", "is 256; DeepSeek-V4-Flash has 128."),
    (set_to(swiglu_limit=7.0), "swiglu_limit", "is 7; DeepSeek-V4-Flash has 10."),
    (set_to(qk_rope_head_dim=32), "qk_rope_head_dim", "is 32; DeepSeek-V4-Flash has 64."),
    (set_to(max_position_embeddings=65536), "max_position_embeddings", "is 65536; DeepSeek-V4-Flash has 1048576."),
    (set_to(bos_token_id=5), "bos_token_id", "is 5; DeepSeek-V4-Flash has 0."),
    (set_to(eos_token_id=2), "eos_token_id", "is [2]; DeepSeek-V4-Flash has 1."),
]


@pytest.mark.parametrize(("edit", "subject", "words"), EDITS, ids=[f"{row[1]}-{i}" for i, row in enumerate(EDITS)])
def test_a_field_that_no_tensor_shows_is_compared(edit, subject, words):
    raw = copy.deepcopy(dict(FLASH))
    edit(raw)
    problems = check_release(parse_config(raw))
    assert [problem.subject for problem in problems] == [subject]
    assert words in problems[0].text and problems[0].rule == "config-release"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dspark_block_size", 4, "is 4; DeepSeek-V4-Flash has 5."),
        ("dspark_noise_token_id", 3, "is 3; DeepSeek-V4-Flash has 128799."),
        ("dspark_target_layer_ids", [1, 2, 3], "is (1, 2, 3); DeepSeek-V4-Flash has (40, 41, 42)."),
    ],
)
def test_fields_of_a_dspark_draft_are_compared(field, value, words):
    problems = check_release(parse_config({**DSPARK, field: value}))
    assert [problem.subject for problem in problems] == [field] and words in problems[0].text


def test_another_size_is_no_release():
    raw = {**fake.config_of("small", "preview"), "routed_scaling_factor": 7.0}
    config = parse_config(raw)
    assert check_release(config) == [] and note_yarn(config) == []
    del raw["rope_scaling"]
    assert [note.rule for note in note_yarn(parse_config(raw))] == ["config-no-yarn"]
    flat = {**raw, "compress_ratios": [0] * len(raw["compress_ratios"])}
    assert note_yarn(parse_config(flat)) == []


def test_inspect_finds_it(tmp_path):
    directory = fake.write_fake(tmp_path, "flash", "preview")
    raw = json.loads((directory / "config.json").read_text())
    del raw["rope_scaling"]
    (directory / "config.json").write_text(json.dumps({**raw, "routed_scaling_factor": 2.5}))
    found = inspect_checkpoint(directory)
    assert found.verdict is Verdict.FINDINGS
    assert [one.subjects for one in found.findings] == [("routed_scaling_factor",), ("rope_scaling",)]


def test_load_and_convert_warn(tmp_path, monkeypatch):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", "preview"))
    right = parse_config(files.config)
    fields = {name: getattr(right, name) for name in RELEASES[4096, 43, 256].fields}
    small = releases.Release("Small", fields, RELEASES[4096, 43, 256].dspark)
    monkeypatch.setitem(RELEASES, (256, 5, 4), small)
    monkeypatch.setattr(releases, "_YARN", right.yarn)
    assert examine(tmp_path / "source").problems == ()
    files.config["routed_scaling_factor"] = 2.5
    directory = files.write(tmp_path / "edited")
    words = "config-release: config.json: routed_scaling_factor is 2.5; DeepSeek-V4-Small has 1.5: Pro's config.json?"
    assert words in megamoe.load(directory).notes[0]
    assert words in [f"{one.rule}: {one.text}" for one in plan(directory, ConvertOptions()).warnings]


def test_no_yarn_is_said_when_a_model_is_loaded(tmp_path):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", "preview"))
    del files.config["rope_scaling"]
    assert any("run without YaRN" in note for note in megamoe.load(files.write(tmp_path / "edited")).notes)
