# SPDX-License-Identifier: Apache-2.0
"""On a GPU: what the runner of decode steps promises, with work of a few launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megamoe.engine.runner import Graphs, runner_for
from megamoe.kernels.store import store_for, target_of
from megamoe.ops.rms_norm import rms_norm

from ..gpu_watch import quiet

pytestmark = pytest.mark.gpu

WIDTH = 256


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, WIDTH, device="cuda", dtype=torch.bfloat16)


@pytest.fixture
def work(x: torch.Tensor) -> Iterator[Callable[[int], Callable[[], tuple[torch.Tensor, torch.Tensor]]]]:
    weight = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)

    def of(bucket: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            once = rms_norm(x[:bucket], weight, eps=1e-6)
            return once, rms_norm(once, weight, eps=1e-6)

        return run

    yield of


def test_a_bucket_is_called_once_and_replayed_from_then_on(x: torch.Tensor, work) -> None:
    runner = runner_for(torch.device("cuda"))
    assert isinstance(runner, Graphs)
    for bucket in (8, 4):
        wanted = [part.clone() for part in work(bucket)()]
        assert all(map(torch.equal, runner(bucket, work(bucket)), wanted))
    assert runner.buckets == [4, 8] and 0 < runner.num_bytes <= 8 * 2**20
    kept = runner(8, work(8))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        torch.cuda.synchronize()
        with quiet() as seen:
            hidden, logits = runner(8, work(8))
        assert seen.launches == 0 and seen.allocations == 0 and seen.segments == 0
        assert hidden.data_ptr() == kept[0].data_ptr() and logits.data_ptr() == kept[1].data_ptr()
        assert all(map(torch.equal, (hidden, logits), work(8)()))
    x.copy_(torch.randn_like(x))
    before = kept[1].clone()
    assert all(map(torch.equal, runner(4, work(4)), work(4)()))
    assert torch.equal(kept[1], before), "the graph of another bucket overwrote results that were kept"


def test_after_the_seal_a_new_bucket_is_refused(work) -> None:
    runner = Graphs(torch.device("cuda"))
    runner(2, work(2))
    runner.seal()
    runner(2, work(2))
    with pytest.raises(RuntimeError, match="a step of 3 tokens was not captured before ready; captured are 2. Add"):
        runner(3, work(3))


def test_what_is_not_quiet_is_noticed(x: torch.Tensor, work) -> None:
    with quiet() as seen:
        work(8)()
    assert seen.launches == 2 and seen.allocations == 2
    with pytest.raises(RuntimeError), quiet():
        x.sum().item()
    assert store_for(target_of(torch.device("cuda"))).num_taken > 0
