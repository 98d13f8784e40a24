# SPDX-License-Identifier: Apache-2.0
"""Kernels against their references, on a GPU: megamoe verify OP… (or all).

Every operation in KERNELS runs at the sizes of models/*/shapes.py with 0 and 1 tokens, one below, at and above a
tile, and a few tiles. For each: the CPU reference of the same inputs, by the operation's rule (verify/comparisons.py,
verify/tolerance.py); outputs poisoned and fenced (verify/guards.py), what is written in place compared with all that
lies around it; a second run over other poison and other addresses gives the same bits; inputs with other
strides and alignments, too; and the last token alone gives the bits it had among the others. Where an operation adds in
another order beyond some number of tokens (OpInputs.order_until), the last tokens are that many and one.

Exit codes: 0 all right · 1 a kernel is wrong, or not all was run · 2 no GPU here, or not the one that was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import torch

import megamoe
from megamoe.kernels import KERNELS
from megamoe.kernels.store import KernelStore, store_for, target_of
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.ops import use
from megamoe.verify.guards import GuardedOutputs, check_fences, fenced
from megamoe.verify.inputs import kernel_inputs
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.values import copied, plain, strided

DONE, WRONG, NO_GPU = 0, 1, 2
POISONS = (0xFF, 0x5A)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One operation at one shape.

    Attributes:
        op, shape, num_tokens: what ran.
        error: None, or what is wrong.
        seconds: for everything done with it.
    """

    op: str
    shape: str
    num_tokens: int
    error: str | None
    seconds: float


class NoGpuError(Exception):
    """There is no GPU that could do it."""


def open_gpu(arch: str | None, pack: pathlib.Path | None) -> KernelStore:
    """Return the kernel store of this machine's GPU, with a pack opened if one is named.

    Raises:
        NoGpuError: there is no GPU, or it is not of the architecture asked for.
    """
    if not torch.cuda.is_available():
        raise NoGpuError("there is no CUDA device here; run it on a machine with one (make test covers the CPU)")
    target = target_of(torch.device("cuda"))
    if arch is not None and arch != target:
        raise NoGpuError(f"the GPU here is {target}, --arch asks for {arch}")
    store = store_for(target)
    if pack is not None:
        store.use_pack(pack, version=megamoe.__version__)
    return store


def known_ops(names: Sequence[str]) -> list[str]:
    """Return the operations named, or all that have a kernel for no name or "all".

    Raises:
        ValueError: one has no kernel.
    """
    unknown = [name for name in names if name not in KERNELS and name != "all"]
    if unknown:
        raise ValueError(f"no kernel for {', '.join(unknown)}; kernels exist for {', '.join(KERNELS)}, or all")
    return list(KERNELS) if not names or "all" in names else list(dict.fromkeys(names))


def token_counts(tile: int) -> tuple[int, ...]:
    """Return the numbers of tokens to run: the edges and a few tiles."""
    return tuple(sorted({0, 1, tile - 1, tile, tile + 1, 4 * tile + 3}))


def cases(op: str) -> Iterator[tuple[OpCall, OpInputs, int]]:
    """Yield every shape, way of calling and number of tokens of an operation."""
    for call in op_shapes(op):
        for inputs in kernel_inputs(op):
            for num_tokens in token_counts(inputs.tile):
                yield call, inputs, num_tokens


def verify_case(call: OpCall, inputs: OpInputs, num_tokens: int, device: str = "cuda") -> None:
    """Run one case in all its variations.

    Args:
        call, inputs, num_tokens: the case.
        device: where the kernel runs; a test of this function itself has none.

    Raises:
        AssertionError: something is wrong.
    """
    op = call.op
    generator = torch.Generator().manual_seed(zlib.crc32(f"{call} {num_tokens}".encode()))
    arguments = inputs.make(call.dims, num_tokens, generator)
    with use("reference"):
        want = inputs.run(_renewed(inputs, arguments, arguments, "cpu"))
    runs = []
    for poison in POISONS:
        on_device = {name: copied(value, device) for name, value in arguments.items()}  # addresses differ each time
        on_device = _renewed(inputs, arguments, on_device, device)
        with GuardedOutputs(poison) as guards:
            got = inputs.run(on_device)
        if device == "cuda":
            torch.cuda.synchronize()
        if guards.num_outputs == 0 and not inputs.written:
            raise AssertionError(f"{op}: allocated no output with torch.empty, so that none could be guarded")
        guards.check(op)
        for name in inputs.written:
            check_fences(op, name, on_device[name])
        inputs.rule(op, got, want, arguments)
        runs.append(got)
    _require_equal(op, runs[0], runs[1], "a second run over other memory gives other bits")
    for shift_bytes in (16, 0):
        again = _renewed(inputs, arguments, on_device, device)
        shifted = {name: strided(value, shift_bytes) for name, value in again.items()}
        what = "16-byte aligned rows" if shift_bytes else "unaligned rows"
        _require_equal(op, runs[0], inputs.run(shifted), f"the same values in {what} at other strides differ")
    if num_tokens > 1:
        until = math.inf if inputs.order_until is None else inputs.order_until(call.dims)
        fewest = 1 if num_tokens <= until else int(until) + 1  # of the same order of sums
        fewest = max(fewest, inputs.together(arguments))
        last = torch.arange(num_tokens - fewest, num_tokens)
        alone = inputs.only(_renewed(inputs, arguments, on_device, device), last)
        among = plain(inputs.part(runs[0], on_device, last))
        single = plain(inputs.part(inputs.run(alone), alone, torch.arange(fewest)))  # by rows on either side
        for name, part in among.items():
            if not torch.equal(part, single[name]):
                raise AssertionError(f"{op}: {name} of the last token depends on the tokens beside it")


def _renewed(inputs: OpInputs, arguments: Arguments, used: Arguments, device: str) -> Arguments:
    """Return used arguments with those that are written in place as they were before, between fences."""
    return {**used, **{name: fenced(arguments[name], device) for name in inputs.written}}


def _require_equal(op: str, got: Any, want: Any, what: str) -> None:
    want_parts = plain(want)
    for name, part in plain(got).items():
        if not torch.equal(part, want_parts[name]):
            raise AssertionError(f"{op}: {name}: {what}")


def verify_ops(names: Sequence[str], *, seconds: float = math.inf, log: TextIO | None = None) -> list[Outcome]:
    """Run every case of some operations and return what came out, printing each operation as it ends.

    Args:
        names: the operations, most important first.
        seconds: after so many, no further case is started.
        log: where to print; None for nowhere.
    """
    outcomes: list[Outcome] = []
    begin = time.perf_counter()
    for op in names:
        first = len(outcomes)
        planned = list(cases(op))
        for call, inputs, num_tokens in planned:
            start = time.perf_counter()
            if start - begin > seconds:
                break
            error = None
            try:
                verify_case(call, inputs, num_tokens)
            except AssertionError as wrong:
                error = str(wrong)
                if log is not None:
                    print(f"WRONG {op} {call} T={num_tokens}: {error}", file=log, flush=True)
            outcomes.append(Outcome(op, str(call), num_tokens, error, time.perf_counter() - start))
        if log is not None:
            mine = outcomes[first:]
            wrong_count, spent = sum(one.error is not None for one in mine), sum(one.seconds for one in mine)
            print(f"| {op} | {len(mine)} of {len(planned)} | {wrong_count} | {spent:.1f} |", file=log, flush=True)
    return outcomes


def run(
    names: Sequence[str],
    *,
    arch: str | None,
    pack: pathlib.Path | None,
    as_json: bool,
    explain: bool = False,
    seconds: float = math.inf,
) -> int:
    """Verify, print a table (with as_json, one JSON object alone) and return the exit code."""
    try:
        ops = known_ops(names)
        store = open_gpu(arch, pack)
    except (NoGpuError, ValueError) as error:
        print(f"megamoe: error: verify: {error}", file=sys.stderr)
        return NO_GPU
    log = sys.stderr if as_json else sys.stdout
    print("| operation | cases | wrong | seconds |\n| --- | --- | --- | --- |", file=log, flush=True)
    outcomes = verify_ops(ops, seconds=seconds, log=log)
    failed = [one for one in outcomes if one.error]
    missing = sum(1 for op in ops for _ in cases(op)) - len(outcomes)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases right on {torch.cuda.get_device_name()}", file=log)
    if missing:
        print(f"{missing} cases were not run: --seconds {seconds:g} had passed", file=log)
    if explain:
        print(store.explain(), file=log)
    if as_json:
        content = {
            "gpu": torch.cuda.get_device_name(),
            "target": store.target,
            "passed": not failed and not missing,
            "not_run": missing,
            "cases": [dataclasses.asdict(one) for one in outcomes],
        }
        print(json.dumps(content))
    return WRONG if failed or missing else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m megamoe.verify.ops`: the same as megamoe verify OP…"""
    parser = argparse.ArgumentParser(prog="megamoe.verify.ops", description="Compare kernels with their references.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations; none or all for every one with a kernel")
    parser.add_argument("--arch", help="refuse to run on another GPU: sm90a, sm100a or sm103a")
    parser.add_argument("--pack", type=pathlib.Path, help="kernel pack to load from")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--explain", action="store_true", help="print the ledger of kernels")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further case after so many")
    given = parser.parse_args(arguments)
    return run(
        given.ops,
        arch=given.arch,
        pack=given.pack,
        as_json=given.json,
        explain=given.explain,
        seconds=given.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
