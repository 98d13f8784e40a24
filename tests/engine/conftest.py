# SPDX-License-Identifier: Apache-2.0
"""What tests of the engine on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megamoe.kernels.store import store_for, target_of

from ..lent import lend


@pytest.fixture
def sealed_no_longer() -> Iterator[None]:
    """Open the process's store again after a test that seals it."""
    yield
    store_for(target_of(torch.device("cuda"))).reopen()


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lend operations without a kernel for this GPU their references; return which."""
    return lend(monkeypatch)
