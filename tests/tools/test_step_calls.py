# SPDX-License-Identifier: Apache-2.0
"""How many launches a step of Flash is: every operation is of the size of a launch, and nothing stands beside them."""

from __future__ import annotations

import collections
import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megamoe.models.deepseek_v4 import block as block_module
from megamoe.models.deepseek_v4.config import parse_config
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.models.recipe import get_recipe

from ..fake_files import REPOSITORY, fake


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/step_calls.py as a module."""
    path = REPOSITORY / "tools" / "step_calls.py"
    spec = importlib.util.spec_from_file_location("step_calls", path)
    assert spec is not None and spec.loader is not None and fake.__name__ == "fake_checkpoint"
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_calls"] = module
    spec.loader.exec_module(module)
    return module


def record(tool: ModuleType, model: str = "flash", recipe: str = "w4a16", **options: Any) -> list[Any]:
    return tool.record_step(parse_config(fake.CONFIGS[model]), get_recipe(recipe), **options)  # type: ignore[no-any-return]


def test_a_decode_step_of_flash(tool: ModuleType) -> None:
    """The targets: at most 650 calls, no glue, 900 nodes, 24 of a CSA layer; and what they are exactly."""
    events = record(tool)
    calls, glue, nodes = tool.totals(events)
    assert calls <= 650 and glue == 0 and nodes <= 900
    rows = tool.by_kind(events)
    assert rows["CSA"] == (21, 16, 0, 22)
    assert rows["HCA"] == (20, 13, 0, 18)
    assert rows["SWA"] == (2, 11, 0, 16)
    assert rows["model"] == (1, 6, 0, 6)
    assert (calls, nodes) == (624, 860)
    assert "| CSA | 21 | 16 | 0 | 22 |" in tool.report(events, with_list=False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("flash", {}),
        ("flash", {"plain": True}),
        ("flash", {"num_tokens": 6}),
        ("flash", {"num_tokens": 200}),
        ("pro", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["exact", "w4a16", "w4a4"])
def test_nothing_a_step_does_bypasses_pick(tool: ModuleType, model: str, options: dict[str, Any], recipe: str) -> None:
    """In decoding, with drafts and in a chunk that lies in the step area: the meta device has no value to read."""
    events = record(tool, model, recipe, **options)
    assert [event.op for event in events if event.is_glue] == []
    assert tool.by_kind(events)["CSA"][1] <= 24


def test_every_call_of_a_step_is_a_call_site_of_the_table(tool: ModuleType) -> None:
    assert {event.op for event in record(tool)} <= {call.op for call in op_calls("flash")}


def test_a_matrix_wider_than_one_launch_is_two_nodes(tool: ModuleType) -> None:
    """wo_b of Pro has 16,384 columns."""
    events = [event for event in record(tool, "pro") if event.op == "nvfp4_weight_only_linear"]
    assert collections.Counter(event.nodes for event in events) == {1: 2 * 61, 2: 61}


def test_what_stands_beside_operations_is_found(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product, and a copy that a reshape makes, in every feed-forward part; a view and an allocation are neither."""
    right = block_module.Moe.__call__

    def wrong(self: Any, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        y = right(self, x * 2.0, token_ids)
        torch.empty_like(y)
        return y.view(1, -1, 2).transpose(0, 2).reshape(y.shape)

    monkeypatch.setattr(block_module.Moe, "__call__", wrong)
    events = record(tool)
    assert collections.Counter(event.op for event in events if event.is_glue) == {"mul": 43, "clone": 43}
    assert tool.totals(events) == (624, 86, 860 + 86)


def test_a_host_read_is_an_error(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_module.Moe.__call__
    monkeypatch.setattr(
        block_module.Moe, "__call__", lambda self, x, ids: right(self, x, ids) if int(ids.max()) >= 0 else x
    )
    with pytest.raises(RuntimeError, match="meta"):
        record(tool)


def test_the_command(tool: ModuleType, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["--list"])
    said = capsys.readouterr().out
    assert "| step | | 624 | 0 | 860 |" in said and "| CSA | write_index_keys | 1 |" in said
    tool.main(["--config", str(REPOSITORY / "src/megamoe/models/deepseek_v4/tiny"), "--recipe", "w4a4"])
    assert "| HCA | 1 |" in capsys.readouterr().out
