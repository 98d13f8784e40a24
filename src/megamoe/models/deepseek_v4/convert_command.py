# SPDX-License-Identifier: Apache-2.0
"""What `megamoe convert` prints: progress on standard error, a summary or JSON on standard output."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch

from megamoe.checkpoint.problem import CheckpointError
from megamoe.checkpoint.progress import ProgressLine
from megamoe.models.deepseek_v4.convert import (
    UNCALIBRATED_INPUT_SCALE,
    ConvertOptions,
    Planned,
    SearchChoice,
    convert,
    plan,
)
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.rules import check_accept


def run(
    source: pathlib.Path,
    destination: pathlib.Path,
    *,
    to: str,
    experts: str,
    attention: str,
    draft: str,
    scale_search: str,
    calibration: pathlib.Path | None,
    jobs: int,
    proof: str,
    accept: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    version: str,
) -> int:
    """Convert, or with dry_run only check; returns the exit code.

    Raises:
        ValueError: anything the user can put right.
    """
    torch.set_num_threads(1)  # `jobs` threads share the cores already
    options = ConvertOptions(
        to=to,
        experts=experts,
        attention=attention,
        draft=draft,
        scale_search=SearchChoice.parse(scale_search),
        calibration=None if calibration is None else read_calibration(calibration),
        proof=proof,
        accept=check_accept(accept),
        producer=("megamoe", version),
    )
    lines: list[ProgressLine] = []

    def show(label: str) -> ProgressLine:
        lines.append(ProgressLine(label))
        return lines[-1]

    try:
        if dry_run:
            planned = plan(source, options, jobs=jobs, progress=show("check"))
            summary = _summary(planned)
        else:
            planned, result = convert(source, destination, options, jobs=jobs, progress=show)
            summary = {
                **_summary(planned),
                "proved_exact": sum(1 for record in result.records if record["method"] == "recoded"),
                "weights": len(result.records),
                "shards_kept": result.shards_kept,
                "seconds": round(result.seconds, 3),
                "gb_per_second": round(result.source_bytes / 1e9 / max(result.seconds, 1e-9), 3),
                "report": str(destination / "report.html"),
            }
    finally:
        for line in lines:
            line.close()
    for finding in planned.warnings:
        print(f"megamoe: note: {finding.rule}: {finding}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary))
        return 0
    if any(found is Format.NVFP4 for found in planned.formats.values()) and calibration is None:
        print(
            f"megamoe: note: no calibration: weights that become NVFP4 get input_scale {UNCALIBRATED_INPUT_SCALE}, "
            "which engines with one activation scale per token do not read",
            file=sys.stderr,
        )
    for text in _sentences(summary, destination, dry_run=dry_run):
        print(text)
    return 0


def read_calibration(path: pathlib.Path) -> dict[str, float]:
    """Return the amax by weight of a calibration file.

    Raises:
        CheckpointError: it is not a JSON object of numbers.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"calibration {path}: not JSON ({error}). Calibrate again.") from error
    if not isinstance(content, dict) or not all(type(value) in (int, float) for value in content.values()):
        raise CheckpointError(f"calibration {path}: must be an object of weight names to numbers. Calibrate again.")
    return {str(name): float(value) for name, value in content.items()}


def _summary(planned: Planned) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for found in planned.formats.values():
        counts[found.value] = counts.get(found.value, 0) + 1
    return {
        "source_bytes": planned.source_bytes,
        "made_bytes": planned.plan.num_bytes,
        "files": len(planned.plan.shards),
        "formats": dict(sorted(counts.items())),
        "warnings": [finding.as_json() for finding in planned.warnings],
        "inexact": {
            name: {"blocks": count, "listed": blocks} for name, (count, blocks) in sorted(planned.inexact.items())
        },
    }


def _sentences(summary: dict[str, Any], destination: pathlib.Path, *, dry_run: bool) -> list[str]:
    formats = ", ".join(f"{count} {name}" for name, count in summary["formats"].items())
    sizes = (
        f"{summary['source_bytes'] / 1e9:.3f} GB -> {summary['made_bytes'] / 1e9:.3f} GB in {summary['files']} file(s)"
    )
    texts = [f"{'would write' if dry_run else 'wrote'} {destination}: {sizes}; weights: {formats}"]
    if summary["inexact"]:
        blocks = sum(entry["blocks"] for entry in summary["inexact"].values())
        texts.append(f"{blocks} blocks in {len(summary['inexact'])} weights have no equal and are rounded:")
        texts += [
            f"  {name}: {entry['blocks']} blocks, first [row, block] {entry['listed'][0]}"
            for name, entry in summary["inexact"].items()
        ]
    if not dry_run:
        texts.append(
            f"{summary['proved_exact']} of {summary['weights']} converted weights proved equal to the source, "
            f"block by block; report: {summary['report']}"
        )
        kept = f"; {summary['shards_kept']} file(s) were finished before" if summary["shards_kept"] else ""
        texts.append(f"{summary['seconds']:.1f} s, {summary['gb_per_second']:.2f} GB/s of source read{kept}")
    return texts
