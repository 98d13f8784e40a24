# SPDX-License-Identifier: Apache-2.0
"""Which operation of which layer is wrong: megamoe verify --model M --device cuda --layers.

A sequence runs through the model, a prefill and then token by token. Every operation that the model calls runs twice on
the *same* inputs, as the device runs it and by its reference, and both results are compared by the operation's own
rule (verify/inputs.py, verify/tolerance.py). What an operation writes in place belongs to its result: a cache row that
is not written is a wrong result of the operation that should have written it, not of one that reads it later. The
search ends at the first operation out of its bound. Errors do not add up on the way: the model goes on with what the
device computed, and so does the reference of the next operation.

An operation with a clamp runs once more with a clamp so tight that it acts: the activations of an ordinary text may
never reach the model's own, and a missing clamp would not be seen.

The reference runs on the CPU (--against cpu), or on the device itself (--against reference), which a model of full
width needs: its weights are then not copied at every operation.

Exit codes: 0 all within their bounds · 1 an operation is not · 2 bad input, or no such device.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.cache import MAX_CHUNK, Cache
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.model import Model
from megamoe.ops import use, watch
from megamoe.ops.dispatch import Run
from megamoe.text.tokenizer import Tokenizer
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.tolerance import Mismatch
from megamoe.verify.values import copied, moved

RIGHT, WRONG = 0, 1
AGAINST = ("cpu", "reference")
CLAMPS = ("swiglu_limit", "limit")
TIGHT = 2.0**-4
"""A clamp that nearly every activation reaches."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first operation out of its bound.

    Attributes:
        op: the operation.
        layer: its layer; None for what stands before the first or behind the last one.
        kind: the layer's kind: SWA, CSA or HCA.
        phase: "prefill" or "decode".
        call: how manieth operation of its step it is, from 0.
        position: of the token in the sequence; None where the rule compares something else than tokens.
        coordinate: in the part of the result that differs, [token, ...], or [slot, ...] of rows in a pool.
        got, want: the two values there.
        message: what the rule says.
    """

    op: str
    layer: int | None
    kind: str | None
    phase: str
    call: int
    position: int | None
    coordinate: tuple[int, ...] | None
    got: float | None
    want: float | None
    message: str

    def __str__(self) -> str:
        """One line: where, then the rule's own words."""
        where = "outside the layers" if self.layer is None else f"layer {self.layer} ({self.kind})"
        token = "" if self.position is None else f", token at position {self.position}"
        return f"{where}, {self.phase}{token}, operation {self.call} of the step: {self.message}"


@dataclasses.dataclass(frozen=True)
class LayersReport:
    """What a run of the finder saw.

    Attributes:
        model, recipe, device, against: what ran.
        num_layers: layers of the model.
        prefill_tokens, decode_tokens: tokens of the sequence.
        compared: operation → comparisons that were within the bound.
        divergence: the first that was not; None where all were.
        seconds: of everything.
    """

    model: str
    recipe: str
    device: str
    against: str
    num_layers: int
    prefill_tokens: int
    decode_tokens: int
    compared: dict[str, int]
    divergence: Divergence | None
    seconds: float


class _FoundError(Exception):
    """Ends the run at the first divergence."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


class Place:
    """Where the model is: the layer, the phase and the position of the step's first token."""

    def __init__(self) -> None:
        """Stand before the first layer."""
        self.layer: int | None = None
        self.phase = "prefill"
        self.start = 0
        self.call = 0


class _LocatedBlock:
    """A block that says which one it is before it runs."""

    def __init__(self, block: Block, layer: int, place: Place) -> None:
        self._block, self._layer, self._place = block, layer, place

    def __call__(self, *args: Any) -> Any:
        self._place.layer = self._layer
        return self._block(*args)


class Finder:
    """An observer for `watch`: runs an operation and its reference on the same inputs and compares them.

    Attributes:
        compared: operation → comparisons that were within the bound.
    """

    def __init__(
        self, device: torch.device, against: str, place: Place | None = None, kinds: Sequence[LayerKind] = ()
    ) -> None:
        """Compare what runs on `device`; `kinds` are those of the layers that `place` counts."""
        self._device, self._against, self._kinds = device, against, kinds
        self._place = Place() if place is None else place
        self._in_reference = False
        self.compared: dict[str, int] = {}

    def __call__(self, op: str, run: Run, reference: Run) -> Run:
        if self._in_reference:
            return run

        def compared(*args: Any) -> Any:
            arguments: Arguments = dict(inspect.signature(reference).bind(*args).arguments)
            for tight in _tight_clamps(arguments):
                self._compare(op, run, reference, {**arguments, **tight})
            returned = self._compare(op, run, reference, arguments)
            self._place.call += 1
            return returned

        return compared

    def _compare(self, op: str, run: Run, reference: Run, arguments: Arguments) -> Any:
        """Run both, fail at the first difference, and return what the device returned."""
        inputs = INPUTS[op][0]
        written = _written(inputs, arguments)
        where = torch.device("cpu") if self._against == "cpu" else self._device
        before = {name: (copied if name in written else moved)(value, where) for name, value in arguments.items()}
        again = {name: copied(before[name], where) for name in written}
        returned = run(*arguments.values())
        with self._reference_runs():
            expected = reference(*{**before, **again}.values())
        got = _result(returned, [arguments[name] for name in written])
        want = _result(expected, [again[name] for name in written])
        try:
            inputs.rule(op, got, copied(want, "cpu"), before)  # rules hold the reference's result on the CPU
        except AssertionError as wrong:
            raise _FoundError(self._divergence(op, wrong, before)) from wrong
        self.compared[op] = self.compared.get(op, 0) + 1
        return returned

    @contextmanager
    def _reference_runs(self) -> Iterator[None]:
        self._in_reference = True
        try:
            with use("reference"):
                yield
        finally:
            self._in_reference = False

    def _divergence(self, op: str, wrong: AssertionError, arguments: Arguments) -> Divergence:
        place = self._place
        coordinate = got = want = position = None
        if isinstance(wrong, Mismatch):
            coordinate, got, want = wrong.coordinate, wrong.got, wrong.want
            token = _token(coordinate, wrong.is_slot, arguments)
            position = None if token is None else place.start + token
        kind = None if place.layer is None else self._kinds[place.layer].name
        return Divergence(op, place.layer, kind, place.phase, place.call, position, coordinate, got, want, str(wrong))


def _tight_clamps(arguments: Arguments) -> list[Arguments]:
    return [{name: TIGHT} for name in CLAMPS if arguments.get(name) is not None]


def _written(inputs: OpInputs, arguments: Arguments) -> tuple[str, ...]:
    """Return the arguments that a call changes in place; a call that is handed its output changes that."""
    if inputs.written or "out" not in arguments:
        return inputs.written
    return ("out",)


def _result(returned: Any, changed: Sequence[Any]) -> Any:
    """Return what an operation returned and, behind it, what it changed; as OpInputs.run does."""
    if not changed:
        return returned
    return tuple(changed) if returned is None else (returned, *changed)


def _token(coordinate: tuple[int, ...] | None, is_slot: bool, arguments: Arguments) -> int | None:
    """Return the token of the step that a coordinate speaks of, where there is one."""
    if not coordinate:
        return None
    if not is_slot:
        return coordinate[0]
    slots = arguments.get("slots")
    if slots is None:
        return None
    places = (slots == coordinate[0]).nonzero()
    return int(places[0]) if len(places) else None


def find_divergence(
    model: Model, *, against: str = "cpu", prompt: torch.Tensor, decode_tokens: int = 16
) -> tuple[dict[str, int], Divergence | None]:
    """Run a sequence through a model and compare every operation with its reference, until one is out of its bound.

    Args:
        model: on any device. On the CPU operations are their references, and only faults put in by `watch` differ.
        against: "cpu" copies inputs to the CPU; "reference" runs the reference where the model is.
        prompt: [T] int64 token ids, T >= 1; prefilled in chunks of at most MAX_CHUNK.
        decode_tokens: tokens decoded one by one behind it, each the most likely one.

    Returns:
        (operation → comparisons within the bound, the first divergence or None).

    Raises:
        ValueError: there is no token, or `against` is another word.
    """
    if against not in AGAINST:
        raise ValueError(f"find_divergence: against must be one of {', '.join(AGAINST)}; got {against!r}.")
    if prompt.ndim != 1 or not prompt.shape[0]:
        raise ValueError(f"find_divergence: prompt must be [T] with T >= 1; got {list(prompt.shape)}.")
    place = Place()
    finder = Finder(model.device, against, place, model.config.layer_kinds)
    cache = model.new_cache(prompt.shape[0] + decode_tokens)
    blocks = model.blocks
    located = tuple(_LocatedBlock(block, layer, place) for layer, block in enumerate(blocks))
    model.blocks = cast("tuple[Block, ...]", located)
    try:
        with torch.inference_mode(), watch(finder, outermost=True):
            for chunk in prompt.split(MAX_CHUNK):
                logits = _step(model, chunk, cache, place)
            place.phase = "decode"
            for _ in range(decode_tokens):
                logits = _step(model, logits[-1:].argmax(-1).cpu(), cache, place)
    except _FoundError as found:
        return finder.compared, found.divergence
    finally:
        model.blocks = blocks
    return finder.compared, None


def _step(model: Model, ids: torch.Tensor, cache: Cache, place: Place) -> torch.Tensor:
    """Run one step and return the logits of its tokens."""
    place.layer, place.call, place.start = None, 0, cache.length
    streams = model.advance(ids, cache)
    place.layer = None
    return model.head(streams)


def sample_prompt(model: Model, num_tokens: int) -> torch.Tensor:
    """Return token ids [num_tokens] int64: of the text beside a checkpoint, or random ones where there is none."""
    text = model.directory / "sample.txt"
    if text.is_file():
        ids = Tokenizer(model.directory).encode(text.read_text(encoding="utf-8"))[:num_tokens]
        if len(ids) == num_tokens:
            return torch.tensor(ids, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (num_tokens,), generator=generator)


def report(model: Model, *, against: str, prompt_tokens: int, decode_tokens: int) -> LayersReport:
    """Run the finder over a prompt of this model and return what it saw."""
    begin = time.perf_counter()
    prompt = sample_prompt(model, prompt_tokens)
    compared, divergence = find_divergence(model, against=against, prompt=prompt, decode_tokens=decode_tokens)
    return LayersReport(
        model=model.name,
        recipe=model.recipe.name,
        device=str(model.device),
        against=against,
        num_layers=len(model.blocks),
        prefill_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        compared=compared,
        divergence=divergence,
        seconds=time.perf_counter() - begin,
    )


def run(model: Model, *, against: str, prompt_tokens: int, decode_tokens: int, as_json: bool) -> int:
    """Print what the finder saw, as text or one JSON object, and return the exit code."""
    seen = report(model, against=against, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
    if as_json:
        print(json.dumps({"passed": seen.divergence is None, **dataclasses.asdict(seen)}))
    else:
        print(_text(seen))
    return RIGHT if seen.divergence is None else WRONG


def _text(seen: LayersReport) -> str:
    lines = ["| operation | comparisons within the bound |", "| --- | --- |"]
    lines += [f"| {op} | {count} |" for op, count in sorted(seen.compared.items())]
    beside = "on the CPU" if seen.against == "cpu" else f"on {seen.device}"
    lines.append(
        f"{seen.model} {seen.recipe}, {seen.num_layers} layers, on {seen.device} beside references {beside}: "
        f"{seen.prefill_tokens} tokens prefilled, {seen.decode_tokens} decoded, {sum(seen.compared.values())} "
        f"comparisons, {seen.seconds:.1f} s"
    )
    if seen.divergence is None:
        lines.append("every operation of every layer is within its bound")
    else:
        lines.append(f"FIRST DIVERGENCE {seen.divergence.op}: {seen.divergence}")
    return "\n".join(lines)
