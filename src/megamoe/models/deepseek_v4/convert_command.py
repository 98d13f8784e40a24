# SPDX-License-Identifier: Apache-2.0
"""What `megamoe convert` prints: progress on standard error, a summary or JSON on standard output."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch

from megamoe.checkpoint.manifest import verify_written
from megamoe.checkpoint.problem import CheckpointError
from megamoe.checkpoint.progress import ProgressLine
from megamoe.models import find_checkpoint
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
    source: str,
    destination: str,
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
    verify: bool,
    as_json: bool,
    version: str,
) -> int:
    """Convert, or with dry_run only check, or with verify read what was written; returns the exit code.

    Raises:
        ValueError: anything the user can put right.
    """
    if not destination.strip():
        raise CheckpointError(f"convert: no destination named (got {destination!r}). Pass a folder to write.")
    target = pathlib.Path(destination).expanduser()
    if verify:
        return _verify(target, as_json=as_json)
    where = find_checkpoint(source, "convert")
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
            planned = plan(where, options, jobs=jobs, progress=show("check"))
            summary = _summary(planned)
        else:
            planned, result = convert(where, target, options, jobs=jobs, progress=show)
            summary = {
                **_summary(planned),
                "proved_exact": sum(1 for record in result.records if record["method"] == "recoded"),
                "weights": len(result.records),
                "shards_kept": result.shards_kept,
                "weights_kept": result.records_kept,
                "seconds": round(result.seconds, 3),
                "gb_per_second": round(result.source_bytes / 1e9 / max(result.seconds, 1e-9), 3),
                "report": str(target / "report.html"),
            }
    except KeyboardInterrupt:
        for line in lines:
            line.close()
        if not dry_run:
            told = "megamoe: stopped; give the same command again, and it goes on: finished files are kept"
            print(told, file=sys.stderr)
        raise
    finally:
        for line in lines:
            line.close()
    if planned.left_out:
        print(
            f"megamoe: note: weights in other formats are not carried over: {', '.join(planned.left_out)}",
            file=sys.stderr,
        )
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
    for text in _sentences(summary, target, dry_run=dry_run):
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
        "other_files": len(planned.plan.files),
        "other_file_bytes": planned.plan.file_bytes,
        "left_out": list(planned.left_out),
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
    texts.append(f"and {summary['other_files']} other file(s) of {summary['other_file_bytes'] / 1e6:.1f} MB")
    if not dry_run:
        texts += _proofs(summary)
        texts.append(f"{summary['seconds']:.1f} s, {summary['gb_per_second']:.2f} GB/s of source read")
    return texts


def _proofs(summary: dict[str, Any]) -> list[str]:
    """Say what was proved, and what was kept and not read."""
    kept, proved, weights = summary["weights_kept"], summary["proved_exact"], summary["weights"]
    if not summary["shards_kept"]:
        return [
            f"{proved} of {weights} converted weights proved equal to the source, block by block; report: "
            f"{summary['report']}"
        ]
    files = f"{summary['shards_kept']} file(s) were finished before"
    return [
        f"{weights - kept} of {weights} converted weights were read and written in this run; {kept} are in files that "
        f"were kept and not read: {files}, --verify reads them",
        f"{proved} of {weights} proved equal to the source when they were written; report: {summary['report']}",
    ]


def _verify(destination: pathlib.Path, *, as_json: bool) -> int:
    """Compare what was written with the manifest and print the result; 1 when a file differs."""
    line = ProgressLine("verify")
    try:
        found = verify_written(destination, line)
    finally:
        line.close()
    if as_json:
        print(json.dumps({"files": found.num_files, "bytes": found.num_bytes, "problems": list(found.problems)}))
        return 1 if found.problems else 0
    for problem in found.problems:
        print(problem)
    if found.problems:
        print(
            f"{len(found.problems)} of {found.num_files} files are not as they were written. Remove them and convert "
            "again."
        )
        return 1
    print(f"{found.num_files} files, {found.num_bytes / 1e9:.3f} GB: every byte is as it was written (SHA-256)")
    return 0
