# SPDX-License-Identifier: Apache-2.0
"""Kernels against their references, on a GPU: megamoe verify OP… (or all).

Every operation in KERNELS runs at the sizes of models/*/shapes.py with 0 and 1 tokens, one below, at and above a
tile, and a few tiles. For each: the CPU reference of the same inputs within verify/tolerance.py; outputs poisoned and
fenced (verify/guards.py); a second run over other poison and other addresses gives the same bits; inputs with other
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
from megamoe.verify.guards import GuardedOutputs
from megamoe.verify.inputs import INPUTS, Arguments, OpInputs, moved, parts, rows_of
from megamoe.verify.tolerance import TOLERANCES, assert_within

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
        for inputs in INPUTS[op]:
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
    want = inputs.door(**arguments)
    runs = []
    for poison in POISONS:
        on_device = {name: moved(value, device) for name, value in arguments.items()}  # addresses differ each time
        with GuardedOutputs(poison) as guards:
            got = inputs.door(**on_device)
        if device == "cuda":
            torch.cuda.synchronize()
        if guards.num_outputs == 0:
            raise AssertionError(f"{op}: allocated no output with torch.empty, so that none could be guarded")
        guards.check(op)
        compare(op, got, want, arguments)
        runs.append(got)
    _require_equal(op, runs[0], runs[1], "a second run over other memory gives other bits")
    for shift_bytes in (16, 0):
        strided = {name: _strided(value, shift_bytes) for name, value in on_device.items()}
        what = "16-byte aligned rows" if shift_bytes else "unaligned rows"
        _require_equal(op, runs[0], inputs.door(**strided), f"the same values in {what} at other strides differ")
    if num_tokens > 1:
        until = math.inf if inputs.order_until is None else inputs.order_until(call.dims)
        fewest = 1 if num_tokens <= until else int(until) + 1  # of the same order of sums
        last = torch.arange(num_tokens - fewest, num_tokens)
        alone = {name: rows_of(value, last) if name in inputs.per_token else value for name, value in on_device.items()}
        among = _plain(rows_of(runs[0], last))  # tiled scales become row-major: tokens are apart there
        single = _plain(inputs.door(**alone))
        for name, part in among.items():
            if not torch.equal(part, single[name]):
                raise AssertionError(f"{op}: {name} of the last token depends on the tokens beside it")


def compare(op: str, got: Any, want: Any, arguments: Arguments) -> None:
    """Compare a result with the reference's by the operation's own rule.

    Raises:
        AssertionError: it is not within the tolerance.
    """
    if op == "rms_norm_quantize_nvfp4":
        from megamoe.ops.quantize import quantize_nvfp4

        y, quantized = got
        assert_within("rms_norm", y, want[0])
        compare("quantize_nvfp4", quantized, quantize_nvfp4(y.cpu()), arguments)
        return
    if op == "route_experts":
        compare_routes(got, want, arguments)
        return
    got_parts, want_parts = parts(got), parts(want)
    for name, part in want_parts.items():
        assert_within(op, got_parts[name], part)


def compare_routes(got: Any, want: Any, arguments: Arguments) -> None:
    """Compare expert choices: fp32 sums in another order may swap experts whose scores are that close, no others.

    Raises:
        AssertionError: an expert was chosen before a clearly better or an equal, lower one; or a weight is wrong.
    """
    op = "route_experts"
    weights, ids = got[0].cpu(), got[1].cpu()
    if arguments.get("expert_table") is not None or ids.numel() == 0:
        assert_within("sample", ids, want[1])  # a lookup: every bit
        assert_within(op, weights, want[0])
        return
    logits = arguments["x"].cpu().double() @ arguments["gate"].cpu().double().T
    scores = torch.nn.functional.softplus(logits).sqrt()
    bias = arguments.get("bias")
    keys = scores if bias is None else scores + bias.cpu().double()
    if int(ids.min()) < 0 or int(ids.max()) >= keys.shape[1]:
        raise AssertionError(f"{op}: an expert id is outside 0..{keys.shape[1] - 1}: {ids.aminmax()}")
    if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise AssertionError(f"{op}: a token has the same expert twice")
    lost = keys.gather(1, want[1]) - keys.gather(1, ids)  # [T, A]
    close = TOLERANCES[op].relative_l2 * keys.abs().amax(-1, keepdim=True)
    different = ids != want[1]
    wrong = (lost > close) | (different & (lost.abs() < EQUAL))
    if bool(wrong.any()):
        token, slot = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{op}: token {token} slot {slot}: got expert {int(ids[token, slot])} with "
            f"{float(keys[token, ids[token, slot]])!r}, want {int(want[1][token, slot])} with "
            f"{float(keys[token, want[1][token, slot]])!r}; equal ones go to the lowest"
        )
    chosen = scores.gather(1, ids)
    expected = chosen / chosen.sum(-1, keepdim=True) * arguments["routed_scaling"]
    assert_within(op, weights, expected.float())


EQUAL = 1e-12
"""Two experts whose fp64 scores are this close have the same gate row and bias."""


def _plain(value: Any) -> dict[str, torch.Tensor]:
    """Return a result's tensors as bytes or numbers that torch compares and indexes."""
    return {
        name: part.view(torch.uint8) if part.dtype.itemsize == 1 else part.view(_INTEGER[part.dtype.itemsize])
        for name, part in parts(value).items()
    }


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _require_equal(op: str, got: Any, want: Any, what: str) -> None:
    want_parts = _plain(want)
    for name, part in _plain(got).items():
        if not torch.equal(part, want_parts[name]):
            raise AssertionError(f"{op}: {name}: {what}")


def _strided(value: Any, shift_bytes: int) -> Any:
    """Return a tensor of the same values whose rows lie further apart: by some bytes, or by one element for 0."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.numel() == 0:
        return value
    step = max(1, shift_bytes // value.element_size())
    wide = torch.empty((*value.shape[:-1], value.shape[-1] + step), dtype=value.dtype, device=value.device)
    view = wide[..., step:]
    view.copy_(value)
    return view


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
