# SPDX-License-Identifier: Apache-2.0
"""The training form of the bundled model is a second implementation: same logits and same MTP logits in fp32.

It is batched, stateless and written apart from the package (tools/tiny_model/model.py); transformers has no MTP layer,
so this is the check of ours.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import megamoe
from megamoe.checkpoint.overlay import write_overlay
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.models.load import BUNDLED
from megamoe.text.tokenizer import Tokenizer

TOOLS = pathlib.Path(__file__).parents[3] / "tools" / "tiny_model"
NUM_TOKENS = 384  # a multiple of the window; 96 entries, of which the top-k drops a third


def training_module() -> ModuleType:
    """Import tools/tiny_model/model.py, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("tiny_model_training", TOOLS / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(TOOLS))  # for its own imports
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("master")
    write_overlay(BUNDLED["tiny"], TOOLS / "master", directory)
    return directory


def test_logits_and_drafts_equal_the_training_model(master: pathlib.Path) -> None:
    training = training_module()
    theirs = training.Model(training.Config.load(TOOLS / "config.json")).eval()
    with CheckpointReader(master) as reader:
        theirs.load_state_dict({name: reader.tensor(name) for name in reader.names})
    text = (BUNDLED["tiny"] / "sample.txt").read_text(encoding="utf-8")
    ids = torch.tensor([0, *Tokenizer(master).encode(text)])[: NUM_TOKENS + 1]
    ours = megamoe.load(master, recipe="exact")
    with torch.no_grad():
        mode = training.Mode(select="topk")
        streams = theirs.streams(ids[None, :-1], mode)
        want = F.linear(theirs.collapse(streams, theirs.config), theirs.head.weight)[0]
        embedded = F.embedding(ids[None, 1:], theirs.embed.weight)
        everything = theirs.logits(ids[None, :-1], training.Mode(select="all"))[0]
        want_draft = F.linear(theirs.mtp[0].hidden(streams, embedded, ids[None, 1:], mode), theirs.head.weight)[0]

        cache = ours.new_cache(max_tokens=NUM_TOKENS)
        parts = [ours.advance(part, cache) for part in ids[:-1].split([200, 184])]
        got = torch.cat([ours.head(part) for part in parts])
        got_draft = torch.cat(
            [ours.draft(part, n, cache)[0] for part, n in zip(parts, ids[1:].split([200, 184]), strict=True)]
        )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    torch.testing.assert_close(got_draft, want_draft, rtol=0, atol=2e-3)
    assert float((everything - want).abs().max()) > 2e-2, "the top-k must matter here"
