# SPDX-License-Identifier: Apache-2.0
"""megamoe bench step: one decode step of a model, whole and kernel by kernel.

The step is what an engine replays: one CUDA graph for a number of sequences (engine/runner.py). It is timed as a whole
at every batch and context. With `explain` it is called once more under torch's profiler, which says which launches
belong to which operation of which layer, and replayed under it, which says when each kernel begins and ends.

Time       of a kernel: from when it, and every kernel ahead of it, had begun and ended, to its end. Kernels may start
           before those ahead of them have ended, and wait inside; that waiting is not theirs
Gap        from the end of all kernels ahead to a kernel's start, where that is later
Floor      bytes over the copy bandwidth of this run: operands once, results once, of caches the rows that are read, of
           experts those that tokens chose (bench/ops.py, verify/op_inputs.py)
Caches     hold the rows of one short prompt, repeated in every ring and page: real rows, and time depends on no others

On the CPU there is no graph: the step is called, operations are timed by the clock of the machine, and there is no
floor.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from megamoe.bench import timing
from megamoe.bench.roofline import tensor_bytes
from megamoe.cache.batch import Batch
from megamoe.cache.pools import CacheSize
from megamoe.engine.config import EngineConfig, resolve
from megamoe.engine.runner import runner_for
from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.model import Model
from megamoe.ops.dispatch import Run, watch
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import Arguments

ROUNDS = 20
PROMPT = 256
EXPERT_WEIGHTS = ("w1", "w3", "w2")
HEADER = (
    "| | operation | calls | kernels | us | gap us | floor us | of floor | MB |\n" + "| --- " * 2 + "| ---: " * 7 + "|"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a step, or on the CPU a call of an operation.

    Attributes:
        name: as the device calls it.
        start_us: from the start of the step.
        time_us, gap_us: as this file's heading says.
    """

    name: str
    start_us: float
    time_us: float
    gap_us: float


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation of a step.

    Attributes:
        op: its name; "" for launches between operations.
        layer: number of the layer, or -1 outside of them.
        kind: "SWA", "CSA" or "HCA", or "model".
        num_bytes: that it has to move.
        floor_us: the least time for them; 0 on the CPU.
        kernels: that it launched.
    """

    op: str
    layer: int
    kind: str
    num_bytes: int
    floor_us: float
    kernels: tuple[Kernel, ...]

    @property
    def time_us(self) -> float:
        """Time of its kernels."""
        return sum(kernel.time_us for kernel in self.kernels)

    @property
    def gap_us(self) -> float:
        """Gaps ahead of its kernels."""
        return sum(kernel.gap_us for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A decode step.

    Attributes:
        batch: sequences.
        context: tokens of each, this one included.
        step: per step.
        cache_bytes: of all caches.
        calls: with `explain`, in order.
    """

    batch: int
    context: int
    step: timing.Timing
    cache_bytes: int
    calls: tuple[Call, ...] = ()


class DecodeStep:
    """A model's decode step for some sequences that all have the same number of tokens."""

    def __init__(self, model: Model, batch: int, context: int) -> None:
        """Allocate caches and fill them.

        Raises:
            ValueError: the context is longer than the model's, or the caches do not fit.
        """
        if not 1 <= context <= model.config.max_position_embeddings:
            raise ValueError(
                f"bench step: context must be 1 to {model.config.max_position_embeddings}, the model's; got {context}."
            )
        self.model, self.batch, self.context = model, batch, context
        per_page = model.tokens_per_page
        pages = -(-context // per_page)
        tokens = max(min(PROMPT, context, per_page), batch)
        config = EngineConfig(
            max_sequences=batch,
            max_step_tokens=tokens,
            prefill_chunk=tokens,
            num_pages=batch * pages,
            prefix_cache=False,
            max_sequence_tokens=context,
        )
        size: CacheSize = resolve(config, model).size
        self.cache_bytes = model.capacity(size, 0, with_drafts=False).total_bytes
        self._cache = model.new_shared_cache(size, 0, max_tokens=context, with_drafts=False)
        for ring in range(batch):
            self._cache.set_pages(ring, range(ring * pages, (ring + 1) * pages))
        self._runner = runner_for(model.device)
        self._fill(min(tokens, context))
        ids = np.arange(1, batch + 1) * 7919 % model.config.vocab_size
        self._step = Batch(ids, np.full(batch, context - 1), np.ones(batch, dtype=np.int64), np.arange(batch))

    def _fill(self, num_tokens: int) -> None:
        """Run one prompt, and repeat its rows in every ring and page."""
        ids = np.arange(1, num_tokens + 1) * 104729 % self.model.config.vocab_size
        batch = Batch(ids, np.zeros(1, dtype=np.int64), np.array([num_tokens]), np.zeros(1, dtype=np.int64))
        self.model.run(self._cache.plan(batch), self._cache)
        for layer in self._cache.layers:
            for pool in (layer.window, layer.state, layer.entries, layer.index_state, layer.index_keys):
                if isinstance(pool, CachePool) and pool.storage.shape[0] > 1:
                    pool.storage[1:].copy_(pool.storage[:1].expand_as(pool.storage[1:]))

    def call(self) -> Any:
        """Call the step's work; what was planned is planned again."""
        plan = self._cache.plan(self._step)
        return self.model.decode(plan, self._cache)

    def run(self) -> None:
        """Run the step as an engine does."""
        plan = self._cache.plan(self._step)
        assert plan.bucket is not None
        self._runner(plan.bucket, lambda: self.model.decode(plan, self._cache))

    def time(self, rounds: int = ROUNDS) -> timing.Timing:
        """Return the time of a step on the device."""
        for _ in range(3):  # called, captured, replayed
            self.run()
        times = []
        for _ in range(rounds):
            times.append(self._time_once())
        return timing.summary(times, from_l2=False)

    def _time_once(self) -> float:
        if self.model.device.type != "cuda":
            start = time.perf_counter()
            self.run()
            return (time.perf_counter() - start) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        plan = self._cache.plan(self._step)
        assert plan.bucket is not None
        torch.cuda.synchronize()
        begin.record()
        self._runner(plan.bucket, lambda: self.model.decode(plan, self._cache))
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000.0


class _Located:
    """A block that says which one it is before it runs."""

    def __init__(self, block: Block, layer: int, say: Callable[[int], None]) -> None:
        self._block, self._layer, self._say = block, layer, say

    def __call__(self, *args: Any) -> Any:
        self._say(self._layer)
        result = self._block(*args)
        self._say(-1)
        return result


class _Recorder:
    """Notes the operations of a step, for `watch`.

    Attributes:
        calls: (operation, layer, bytes) in order.
        seconds: of each, on the CPU's clock.
    """

    def __init__(self, *, with_bytes: bool, marked: bool) -> None:
        """Count bytes, which makes the host wait; or mark calls for the profiler."""
        self.calls: list[tuple[str, int, int]] = []
        self.seconds: list[tuple[float, float]] = []
        self._layer, self._depth = -1, 0
        self._with_bytes, self._marked = with_bytes, marked

    @contextlib.contextmanager
    def watches(self, model: Model) -> Iterator[None]:
        """Record what the model does inside the block; what follows the last layer belongs to the model."""
        blocks = model.blocks
        located = tuple(_Located(block, layer, self._at) for layer, block in enumerate(blocks))
        model.blocks = cast("tuple[Block, ...]", located)
        try:
            with torch.inference_mode(), watch(self, outermost=True):
                yield
        finally:
            model.blocks = blocks

    def _at(self, layer: int) -> None:
        self._layer = layer

    def __call__(self, op: str, run: Run, reference: Run) -> Run:
        """Wrap an operation; those that a reference calls belong to it."""
        if self._depth:
            return run

        def recorded(*args: Any) -> Any:
            number, self._depth = len(self.calls), self._depth + 1
            mark: Any = torch.profiler.record_function(f"{_MARK}{number}") if self._marked else contextlib.nullcontext()
            start = time.perf_counter()
            with mark:
                result = run(*args)
            self.seconds.append((start, time.perf_counter()))
            num_bytes = 0
            if self._with_bytes:
                num_bytes = call_bytes(op, dict(inspect.signature(reference).bind(*args).arguments), result)
            self._depth -= 1
            self.calls.append((op, self._layer, num_bytes))
            return result

        return recorded


_MARK = "megamoe call "


def call_bytes(op: str, arguments: Arguments, result: Any) -> int:
    """Return the bytes that a call must move; of experts the weights of those that were chosen."""
    given = {name: value for name, value in arguments.items() if not isinstance(value, torch.dtype)}
    if not {"w1", "expert_ids"} <= given.keys():
        inputs = INPUTS[op][0]
        whole = {name: value for name, value in given.items() if name not in inputs.partly}
        changed = tuple(whole[name] for name in inputs.written if name in whole)
        return tensor_bytes(whole) + tensor_bytes(changed) + inputs.partly_bytes(given) + tensor_bytes(result)
    chosen = given["expert_ids"]
    share = int(torch.unique(chosen[chosen >= 0]).numel()) / len(given["w1"])
    weights = sum(tensor_bytes(given[name]) for name in EXPERT_WEIGHTS)
    others = {name: value for name, value in given.items() if name not in EXPERT_WEIGHTS}
    return int(share * weights) + tensor_bytes(others) + tensor_bytes(result)


def explain(step: DecodeStep, copy_gbps: float) -> tuple[Call, ...]:
    """Return every operation of a step with its kernels.

    Args:
        step: has been timed, so that its graph exists.
        copy_gbps: of this run; 0 on the CPU.

    Raises:
        ValueError: the profiler sees no kernels, or not those of the graph.
    """
    model = step.model
    counted = _Recorder(with_bytes=True, marked=False)
    with counted.watches(model):
        step.call()
    if model.device.type == "cuda":
        kernels = _device_kernels(step, len(counted.calls))
    else:
        kernels = [
            (number, Kernel(op, (begin - counted.seconds[0][0]) * 1e6, (end - begin) * 1e6, 0.0))
            for number, ((op, _, _), (begin, end)) in enumerate(zip(counted.calls, counted.seconds, strict=True))
        ]
    of_call: dict[int, list[Kernel]] = {}
    for number, kernel in kernels:
        of_call.setdefault(number, []).append(kernel)
    kinds = [kind.name for kind in model.config.layer_kinds]
    calls = []
    for number, (op, layer, num_bytes) in enumerate(counted.calls):
        kind = kinds[layer] if layer >= 0 else "model"
        floor_us = num_bytes / copy_gbps / 1e3 if copy_gbps else 0.0
        calls.append(Call(op, layer, kind, num_bytes, floor_us, tuple(of_call.get(number, ()))))
    if between := of_call.get(-1):
        calls.append(Call("", -1, "model", 0, 0.0, tuple(between)))
    return tuple(calls)


def _device_kernels(step: DecodeStep, num_calls: int) -> list[tuple[int, Kernel]]:
    """Return (number of the call or -1, kernel) of a replay in its order."""
    marked = _Recorder(with_bytes=False, marked=True)

    def called() -> None:
        with marked.watches(step.model):
            step.call()

    step.call()
    eager = _trace(called)
    assert len(marked.calls) == num_calls, "two steps are different"
    owned = owners(eager)
    replayed = _kernels(_trace(step.run))
    if not replayed:
        raise ValueError("bench step: torch's profiler saw no kernel of the graph. Is another profiler running?")
    names = [kernel["name"] for kernel in replayed]
    wanted = [name for name, _ in owned]
    skip = len(names) - len(wanted)  # what takes the plan to the device is no part of the graph in either
    if names != wanted:
        first = next(
            (i for i, pair in enumerate(zip(names, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(names), len(wanted)),
        )
        got, want = (one[first] if first < len(one) else "nothing" for one in (names, wanted))
        raise ValueError(
            f"bench step: a replay has {skip:+} kernels against a call; the first difference is kernel {first}, "
            f"{got!r} for {want!r}."
        )
    return [(number, kernel) for (_, number), kernel in zip(owned, ordered(replayed), strict=True)]


def owners(events: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return (kernel, number of the call that launched it, or -1) in the order in which kernels ran."""
    launches = {one["args"]["correlation"]: one for one in events if one.get("cat") in ("cuda_runtime", "cuda_driver")}
    marks = [
        (one["ts"], one["ts"] + one["dur"], int(one["name"].removeprefix(_MARK)))
        for one in events
        if one.get("cat") == "user_annotation" and one["name"].startswith(_MARK)
    ]
    found = []
    for kernel in _kernels(events):
        launch = launches.get(kernel["args"]["correlation"])
        at = launch["ts"] if launch is not None else -1.0
        found.append((kernel["name"], next((number for start, end, number in marks if start <= at <= end), -1)))
    return found


def ordered(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """Return the kernels of a trace in order, time and gap as this file's heading says."""
    found: list[Kernel] = []
    kernels = _kernels(events)
    first = before = kernels[0]["ts"] if kernels else 0.0
    for kernel in kernels:
        start, end = kernel["ts"], kernel["ts"] + kernel["dur"]
        busy, gap = max(0.0, end - max(start, before)), max(0.0, start - before)
        found.append(Kernel(kernel["name"], start - first, busy, gap))
        before = max(before, end)
    return found


def _trace(work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the events of torch's profiler for some work."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _kernels(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((one for one in events if one.get("cat") == "kernel"), key=lambda one: cast(float, one["ts"]))


# Reports


def rows(seen: StepTime) -> list[dict[str, Any]]:
    """Return a step as CSV writes it: one row for the whole, one for every kernel."""
    where = {"batch": seen.batch, "context": seen.context}
    calls = seen.calls
    whole = {
        **where,
        "layer": "",
        "kind": "step",
        "op": "",
        "kernel": "",
        "start_us": 0.0,
        "time_us": round(seen.step.median_us, 3),
        "gap_us": round(sum(call.gap_us for call in calls), 3) if calls else "",
        "bytes": sum(call.num_bytes for call in calls) if calls else "",
        "floor_us": round(sum(call.floor_us for call in calls), 3) if calls else "",
    }
    found = [whole]
    for call in calls:
        for index, kernel in enumerate(call.kernels):
            found.append(
                {
                    **where,
                    "layer": call.layer if call.layer >= 0 else "",
                    "kind": call.kind,
                    "op": call.op,
                    "kernel": kernel.name,
                    "start_us": round(kernel.start_us, 3),
                    "time_us": round(kernel.time_us, 3),
                    "gap_us": round(kernel.gap_us, 3),
                    "bytes": "" if index else call.num_bytes,
                    "floor_us": "" if index else round(call.floor_us, 3),
                }
            )
    return found


def write_csv(path: pathlib.Path, found: Sequence[dict[str, Any]]) -> None:
    """Write rows with a header line."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def table(seen: StepTime) -> str:
    """Return Markdown: a layer of each kind beside its floor, operation by operation, and the step."""
    lines = [HEADER]
    for kind in dict.fromkeys(sorted((call.kind for call in seen.calls), key=_order)):
        here = [call for call in seen.calls if call.kind == kind]
        layers = len({call.layer for call in here})
        for op in dict.fromkeys(call.op for call in here):
            lines.append(_line("", op or "(between operations)", [call for call in here if call.op == op], layers))
        lines.append(_line(f"{kind}, {layers} of them" if kind != "model" else kind, "all", here, layers))
    lines.append(_line("step", "all", seen.calls, 1))
    return "\n".join(lines)


def _order(kind: str) -> int:
    return ("SWA", "CSA", "HCA", "model").index(kind)


def _line(kind: str, op: str, calls: Sequence[Call], layers: int) -> str:
    time_us, gap, floor = (sum(getattr(call, name) for call in calls) for name in ("time_us", "gap_us", "floor_us"))
    num_kernels = sum(len(call.kernels) for call in calls)
    megabytes = sum(call.num_bytes for call in calls) / 1e6
    share = f"{100 * floor / time_us:.0f} %" if floor and time_us else "–"
    numbers = (len(calls), num_kernels, time_us, gap, floor)
    shown = " | ".join(f"{number / layers:.2f}" for number in numbers)
    return f"| {kind} | {op} | {shown} | {share} | {megabytes / layers:.2f} |"


def summary_line(seen: StepTime) -> str:
    """Return one line about a step."""
    line = (
        f"batch {seen.batch}, context {seen.context:,}: {seen.step.median_us:,.1f} us a step "
        f"({seen.step.low_us:,.1f} to {seen.step.high_us:,.1f}), "
        f"{seen.batch / seen.step.median_us * 1e6:,.1f} tokens/s, caches {seen.cache_bytes:,} B"
    )
    if seen.calls:
        floor = sum(call.floor_us for call in seen.calls)
        nodes = sum(len(call.kernels) for call in seen.calls)
        line += f", {nodes} kernels, gaps {sum(call.gap_us for call in seen.calls):,.1f} us, floor {floor:,.1f} us"
    return line


def require_matplotlib() -> None:
    """Refuse to draw where nothing can be drawn with.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "bench step: --png draws with matplotlib, which is not installed. Install it, or leave it out."
        )


def draw(path: pathlib.Path, seen: StepTime) -> None:
    """Draw a step as PNG: a row per layer, a bar per operation, its floor within it."""
    require_matplotlib()
    import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.patches import Patch  # type: ignore[import-not-found, unused-ignore]

    timed = [call for call in seen.calls if call.kernels]
    layers = sorted({call.layer for call in timed})
    ops = list(dict.fromkeys(call.op for call in timed))
    colors = {op: plt.get_cmap("tab20")(index % 20) for index, op in enumerate(ops)}
    figure, axes = plt.subplots(figsize=(16, 2 + 0.32 * len(layers)))
    for call in timed:
        row, first = layers.index(call.layer), _row_start(timed, call)
        for kernel in call.kernels:
            left = kernel.start_us - first
            axes.barh(row, kernel.time_us, left=left, color=colors[call.op], edgecolor="white", linewidth=0.3)
        axes.barh(row, call.floor_us, left=call.kernels[0].start_us - first, height=0.25, color="black")
    axes.set_yticks(range(len(layers)), [f"{one} {_kind(timed, one)}" if one >= 0 else "model" for one in layers])
    axes.invert_yaxis()
    axes.set_xlabel("us from the start of the layer; black: the floor")
    axes.set_title(f"decode step, batch {seen.batch}, context {seen.context:,}: {seen.step.median_us:,.0f} us")
    handles = [Patch(color=colors[op]) for op in ops]
    axes.legend(handles, [op or "between" for op in ops], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _row_start(calls: Sequence[Call], call: Call) -> float:
    """Return where the row of a call begins: of what stands outside of the layers, without the time of the layers."""
    if call.layer >= 0:
        return _layer_start(calls, call.layer)
    begin = min(kernel.start_us for one in calls for kernel in one.kernels)
    inside = [kernel for one in calls if one.layer >= 0 for kernel in one.kernels]
    start, end = min(one.start_us for one in inside), max(one.start_us + one.time_us for one in inside)
    return begin if call.kernels[0].start_us < start else begin + end - start


def _layer_start(calls: Sequence[Call], layer: int) -> float:
    return min(kernel.start_us for call in calls if call.layer == layer for kernel in call.kernels)


def _kind(calls: Sequence[Call], layer: int) -> str:
    return next(call.kind for call in calls if call.layer == layer)


def run(
    model: Model,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    explained: bool,
    csv_path: pathlib.Path | None,
    png_path: pathlib.Path | None,
    about: dict[str, Any],
    as_json: bool,
) -> int:
    """Time and print; the last line is JSON.

    Raises:
        ValueError: a context or the caches do not fit, or there is nothing to draw with.
    """
    if png_path is not None:
        require_matplotlib()
    is_cuda = model.device.type == "cuda"
    copy_gbps = timing.copy_gbps() if is_cuda and explained else 0.0
    all_rows: list[dict[str, Any]] = []
    found = []
    for batch in batches:
        for context in contexts:
            with torch.inference_mode():
                step = DecodeStep(model, batch, context)
                seen = StepTime(batch, context, step.time(), step.cache_bytes)
                if explained:
                    seen = dataclasses.replace(seen, calls=explain(step, copy_gbps))
            del step
            found.append(seen)
            all_rows += rows(seen)
            if not as_json:
                print(summary_line(seen), flush=True)
                if explained:
                    print(f"\n{table(seen)}\n", flush=True)
            if csv_path is not None:
                write_csv(csv_path, all_rows)
            if png_path is not None:
                draw(png_path.with_stem(f"{png_path.stem}-{batch}-{context}"), seen)
    steps = [
        {"batch": one.batch, "context": one.context, "cache_bytes": one.cache_bytes, **dataclasses.asdict(one.step)}
        for one in found
    ]
    print(json.dumps({**about, "copy_gbps": copy_gbps, "steps": steps}))
    return 0
