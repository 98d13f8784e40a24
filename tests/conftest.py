# SPDX-License-Identifier: Apache-2.0
"""What every test shares: a seed of its own, one thread per process, reproducible hypothesis examples."""

from __future__ import annotations

import os
import pathlib
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads: the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session", autouse=True)
def pack() -> None:
    """Open the pack that MEGAMOE_TEST_PACK names, where a GPU has no DSL to compile with."""
    named = os.environ.get("MEGAMOE_TEST_PACK")
    if named and torch.cuda.is_available():
        import megamoe
        from megamoe.kernels.store import store_for, target_of

        store_for(target_of(torch.device("cuda"))).use_pack(pathlib.Path(named), version=megamoe.__version__)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that belongs to this test: the same in every run and on every machine, another for every test."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the repository."""
    return pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with the tokenizer.json of a FakeModel."""
    from .fakes import write_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory
