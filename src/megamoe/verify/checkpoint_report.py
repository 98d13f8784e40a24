# SPDX-License-Identifier: Apache-2.0
"""Print an inspection of a checkpoint, as tables or as one JSON object, with a plan of the memory it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megamoe.checkpoint.hashing import Hashed, check_hashes
from megamoe.checkpoint.progress import ProgressLine
from megamoe.models import find_checkpoint
from megamoe.models.deepseek_v4.memory import CACHE_FORMATS, CachePlan, Split, cache_plan, can_split
from megamoe.models.deepseek_v4.rules import MAX_NAMED, Finding, group
from megamoe.verify.checkpoint import GroupCount, Inspection, Verdict, inspect_checkpoint
from megamoe.verify.vllm_view import VERSION, VllmView

DEFAULT_GPUS = (1, 2, 4, 8)
DEFAULT_GPU_MEMORY_GB = (80.0, 141.0, 192.0)
DEFAULT_CONTEXTS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
USABLE = 0.9  # of a GPU's memory; the rest is for activations, workspaces and the CUDA context
PIPE_WIDTH = 120
GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What the memory plan is asked for; None means the default choices.

    Attributes:
        gpus: number of GPUs.
        gpu_memory_gb: memory of one GPU in 10^9 bytes.
        context: tokens of a sequence.
        sequences: how many sequences must fit.
    """

    gpus: int | None = None
    gpu_memory_gb: float | None = None
    context: int | None = None
    sequences: int | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """How many sequences fit on some GPUs.

    Attributes:
        split: how weights are divided.
        gpus: number of GPUs.
        gpu_memory_gb: memory of one.
        weight_bytes: weights on the GPU that holds most, or None where they cannot be divided so.
        free_bytes: what is left on it for caches; negative where the weights do not fit.
        sequences: context -> sequences on all GPUs together.
    """

    split: Split
    gpus: int
    gpu_memory_gb: float
    weight_bytes: int | None
    free_bytes: int
    sequences: dict[int, int]


def run(
    directory: str | os.PathLike[str],
    request: PlanRequest,
    *,
    as_json: bool,
    with_hashes: bool = False,
    with_vllm: bool = False,
) -> int:
    """Inspect a checkpoint and print what was found.

    Args:
        directory: a checkpoint's folder, or "tiny" for the bundled model.
        request: what the memory plan is asked for.
        as_json: print one JSON object.
        with_vllm: say what vLLM takes the checkpoint for.
        with_hashes: read every file that a hub cache names by its hash, and compare.

    Returns:
        Exit code: 0 good, 1 findings, 2 unreadable.
    """
    where = find_checkpoint(directory, "inspect")
    with _no_garbage_collection():
        inspection = inspect_checkpoint(where)
    if with_hashes:
        inspection = add_hashes(inspection)
    if not with_vllm:
        inspection = dataclasses.replace(inspection, vllm=None)
    if as_json:
        print(json.dumps(report(inspection, request)))
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        if console.is_terminal:
            _print(inspection, request, console)
        else:
            console.width = PIPE_WIDTH
            with console.capture() as capture:
                _print(inspection, request, console)
            for line in capture.get().splitlines():
                print(line.rstrip())
    return inspection.verdict.value


def add_hashes(inspection: Inspection) -> Inspection:
    """Return an inspection with what the names of blobs in a hub cache prove."""
    line = ProgressLine("hash")
    try:
        hashed = check_hashes(inspection.directory, line)
    finally:
        line.close()
    findings = (*inspection.findings, *group(hashed.problems))
    verdict = Verdict.FINDINGS if findings and inspection.verdict is Verdict.GOOD else inspection.verdict
    return dataclasses.replace(inspection, findings=findings, verdict=verdict, hashed=hashed)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the cycle collector off: a million small objects live to the end, and walking them costs a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def fits(inspection: Inspection, plan: CachePlan, request: PlanRequest) -> list[Fit]:
    """Return how many sequences fit, for every split, memory size and number of GPUs asked for."""
    config, weights = inspection.config, inspection.weights
    if config is None or weights is None:
        return []
    out = []
    memories = DEFAULT_GPU_MEMORY_GB if request.gpu_memory_gb is None else (request.gpu_memory_gb,)
    for split in Split:
        for memory in memories:
            for gpus in DEFAULT_GPUS if request.gpus is None else (request.gpus,):
                can = can_split(config, gpus, split)
                held = weights.per_gpu(gpus, split) if can else None
                free = int(memory * 1e9 * USABLE) - held if held is not None else 0
                replicas = gpus if split is Split.DATA else 1
                sequences = {
                    context: max(free, 0) // plan.sequence_bytes(context) * replicas
                    for context in contexts(inspection, request)
                }
                out.append(Fit(split, gpus, memory, held, free, sequences))
    return out


def contexts(inspection: Inspection, request: PlanRequest) -> tuple[int, ...]:
    """Return the context lengths to plan for."""
    if request.context is not None:
        return (request.context,)
    longest = inspection.config.max_position_embeddings if inspection.config else 0
    return tuple(context for context in DEFAULT_CONTEXTS if context <= longest) or (longest,)


# JSON.


def report(inspection: Inspection, request: PlanRequest) -> dict[str, Any]:
    """Return everything as JSON content."""
    return {
        "directory": str(inspection.directory),
        "verdict": inspection.verdict.name.lower(),
        "architecture": inspection.architecture,
        "release": inspection.release,
        "layout": inspection.layout,
        "draft": inspection.draft,
        "tensors": {
            "found": inspection.num_tensors,
            "expected": inspection.expected_tensors,
            "published": inspection.published[0] if inspection.published else None,
        },
        "bytes": {
            "found": inspection.num_bytes,
            "expected": inspection.expected_bytes,
            "published": inspection.published[1] if inspection.published else None,
        },
        "groups": {name: _group_json(count) for name, count in inspection.groups.items()},
        "findings": [finding.as_json() for finding in inspection.findings],
        "notes": [note.as_json() for note in inspection.notes],
        "sampled": dataclasses.asdict(inspection.sampled) if inspection.sampled else None,
        "hashes": None if inspection.hashed is None else _hashes_json(inspection.hashed),
        "vllm": None if inspection.vllm is None else {"version": VERSION, **dataclasses.asdict(inspection.vllm)},
        "memory": _memory_json(inspection, request),
    }


def _hashes_json(hashed: Hashed) -> dict[str, Any]:
    return {"proved": list(hashed.proved), "not_compared": list(hashed.not_compared)}


def _group_json(count: GroupCount) -> dict[str, Any]:
    return {"formats": dict(count.formats), "tensors": count.num_tensors, "bytes": count.num_bytes}


def _memory_json(inspection: Inspection, request: PlanRequest) -> dict[str, Any] | None:
    config, weights = inspection.config, inspection.weights
    if config is None or weights is None:
        return None
    plans = [cache_plan(config, form, num_draft_layers=inspection.num_draft_layers) for form in CACHE_FORMATS]
    return {
        "weights": {**dataclasses.asdict(weights), "total": weights.total},
        "cache": [
            {
                "format": plan.format.name,
                "bytes_per_token": plan.bytes_per_token,
                "fixed_bytes": {
                    "window": plan.window_bytes,
                    "draft_window": plan.draft_window_bytes,
                    "compressor": plan.compressor_bytes,
                },
                "sequence_bytes": {str(one): plan.sequence_bytes(one) for one in contexts(inspection, request)},
            }
            for plan in plans
        ],
        "usable_share": USABLE,
        "fits": [
            {
                "cache": plan.format.name,
                "split": fit.split.value,
                "gpus": fit.gpus,
                "gpu_memory_gb": fit.gpu_memory_gb,
                "weight_bytes_per_gpu": fit.weight_bytes,
                "free_bytes_per_gpu": fit.free_bytes if fit.weight_bytes is not None else None,
                "sequences": {str(context): count for context, count in fit.sequences.items()},
                "enough": _is_enough(fit, request),
            }
            for plan in plans
            for fit in fits(inspection, plan, request)
        ],
    }


def _is_enough(fit: Fit, request: PlanRequest) -> bool | None:
    """Say whether as many sequences fit as were asked for; None where nothing was asked."""
    if request.sequences is None:
        return None
    return min(fit.sequences.values()) >= request.sequences


# Text.


def _print(inspection: Inspection, request: PlanRequest, console: Console) -> None:
    _print_summary(inspection, console)
    if inspection.groups:
        console.print()
        console.print(_groups_table(inspection))
        console.print()
    _print_findings("findings", inspection.findings, console, "bold red")
    _print_findings("notes", inspection.notes, console, "bold")
    if inspection.sampled is not None and inspection.sampled.num_bytes:
        sampled = inspection.sampled
        console.print(
            f"looked at: {sampled.scalars:,} of {sampled.all_scalars:,} scalar scales, at most 4 KiB of each of "
            f"{sampled.scales:,} block-scale tensors and of {sampled.values:,} matrices, norms and tables "
            f"({sampled.num_bytes:,} bytes); load reads all of them"
        )
    if inspection.vllm is not None:
        _print_vllm(inspection.vllm, console)
    if inspection.hashed is not None:
        proved, others = inspection.hashed.proved, inspection.hashed.not_compared
        console.print(
            f"hashes: {_count(len(proved), 'file')} proved by the hash that names the blob; "
            f"{_count(len(others), 'file')} no link to such a blob, not compared"
        )
    if inspection.config is not None and inspection.weights is not None:
        _print_memory(inspection, request, console)
    words = {
        Verdict.GOOD: "good: nothing wrong was found",
        Verdict.FINDINGS: f"{_count(len(inspection.findings), 'finding')}",
        Verdict.UNREADABLE: "unreadable: this cannot be judged as a DeepSeek-V4 checkpoint",
    }
    style = "bold green" if inspection.verdict is Verdict.GOOD else "bold red"
    console.print(Text(words[inspection.verdict], style=style))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _print_summary(inspection: Inspection, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("checkpoint", str(inspection.directory))
    table.add_row("architecture", inspection.architecture)
    table.add_row("release", inspection.release)
    table.add_row("layout", inspection.layout)
    table.add_row("draft", inspection.draft)
    for name, found, expected, place in (
        ("tensors", inspection.num_tensors, inspection.expected_tensors, 0),
        ("bytes", inspection.num_bytes, inspection.expected_bytes, 1),
    ):
        said = f"{found:,}"
        if expected is not None:
            said += " as expected" if found == expected else f", expected {expected:,} ({found - expected:+,})"
        if inspection.published is not None:
            published = inspection.published[place]
            said += " and published" if found == published == expected else f", published {published:,}"
        table.add_row(name, said)
    console.print(table)


def _print_vllm(view: VllmView, console: Console) -> None:
    console.print(Text(f"read by vLLM {VERSION}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("architecture", "quantization", "experts", "linears", "draft", "cache"):
        table.add_row(f"  {name}", getattr(view, name))
    console.print(table)
    for one in view.differences:
        console.print(Padding(Text(f"differs: {one}"), (0, 0, 0, 2), expand=False))
    if not view.differences:
        console.print("  no difference: it reads every weight as what it is")
    console.print()


def _groups_table(inspection: Inspection) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("module group")
    table.add_column("format (modules)", overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    for name, count in inspection.groups.items():
        formats = ", ".join(f"{form} ({number:,})" for form, number in count.formats.most_common())
        table.add_row(name, formats, f"{count.num_tensors:,}", f"{count.num_bytes:,}")
    return table


def _print_findings(title: str, findings: tuple[Finding, ...], console: Console, style: str) -> None:
    if not findings:
        return
    console.print(Text(f"{title} ({len(findings)})", style=style))
    for finding in findings:
        fault = f"{finding.fault} " if finding.fault and not finding.is_note else ""
        more = f"  × {len(finding.subjects):,}" if len(finding.subjects) > 1 else ""
        console.print(Padding(Text(f"{fault}{finding.rule}{more}", style="bold"), (0, 0, 0, 2), expand=False))
        console.print(Padding(Text(finding.text), (0, 0, 0, 4), expand=False))
        if len(finding.subjects) > 1 and not finding.is_note:
            others = finding.subjects[1 : 1 + MAX_NAMED]
            rest = len(finding.subjects) - 1 - len(others)
            said = f"also {', '.join(others)}{f' and {rest:,} more (all with --json)' if rest else ''}"
            console.print(Padding(Text(said), (0, 0, 0, 4), expand=False))
        if finding.remedy:
            console.print(Padding(Text(f"→ {finding.remedy}"), (0, 0, 0, 4), expand=False))
    console.print()


def _print_memory(inspection: Inspection, request: PlanRequest, console: Console) -> None:
    assert inspection.config is not None and inspection.weights is not None
    weights = inspection.weights
    console.print(Text("\nmemory plan", style="bold"))
    console.print(
        f"weights as stored: {_size(weights.total)} = routed experts {_size(weights.experts)} + what tensor "
        f"parallelism divides {_size(weights.divided)} + the rest {_size(weights.replicated)}\n"
    )
    chosen = contexts(inspection, request)
    plans = [
        cache_plan(inspection.config, form, num_draft_layers=inspection.num_draft_layers) for form in CACHE_FORMATS
    ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("one sequence", no_wrap=True)
    for header in ("bytes/token", "window", "draft", "compressor", *(f"at {_tokens(context)}" for context in chosen)):
        table.add_column(header, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(
            plan.format.name,
            f"{int(plan.bytes_per_token):,}",
            _size(plan.window_bytes),
            _size(plan.draft_window_bytes),
            _size(plan.compressor_bytes),
            *(_size(plan.sequence_bytes(context)) for context in chosen),
        )
    console.print(table)
    found = fits(inspection, plans[0], request)
    for split in Split:
        console.print(f"\n{split.value}\n")
        console.print(_fits_table([fit for fit in found if fit.split is split], chosen, request))
    console.print()
    console.print(
        f"Sequences on all GPUs together, cache as {plans[0].format.name}. {USABLE:.0%} of each GPU is planned for "
        "weights and caches; GB is 10^9 bytes. The cache is one latent for all heads: tensor parallelism does not "
        "divide it."
    )
    console.print()


def _fits_table(found: list[Fit], chosen: tuple[int, ...], request: PlanRequest) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("GPUs", justify="right")
    table.add_column("weights/GPU", justify="right")
    for context in chosen:
        table.add_column(f"at {_tokens(context)}", justify="right")
    if request.sequences is not None:
        table.add_column(f"{request.sequences:,} fit", justify="right")
    for fit in found:
        row = [f"{fit.gpus} × {fit.gpu_memory_gb:g} GB"]
        if fit.weight_bytes is None:
            row += ["cannot be divided", *["–"] * len(chosen)]
        elif fit.free_bytes < 0:
            row += [_size(fit.weight_bytes), *["no room"] * len(chosen)]
        else:
            row += [_size(fit.weight_bytes), *(f"{fit.sequences[context]:,}" for context in chosen)]
        if request.sequences is not None:
            row.append("yes" if _is_enough(fit, request) else "no")
        table.add_row(*row)
    return table


def _tokens(count: int) -> str:
    if count % MIB == 0:
        return f"{count // MIB}M"
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def _size(num_bytes: int) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:,.2f} GiB"
    return f"{num_bytes / MIB:,.1f} MiB"
