# SPDX-License-Identifier: Apache-2.0
"""Whether a device writes the text that the CPU writes: megamoe verify --model M --device cuda --text.

The CPU continues prompts greedily. The device then reads the same tokens, prompts in chunks and what follows one by
one, and its logits are compared with the CPU's at every position from which a token was chosen. It is led along, so one
early swap of two tokens that are nearly as likely does not make all that follows another text. Where the CPU's two best
logits lie further apart than twice the measured error, both must choose the same token; where they do not, either may.

The error of a position is the root of the mean square of the differences between both logits, without their common
shift, which changes no probability. The measured error is the largest of nearly all positions (99 %), so that one
position at which two experts or entries were as good as equal does not stand for all.

How many positions may be in doubt depends on the recipe. Wherever sums are added in another order, activations are
rounded to other neighbours: the CPU itself, its products rounded once from exact sums, is as far from its own logits as
a GPU is (docs/experiments.md). The aim of 1 % is shown; what fails is far more doubt than that alone brings.

Beside it stands the text that the device writes when nobody leads it, and where it leaves the CPU's.

Exit codes: 0 the same tokens · 1 another one where there was no doubt, or doubt at too many positions · 2 bad input.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import torch

from megamoe.models.deepseek_v4.cache import MAX_CHUNK
from megamoe.models.deepseek_v4.model import Model
from megamoe.text.tokenizer import Tokenizer

RIGHT, WRONG = 0, 1
AIM = 0.01
"""Share of positions at which the CPU's two best logits should lie within twice the error, at most."""
MOST_IN_DOUBT = {"exact": AIM, "w4a16": 0.08, "w4a4": 0.6}
"""And may, by recipe: bf16 activations put 4 % in doubt, NVFP4 activations 38 %."""
NEARLY_ALL = 0.99


@dataclasses.dataclass(frozen=True)
class Swap:
    """A position at which the device prefers another token.

    Attributes:
        prompt, position: where.
        cpu, device: what each prefers.
        gap: between the CPU's two best logits.
    """

    prompt: int
    position: int
    cpu: int
    device: int
    gap: float


@dataclasses.dataclass(frozen=True)
class Free:
    """What the device writes when nobody leads it.

    Attributes:
        text: of the device.
        cpu_text: of the CPU.
        same_tokens: before they part.
    """

    text: str
    cpu_text: str
    same_tokens: int


@dataclasses.dataclass(frozen=True)
class TextReport:
    """What was seen.

    Attributes:
        model, recipe, device: what ran.
        prompts, prompt_tokens, new_tokens: how much.
        error: the measured error of a logit.
        largest_error: of any position.
        median_gap: between the CPU's two best logits.
        in_doubt: positions at which they lie within twice the error.
        positions: all that were compared.
        swaps: other tokens where there was no doubt.
        swaps_in_doubt: and where there was.
        free: per prompt.
        seconds: of everything.
    """

    model: str
    recipe: str
    device: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    error: float
    largest_error: float
    median_gap: float
    in_doubt: int
    positions: int
    swaps: tuple[Swap, ...]
    swaps_in_doubt: int
    free: tuple[Free, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether both write the same text."""
        return not self.swaps and self.in_doubt <= MOST_IN_DOUBT[self.recipe] * self.positions


@torch.inference_mode()
def continue_greedily(model: Model, prompt: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most likely `num_tokens` tokens after a prompt, and the logits that each was chosen from."""
    cache = model.new_cache(prompt.shape[0] + num_tokens)
    logits = [_prefill(model, prompt, cache)]
    ids = [logits[0].argmax(-1)]
    for _ in range(num_tokens - 1):
        logits.append(model.step(ids[-1], cache))
        ids.append(logits[-1].argmax(-1))
    return torch.cat(ids).cpu(), torch.cat(logits).cpu()


@torch.inference_mode()
def led_along(model: Model, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after a prompt and after each of the tokens that follow it but the last; fp32, on the CPU."""
    cache = model.new_cache(prompt.shape[0] + ids.shape[0])
    logits = [_prefill(model, prompt, cache)]
    logits += [model.step(ids[at : at + 1], cache) for at in range(ids.shape[0] - 1)]
    return torch.cat(logits).cpu()


def _prefill(model: Model, prompt: torch.Tensor, cache: object) -> torch.Tensor:
    for chunk in prompt.split(MAX_CHUNK):
        logits = model.step(chunk, cache)  # type: ignore[arg-type]
    return logits[-1:]


def errors_of(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return the error of each position, [N], without the shift that all logits of a position have in common."""
    difference = got.double() - want.double()
    return (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()


def compare(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]
) -> tuple[float, float, float, int, tuple[Swap, ...], int]:
    """Compare the logits [N, V] of each prompt; return what TextReport says of them.

    Returns:
        (error, largest error, median gap, positions in doubt, swaps where there was none, swaps in doubt).
    """
    errors = torch.cat([errors_of(*pair) for pair in zip(got, want, strict=True)])
    error = float(errors.quantile(NEARLY_ALL))
    swaps: list[Swap] = []
    gaps, in_doubt, swaps_in_doubt = [], 0, 0
    for prompt, (of_device, of_cpu) in enumerate(zip(got, want, strict=True)):
        best = of_cpu.topk(2, dim=-1)
        gap = best.values[:, 0] - best.values[:, 1]
        gaps.append(gap)
        doubtful = gap <= 2 * error
        in_doubt += int(doubtful.sum())
        other = of_device.argmax(-1) != best.indices[:, 0]
        swaps_in_doubt += int((other & doubtful).sum())
        for position in (other & ~doubtful).nonzero()[:, 0].tolist():
            chosen = int(of_device[position].argmax())
            swaps.append(Swap(prompt, position, int(best.indices[position, 0]), chosen, float(gap[position])))
    return error, float(errors.max()), float(torch.cat(gaps).median()), in_doubt, tuple(swaps), swaps_in_doubt


def sample_prompts(model: Model, count: int, num_tokens: int) -> list[torch.Tensor]:
    """Return prompts [num_tokens]: parts of the text beside a checkpoint, or random ids where there is none."""
    path = model.directory / "sample.txt"
    ids = Tokenizer(model.directory).encode(path.read_text(encoding="utf-8")) if path.is_file() else []
    bos = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    size = num_tokens - len(bos)
    if len(ids) >= size + count - 1:
        step = (len(ids) - size) // max(count - 1, 1)
        return [torch.tensor(bos + ids[at * step : at * step + size]) for at in range(count)]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.cat((torch.tensor(bos), torch.randint(model.config.vocab_size, (size,), generator=generator)))
        for _ in range(count)
    ]


def report(model: Model, on_cpu: Model, *, prompts: int, prompt_tokens: int, new_tokens: int) -> TextReport:
    """Let the CPU write, lead the device along, and say where they differ.

    Raises:
        ValueError: a count is not positive.
    """
    if min(prompts, prompt_tokens - 1, new_tokens) < 1:
        raise ValueError(
            f"verify text: prompts and new tokens must be >= 1, prompt tokens >= 2; got {prompts}, {new_tokens} and "
            f"{prompt_tokens}."
        )
    begin = time.perf_counter()
    tokenizer = Tokenizer(model.directory)
    got, want, free = [], [], []
    for prompt in sample_prompts(on_cpu, prompts, prompt_tokens):
        ids, logits = continue_greedily(on_cpu, prompt, new_tokens)
        want.append(logits)
        got.append(led_along(model, prompt, ids))
        alone, _ = continue_greedily(model, prompt, new_tokens)
        same = int((alone != ids).to(torch.int64).argmax()) if not torch.equal(alone, ids) else new_tokens
        free.append(Free(tokenizer.decode(alone.tolist()), tokenizer.decode(ids.tolist()), same))
    error, largest, median_gap, in_doubt, swaps, swaps_in_doubt = compare(got, want)
    return TextReport(
        model=model.name,
        recipe=model.recipe.name,
        device=str(model.device),
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        error=error,
        largest_error=largest,
        median_gap=median_gap,
        in_doubt=in_doubt,
        positions=prompts * new_tokens,
        swaps=swaps,
        swaps_in_doubt=swaps_in_doubt,
        free=tuple(free),
        seconds=time.perf_counter() - begin,
    )


def run(model: Model, on_cpu: Model, *, prompts: int, prompt_tokens: int, new_tokens: int, as_json: bool) -> int:
    """Print what was seen, as text or one JSON object, and return the exit code."""
    seen = report(model, on_cpu, prompts=prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    if as_json:
        print(json.dumps({"passed": seen.passed, **dataclasses.asdict(seen)}))
    else:
        print(text_of(seen))
    return RIGHT if seen.passed else WRONG


def text_of(seen: TextReport) -> str:
    """Return a report as lines."""
    lines = []
    for number, one in enumerate(seen.free):
        lines.append(f"prompt {number}: {one.same_tokens} of {seen.new_tokens} tokens are the CPU's when nobody leads")
        if one.same_tokens < seen.new_tokens:
            lines += [f"  the CPU: {one.cpu_text!r}", f"  {seen.device}: {one.text!r}"]
    lines.append(
        f"{seen.model} {seen.recipe} on {seen.device} along the CPU's tokens: {seen.prompts} prompts of "
        f"{seen.prompt_tokens} tokens and {seen.new_tokens} more of each, {seen.seconds:.1f} s"
    )
    lines.append(
        f"error of a logit {seen.error:.4f} (largest of a position {seen.largest_error:.4f}), median gap of the two "
        f"best {seen.median_gap:.3f}; within twice the error {seen.in_doubt} of {seen.positions} positions, "
        f"{seen.swaps_in_doubt} with another token"
    )
    for swap in seen.swaps:
        lines.append(
            f"ANOTHER TOKEN prompt {swap.prompt}, position {swap.position}: {swap.device} instead of {swap.cpu}, "
            f"{swap.gap:.3f} before the next"
        )
    share = seen.in_doubt / seen.positions
    lines.append(f"in doubt {share:.1%}: the aim of {AIM:.0%} is {'met' if share <= AIM else 'missed'}")
    if share > MOST_IN_DOUBT[seen.recipe]:
        lines.append(f"DOUBT at more than {MOST_IN_DOUBT[seen.recipe]:.0%} of the positions")
    lines.append("the same text" if seen.passed else "not the same text")
    return "\n".join(lines)
