# SPDX-License-Identifier: Apache-2.0
"""The inventory: published numbers of tensors and bytes, and what each part of a draft holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megamoe.models.deepseek_v4.config import parse_config
from megamoe.models.deepseek_v4.inventory import DSparkDraft, inventory

from ...fake_files import fake
from . import checkpoints

PUBLISHED = [
    ("flash", "preview", 69_187, 159_609_485_896),
    ("pro", "preview", 145_116, 864_704_792_696),
    ("flash", "dspark", 72_317, 166_878_536_440),
    ("pro", "dspark", 149_782, 892_727_580_904),
    ("flash", "nvidia", 135_235, 168_266_793_544),
    ("pro", "nvidia", 285_660, 913_061_485_688),
]


@pytest.mark.parametrize(("model", "layout", "num_tensors", "num_bytes"), PUBLISHED)
def test_published_totals(model, layout, num_tensors, num_bytes):
    tensors = list(fake.tensors_of(parse_config(fake.config_of(model, layout)), layout))
    assert (len(tensors), sum(tensor.num_bytes for tensor in tensors)) == (num_tensors, num_bytes)
    assert len({tensor.name for tensor in tensors}) == num_tensors


def test_the_fakes_configurations_are_the_releases():
    for model, raw in (("flash", checkpoints.FLASH), ("pro", checkpoints.PRO)):
        assert parse_config(fake.config_of(model, "preview")) == parse_config(raw)


def test_heads_and_taps_of_dspark_lie_in_the_last_and_first_stage():
    config = parse_config(checkpoints.FLASH)
    backbone = {entry.name for entry in inventory(config)}
    draft = {entry.name: entry.shape for entry in inventory(config, dspark=DSparkDraft(3, 3, 256))}
    own = {name: shape for name, shape in draft.items() if name not in backbone}
    assert all(name.startswith("mtp.") for name in own)
    assert own["mtp.0.main_proj"] == (4096, 3 * 4096) and "mtp.1.main_proj" not in own
    assert own["mtp.2.markov_head.markov_w1.weight"] == (129280, 256) and "mtp.1.norm.weight" not in own
    assert own["mtp.2.confidence_head.proj.weight"] == (1, 4096 + 256)
    assert not any(name.endswith(("e_proj", "h_proj", "enorm.weight")) for name in own)


def test_headers_names_and_inventory_need_no_torch():
    code = (
        "import sys; import megamoe.verify.checkpoint_report; "
        "sys.exit(bool({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
