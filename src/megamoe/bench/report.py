# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints: a Markdown table, CSV rows, and one JSON document with everything about the machine."""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

import megamoe
from megamoe.bench.timing import Timing


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation at one shape.

    Attributes:
        op, shape, num_tokens: what ran.
        ceiling_us: bytes over the copy bandwidth of this run, or products over its matrix rate, whichever is more.
        num_bytes, flops: what the ceiling counts.
        kernel: our time.
        baseline_name, baseline: what it was interleaved with, or None.
        public_name, public: the public kernel it was interleaved with, version included, or "" and None.
        public_note: why there is no time of it.
    """

    op: str
    shape: str
    num_tokens: int
    ceiling_us: float
    num_bytes: int
    flops: int
    kernel: Timing
    baseline_name: str | None
    baseline: Timing | None
    public_name: str = ""
    public: Timing | None = None
    public_note: str = ""

    @property
    def share(self) -> float:
        """Share of the ceiling that was reached."""
        return self.ceiling_us / self.kernel.median_us

    @property
    def speedup(self) -> float | None:
        """Baseline time over ours."""
        return None if self.baseline is None else self.baseline.median_us / self.kernel.median_us

    def flat(self) -> dict[str, Any]:
        """Return the row as CSV writes it."""
        return {
            "op": self.op,
            "shape": self.shape,
            "num_tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "flops": self.flops,
            "ceiling_us": round(self.ceiling_us, 3),
            "kernel_us": round(self.kernel.median_us, 3),
            "kernel_low_us": round(self.kernel.low_us, 3),
            "kernel_high_us": round(self.kernel.high_us, 3),
            "share_of_ceiling": round(self.share, 4),
            "from_l2": self.kernel.from_l2,
            "baseline": self.baseline_name or "",
            "baseline_us": round(self.baseline.median_us, 3) if self.baseline else "",
            "speedup": round(self.speedup, 3) if self.speedup else "",
            "public": self.public_name,
            "public_us": round(self.public.median_us, 3) if self.public else "",
            "public_note": self.public_note,
        }


def machine(commit: str | None) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    answer = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    return {
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": dict(zip(query.split(","), [one.strip() for one in (answer or "").split(",")], strict=False)),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "megamoe": megamoe.__version__,
        "commit": commit
        or _output(["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"])
        or "unknown",
    }


def _output(command: Sequence[str]) -> str | None:
    """Return what a command prints, or None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


HEADER = (
    "| operation | shape | T | floor us | kernel us | of floor | baseline | us | ratio | public kernel | us |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- | ---: |"
)


def table_line(row: Row) -> str:
    """Return one line of the table."""
    share = f"{100 * row.share:.0f} %{' (L2)' if row.kernel.from_l2 else ''}"
    baseline = f"{row.baseline.median_us:.2f}" if row.baseline else "–"
    ratio = f"{row.speedup:.2f}" if row.speedup else "–"
    public = f"{row.public.median_us:.2f}" if row.public else f"– ({row.public_note})"
    return (
        f"| {row.op} | {row.shape} | {row.num_tokens} | {row.ceiling_us:.2f} | {row.kernel.median_us:.2f} | {share} "
        f"| {row.baseline_name or '–'} | {baseline} | {ratio} | {row.public_name or '–'} | {public} |"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0].flat()) if rows else ["op"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.flat() for row in rows)
    return text.getvalue()


def as_document(rows: Sequence[Row], about: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """Return the JSON document: machine, measured ceilings, rows."""
    content = [{**row.flat(), "kernel": dataclasses.asdict(row.kernel)} for row in rows]
    return {"machine": about, "measured": ceilings, "rows": content}
