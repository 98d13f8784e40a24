# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for compiled objects, so that packs and stores are tested where no compiler is installed."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from megamoe.kernels.compile import Built, Request
from megamoe.kernels.rows import quantize_fp8_rows, rms_norm

REQUESTS = [
    Request.of(rms_norm.Config(4096, "bf16", "bf16", "bf16")),
    Request.of(rms_norm.Config(512, "bf16", None, "bf16")),
    Request.of(quantize_fp8_rows.Config(4096, "bf16")),
]


class FakeCompiler:
    """Writes a file per request that says what it is, and counts."""

    def __init__(self) -> None:
        self.compiled: list[Request] = []

    def __call__(self, requests: Sequence[Request], target: str, directory: pathlib.Path) -> list[Built]:
        built = []
        for request in requests:
            path = directory / f"{request.symbol}.so"
            path.write_text(f"{request} for {target}")
            self.compiled.append(request)
            built.append(Built(request, path, 1.5))
        return built
