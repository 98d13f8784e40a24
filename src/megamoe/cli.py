# SPDX-License-Identifier: Apache-2.0
"""The command: megamoe generate | serve | verify | inspect | convert | bench | compile.

Exit codes: 0 done · 1 a check of `verify` failed or `inspect` has findings · 2 bad input, told in one line on standard
error · 130 interrupted · 141 whoever read our output has gone. Errors of ours are not caught and show their traceback.

Nothing heavy is imported before it is needed: a bad flag is refused, and `--help` shown, without loading torch.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import click

import megamoe
from megamoe.engine.sampling_params import SamplingParams

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 128 + 2  # SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # SIGPIPE


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(megamoe.__version__, prog_name="megamoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Run DeepSeek-V4 in NVFP4."""


_accept = click.option(
    "--accept", multiple=True, metavar="RULE", help="Go on though the checkpoint breaks this rule; repeat for several."
)


def _dummy(command: Any) -> Any:
    """Add the options of dummy weights."""
    for option in (
        click.option(
            "--num-layers",
            type=click.IntRange(min=1),
            metavar="N",
            help="Of dummy weights: the first N layers.  [default: all]",
        ),
        click.option(
            "--load-format",
            type=click.Choice(["safetensors", "dummy"]),
            default="safetensors",
            show_default=True,
            help="dummy: random weights, made on the device from config.json alone; flash and pro need not even that.",
        ),
    ):
        command = option(command)
    return command


def _print_phases(seconds: Mapping[str, float]) -> None:
    """Say on standard error how long getting ready took, by phase."""
    phases = ", ".join(f"{phase} {one:.1f}" for phase, one in seconds.items())
    print(f"megamoe: ready in {sum(seconds.values()):.1f} s: {phases}", file=sys.stderr)


@cli.command()
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue; - reads standard input as it is.")
@click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR", help="Bundled model or checkpoint.")
@click.option("--max-tokens", default=128, show_default=True, metavar="N", help="Most tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, metavar="X", help="0 is greedy and reproducible.")
@click.option("--top-p", default=1.0, show_default=True, metavar="X", help="Probability mass to sample from.")
@click.option("--seed", type=int, metavar="N", help="Makes sampling reproducible.  [default: a fresh one]")
@click.option("--recipe", default="w4a16", show_default=True, metavar="R", help="exact, w4a16 or w4a4.")
@click.option("--device", default="cpu", show_default=True, metavar="D", help="cpu or cuda[:N].")
@click.option("--pack", type=click.Path(path_type=pathlib.Path), metavar="PACK", help="Kernel pack, on a GPU.")
@_accept
@_dummy
@click.option("--explain", is_flag=True, help="First print which kernels were loaded, on standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def generate(
    prompt: str,
    model: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    recipe: str,
    device: str,
    pack: pathlib.Path | None,
    accept: tuple[str, ...],
    load_format: str,
    num_layers: int | None,
    explain: bool,
    as_json: bool,
) -> int:
    """Continue a text; then print tokens, tokens/s, recipe and device."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = _read_standard_input() if prompt == "-" else prompt
    from megamoe.engine.model import model_directory
    from megamoe.text.llm import LLM
    from megamoe.text.tokenizer import check_tokenizer

    check_tokenizer(model_directory(model, load_format))  # a prompt is text
    llm = LLM(
        model,
        recipe=recipe,
        device=device,
        pack=pack,
        accept=accept,
        load_format=load_format,
        num_layers=num_layers,
    )
    if llm.model.device.type != "cpu":
        _print_phases(llm.ready_seconds)
    if explain:
        print(llm.explain(), file=sys.stderr)
    for note in llm.model.notes:
        print(f"megamoe: note: {note}", file=sys.stderr)
    prompt_ids = llm.encode(text)
    pieces = []
    token_times = [time.perf_counter()]
    for piece in llm.stream(prompt_ids, params):
        pieces.append(piece)
        token_times.append(time.perf_counter())
        if not as_json:
            print(piece.text, end="", flush=True)
    speed = _tokens_per_second(token_times)
    completion = "".join(piece.text for piece in pieces)
    if as_json:
        result = {
            "text": completion,
            "token_ids": [piece.token_id for piece in pieces],
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(pieces),
            "tokens_per_second": round(speed, 2),
            "recipe": llm.model.recipe.name,
            "device": str(llm.model.device),
            "model": llm.model.name,
        }
        print(json.dumps(result))
    else:
        print("" if completion.endswith("\n") else "\n", end="")
        print(
            f"[{len(pieces)} tokens, {speed:.1f} tokens/s, recipe {llm.model.recipe.name}, device {llm.model.device}]"
        )
    return 0


class Bytes(click.ParamType[int]):
    """A number of bytes, with or without a unit: 512MiB, 2GiB, 1048576."""

    name = "bytes"
    _UNITS: ClassVar[dict[str, int]] = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", str(value))
        if found is None or found[2] not in self._UNITS:
            self.fail(f"{value!r} is no number of bytes; write it like 512MiB or 2GiB", param, ctx)
        return int(float(found[1]) * self._UNITS[found[2]])


@cli.command()
@click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR", help="Bundled model or checkpoint.")
@click.option("--served-name", metavar="NAME", help="What clients call the model.  [default: --model's last part]")
@click.option("--recipe", default="w4a16", show_default=True, metavar="R", help="exact, w4a16 or w4a4.")
@click.option("--device", default="cpu", show_default=True, metavar="D", help="cpu or cuda[:N].")
@click.option("--pack", type=click.Path(path_type=pathlib.Path), metavar="PACK", help="Kernel pack, on a GPU.")
@_accept
@_dummy
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=pathlib.Path),
    metavar="FILE",
    help="Ask clients for the key in this file.",
)
@click.option("--without-key", is_flag=True, help="Listen to other machines without asking for a key.")
@click.option("--max-sequences", default=8, show_default=True, metavar="N", help="Computed at the same time.")
@click.option("--max-waiting", default=256, show_default=True, metavar="N", help="Queued; one more gets 429.")
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="Of the CPU: for the caches; of a GPU: for everything.  [default: 1GiB, or 90 % of what is free]",
)
@click.option("--max-step-tokens", default=512, show_default=True, metavar="N", help="Most tokens of one step.")
@click.option("--prefill-chunk", default=256, show_default=True, metavar="N", help="Most of them of one prompt.")
@click.option("--max-sequence-tokens", type=int, metavar="N", help="Prompt and answer.  [default: the context]")
@click.option("--speculative-tokens", default=0, show_default=True, metavar="N", help="Drafts per step; 0 is off.")
@click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt from its beginning.")
@click.option("--chat-release", metavar="R", help="preview or 0731: its effort tiers.  [default: the config's]")
@click.option("--thinking/--no-thinking", default=False, show_default=True, help="When a chat request does not say.")
@click.option("--max-tokens", type=int, metavar="N", help="Most tokens of an answer.  [default: the room left]")
@click.option("--max-prompt-tokens", type=int, metavar="N", help="Longest prompt.  [default: what fits]")
@click.option("--max-choices", default=16, show_default=True, metavar="N", help="Most sequences of one request.")
@click.option("--max-body", type=Bytes(), metavar="SIZE", help="Largest body.  [default: 1MiB + 16 bytes x context]")
@click.option("--max-open-requests", default=512, show_default=True, metavar="N", help="Beyond it: 429.")
@click.option("--request-timeout", default=600.0, show_default=True, metavar="S", help="Seconds for one request.")
@click.option("--shutdown-timeout", default=30.0, show_default=True, metavar="S", help="Seconds to finish in.")
@click.option("--explain", is_flag=True, help="Print the resolved plan and the kernels, as JSON, and exit.")
def serve(model: str, recipe: str, device: str, host: str, port: int, explain: bool, **options: Any) -> int:
    """Serve OpenAI's API, a chat page at / and metrics until SIGTERM or SIGINT; see docs/serving.md."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"serve: {package} is not installed. Install the extra: pip install 'megamoe[server]'.")
    key_file: pathlib.Path | None = options["api_key_file"]
    api_key = None if key_file is None else key_file.read_text(encoding="utf-8").strip("\r\n")
    if api_key is None and not options["without_key"] and not _is_loopback(host):
        raise ValueError(
            f"serve: {host} can be reached from other machines and no key is asked for. Give --api-key-file FILE, or "
            "--without-key if everybody who can reach it may use it."
        )
    from megamoe.engine import memory as memory_plans
    from megamoe.engine.config import EngineConfig
    from megamoe.engine.engine import Engine
    from megamoe.engine.model import load_model, model_directory
    from megamoe.engine.warm_up import warm_up
    from megamoe.server import run
    from megamoe.server.settings import ServerSettings
    from megamoe.text.tokenizer import check_tokenizer

    memory = options["memory"]
    budget = memory_plans.budget_of(device, memory)
    config = EngineConfig(
        max_sequences=options["max_sequences"],
        max_step_tokens=options["max_step_tokens"],
        prefill_chunk=options["prefill_chunk"],
        max_waiting=options["max_waiting"],
        max_sequence_tokens=options["max_sequence_tokens"],
        **({} if memory is None or budget is not None else {"memory_bytes": memory}),
        prefix_cache=not options["no_prefix_cache"],
        speculative_tokens=options["speculative_tokens"],
    )
    directory = model_directory(model, options["load_format"])
    check_tokenizer(directory)  # before the weights, which take minutes
    loaded = load_model(
        model,
        recipe=recipe,
        device=device,
        dtype=None,
        pack=options["pack"],
        accept=options["accept"],
        memory=None if budget is None else (budget, config),
        load_format=options["load_format"],
        num_layers=options["num_layers"],
    )
    seconds = dict(loaded.load_seconds)
    start = time.perf_counter()
    plan = None
    if budget is not None:
        config, plan = memory_plans.plan_memory(loaded, config, budget)
        memory_plans.keep(plan, loaded.device)
        now = time.perf_counter()
        seconds["memory plan"], start = now - start, now
    engine = Engine(loaded, config)
    warm_up(engine)
    seconds["warm-up"] = time.perf_counter() - start
    if plan is not None:
        plan = plan.with_caches(engine.plan.capacity)
    settings = ServerSettings(
        model_name=options["served_name"] or pathlib.Path(model).name,
        recipe=loaded.recipe.name,
        # A sequence is as long as the model, the operator and the pages allow.
        context=min(engine.plan.max_sequence_tokens, engine.plan.size.num_pages * engine.plan.size.tokens_per_page),
        api_key=api_key,
        max_body_bytes=options["max_body"],
        max_prompt_tokens=options["max_prompt_tokens"],
        max_tokens=options["max_tokens"],
        max_choices=options["max_choices"],
        max_open_requests=options["max_open_requests"],
        request_timeout_s=options["request_timeout"],
        shutdown_timeout_s=options["shutdown_timeout"],
        thinking=options["thinking"],
    )
    state = run.build_state(loaded, engine, settings, version=megamoe.__version__, release=options["chat_release"])
    if explain:
        print(json.dumps(run.describe(engine, state, plan), indent=2))
        return 0
    for note in loaded.notes:
        print(f"megamoe: note: {note}", file=sys.stderr)
    if loaded.device.type != "cpu":
        _print_phases(seconds)
    if plan is not None:
        print(f"megamoe: device memory\n{plan}", file=sys.stderr)
    return run.run(state, run.Listen(host, port), version=megamoe.__version__, device=str(loaded.device))


def _is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


@cli.command()
@click.argument("source", metavar="tiny|SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--to",
    type=click.Choice(["nvfp4", "mxfp4", "fp8"]),
    default="nvfp4",
    show_default=True,
    help="Format of the routed experts; mxfp4 and fp8 are the exact way back.",
)
@click.option(
    "--experts",
    type=click.Choice(["lossless", "requantize"]),
    default="lossless",
    show_default=True,
    help="Refuse experts that NVFP4 cannot hold exactly, or round what it cannot.",
)
@click.option(
    "--attention",
    type=click.Choice(["keep", "nvfp4", "fp8"]),
    default="keep",
    show_default=True,
    help="Attention projections, wo_a and shared experts: keep, round to NVFP4, or to FP8 where exact.",
)
@click.option(
    "--draft",
    type=click.Choice(["keep", "convert"]),
    default="keep",
    show_default=True,
    help="Linears of a draft: keep, or convert as those of the backbone.",
)
@click.option(
    "--scale-search",
    default="mse",
    show_default=True,
    metavar="SEARCH",
    help="How block scales are chosen where values are rounded: max, mse or four-over-six; for one kind alone as in "
    "max,shared=mse (kinds: experts, shared, attention).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=pathlib.Path),
    metavar="FILE",
    help="JSON: weight to the largest magnitude of its input.  [default: input_scale is 0.125 everywhere]",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N", help="Threads.")
@click.option(
    "--proof",
    type=click.Choice(["codes", "values"]),
    default="codes",
    show_default=True,
    help="Prove equality by codes and scales, or by every dequantized value as well (slower).",
)
@_accept
@click.option("--dry-run", is_flag=True, help="Check everything, list blocks that cannot be exact, write nothing.")
@click.option("--verify", is_flag=True, help="Read what was written at DST and compare it with its SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    source: str,
    destination: str,
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
) -> int:
    """Convert a checkpoint between NVFP4 and DeepSeek's formats; the same command finishes one that was stopped."""
    from megamoe.models.deepseek_v4.convert_command import run

    return run(
        source,
        destination,
        to=to,
        experts=experts,
        attention=attention,
        draft=draft,
        scale_search=scale_search,
        calibration=calibration,
        jobs=jobs,
        proof=proof,
        accept=accept,
        dry_run=dry_run,
        verify=verify,
        as_json=as_json,
        version=megamoe.__version__,
    )


@cli.command()
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--arch", metavar="A", help="Kernels: refuse to run on another GPU (sm90a, sm100a, sm103a).")
@click.option("--pack", type=click.Path(path_type=pathlib.Path), metavar="PACK", help="Kernels: load from this pack.")
@click.option("--seconds", default=math.inf, metavar="S", help="Kernels: start no further case after so many.")
@click.option("--explain", is_flag=True, help="Kernels: print which were loaded, from where and how long it took.")
@click.option("--model", metavar="tiny|DIR", help="Components, layers: model or checkpoint.  [default: tiny]")
@click.option(
    "--originals",
    type=click.Path(path_type=pathlib.Path),
    metavar="DIR",
    help="Components: original weights of what is quantized.  [default for tiny: the source tree's]",
)
@click.option("--layers", is_flag=True, help="Find the first operation of a layer that is out of its bound.")
@click.option("--text", is_flag=True, help="Compare the text that --device writes with the CPU's.")
@click.option("--device", default="cpu", show_default=True, metavar="D", help="Layers, text: cpu or cuda[:N].")
@click.option("--recipe", default="w4a16", show_default=True, metavar="R", help="Layers, text: exact, w4a16 or w4a4.")
@click.option(
    "--against",
    type=click.Choice(["cpu", "reference"]),
    default="cpu",
    show_default=True,
    help="Layers: references on the CPU, or on --device itself.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=2), default=256, show_default=True, help="Of each prompt.")
@click.option("--decode-tokens", type=click.IntRange(min=0), help="Decoded after it.  [default: layers 16, text 128]")
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True, help="Text: so many.")
@_dummy
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def verify(
    ops: tuple[str, ...],
    arch: str | None,
    pack: pathlib.Path | None,
    seconds: float,
    explain: bool,
    model: str | None,
    originals: pathlib.Path | None,
    layers: bool,
    text: bool,
    device: str,
    recipe: str,
    against: str,
    prompt_tokens: int,
    decode_tokens: int | None,
    prompts: int,
    load_format: str,
    num_layers: int | None,
    as_json: bool,
) -> int:
    """Compare kernels with references on a GPU (OP..., or all), layers with references, or components with bf16.

    With OP, --arch or --pack, every kernel of the operations runs at all sizes the models use; exit code 1 means that
    one is wrong. With --layers a model runs, every operation of every layer beside its reference on the same inputs,
    and the first one out of its bound is named; exit code 1 means that there is one. With --text a model is led along
    the CPU's greedy tokens; exit code 1 means that it prefers others without doubt. Otherwise every quantized
    component of a model runs on real activations; exit code 1 means that one is out of bounds. Exit code 2: bad
    input, or no GPU for what needs one.
    """
    if layers or text:
        if ops or arch is not None or originals is not None or (layers and text):
            name = "--layers" if layers else "--text"
            raise click.UsageError(
                f"{name} goes with --model; leave OP, --arch and --originals out, and the other one."
            )
        from megamoe.models.load import load
        from megamoe.verify import layers as verify_layers
        from megamoe.verify import text as verify_text

        words = "tiny" if model is None else model
        source: dict[str, Any] = {"recipe": recipe, "load_format": load_format, "num_layers": num_layers}
        loaded = load(words, device=device, pack=pack, **source)
        if text:
            new_tokens = 128 if decode_tokens is None else decode_tokens
            counts = {"prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
            return verify_text.run(loaded, load(words, **source), **counts, as_json=as_json)
        decoded = 16 if decode_tokens is None else decode_tokens
        return verify_layers.run(
            loaded, against=against, prompt_tokens=prompt_tokens, decode_tokens=decoded, as_json=as_json
        )
    if ops or arch is not None or pack is not None:
        if model is not None or originals is not None:
            raise click.UsageError("--model and --originals belong to the components; leave OP, --arch and --pack out.")
        from megamoe.verify import ops as verify_ops

        return verify_ops.run(ops, arch=arch, pack=pack, as_json=as_json, explain=explain, seconds=seconds)
    from megamoe.verify.components import run

    return run("tiny" if model is None else model, originals=originals, as_json=as_json)


@cli.command()
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--tokens", multiple=True, type=click.IntRange(min=1), metavar="T", help="Repeat for several.")
@click.option("--arch", metavar="A", help="Refuse to run on another GPU (sm90a, sm100a, sm103a).")
@click.option("--pack", type=click.Path(path_type=pathlib.Path), metavar="PACK", help="Load kernels from this pack.")
@click.option("--csv", "csv_path", type=click.Path(path_type=pathlib.Path), metavar="FILE", help="Also write the rows.")
@click.option("--seconds", default=math.inf, metavar="S", help="Start no further case after so many.")
@click.option("--commit", metavar="ID", help="Recorded with the numbers; by default git is asked.")
@click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR", help="Step, engine: of this model.")
@click.option("--recipe", default="w4a16", show_default=True, metavar="R", help="Step, engine: exact, w4a16 or w4a4.")
@click.option("--device", default="cuda", show_default=True, metavar="D", help="Step, engine: cpu or cuda[:N].")
@_dummy
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), metavar="B", help="Repeat for several.")
@click.option("--context", "contexts", multiple=True, type=click.IntRange(min=1), metavar="N", help="Step: of each.")
@click.option("--explain", is_flag=True, help="Step: every kernel's time, bytes, floor and gap.")
@click.option("--png", "png_path", type=click.Path(path_type=pathlib.Path), metavar="FILE", help="Step: a picture.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Engine: of each.")
@click.option("--prefill-chunk", type=click.IntRange(min=1), default=256, show_default=True, help="Engine: of a step.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Engine: of each.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document alone on standard output.")
def bench(
    ops: tuple[str, ...],
    tokens: tuple[int, ...],
    arch: str | None,
    pack: pathlib.Path | None,
    csv_path: pathlib.Path | None,
    seconds: float,
    commit: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Time kernels against their ceilings on a GPU; a wrong one is not timed. The last line is JSON.

    With "step" alone a decode step of a model is timed, at every --batch and --context; with "engine" alone requests
    run through an engine, at every --batch.
    """
    if ops in (("step",), ("engine",)):
        if tokens or arch is not None or seconds != math.inf:
            raise click.UsageError(f"bench {ops[0]}: leave --tokens, --arch and --seconds out; they belong to kernels.")
        return _bench_model(ops[0], pack=pack, csv_path=csv_path, commit=commit, as_json=as_json, **options)
    from megamoe.bench import ops as bench_ops

    return bench_ops.run(
        ops,
        num_tokens=tokens or bench_ops.NUM_TOKENS,
        arch=arch,
        pack=pack,
        as_json=as_json,
        csv_path=csv_path,
        commit=commit,
        seconds=seconds,
    )


def _bench_model(
    what: str,
    *,
    pack: pathlib.Path | None,
    csv_path: pathlib.Path | None,
    commit: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Time a decode step of a model, or requests through an engine."""
    from megamoe.bench import engine as bench_engine
    from megamoe.bench import report
    from megamoe.bench import step as bench_step
    from megamoe.engine.engine import Engine
    from megamoe.engine.warm_up import warm_up
    from megamoe.models.load import load

    if options["png_path"] is not None:
        if what != "step" or not options["explain"]:
            raise click.UsageError("bench: --png draws what `bench step --explain` finds.")
        bench_step.require_matplotlib()
    loaded = load(
        options["model"],
        recipe=options["recipe"],
        device=options["device"],
        pack=pack,
        load_format=options["load_format"],
        num_layers=options["num_layers"],
    )
    for note in loaded.notes:
        print(f"megamoe: note: {note}", file=sys.stderr)
    about = {
        "machine": report.machine(commit) if loaded.device.type == "cuda" else {},
        "model": loaded.name,
        "layers": loaded.config.num_hidden_layers,
        "recipe": loaded.recipe.name,
        "device": str(loaded.device),
    }
    seconds = dict(loaded.load_seconds)
    if what == "step":
        _print_phases(seconds)
        return bench_step.run(
            loaded,
            batches=options["batches"] or (1, 8, 64),
            contexts=options["contexts"] or (4096,),
            explained=options["explain"],
            csv_path=csv_path,
            png_path=options["png_path"],
            about={**about, "seconds": seconds},
            as_json=as_json,
        )
    batches = options["batches"] or (1, 2, 4, 8, 16, 32, 64, 128)
    prompt_tokens, new_tokens = options["prompt_tokens"], options["new_tokens"]
    config = bench_engine.engine_config(loaded, max(batches), prompt_tokens + new_tokens, options["prefill_chunk"])
    engine = Engine(loaded, config)
    seconds["warm-up"] = warm_up(engine)
    _print_phases(seconds)
    return bench_engine.run(
        engine,
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        csv_path=csv_path,
        about={**about, "seconds": seconds},
        as_json=as_json,
    )


@cli.command("compile")
@click.option("--model", "models", required=True, multiple=True, metavar="M", help="tiny, flash, pro or a checkpoint.")
@click.option("--arch", required=True, metavar="A", help="sm90a, sm100a or sm103a.")
@click.option("--out", required=True, type=click.Path(path_type=pathlib.Path), metavar="PACK", help="New directory.")
@click.option(
    "--recipe", "recipes", multiple=True, metavar="R", help="Of a checkpoint: w4a16 or w4a4.  [default: both]"
)
def compile_(models: tuple[str, ...], arch: str, out: pathlib.Path, recipes: tuple[str, ...]) -> int:
    """Build a pack of all kernels a model needs, on any machine; repeat --model for several.

    tiny, flash and pro stand for those models in every format and recipe. Of a checkpoint's directory config.json and
    the headers of its tensors are read, drafts included; with config.json alone, kernels for every format are built.
    """
    from megamoe.kernels.compile import CompileError
    from megamoe.kernels.pack import build_pack
    from megamoe.kernels.plan import module_for, only_few_tokens, requests_for

    start = time.perf_counter()
    calls = [call for model in models for call in _calls_of(model, recipes)]
    without = sorted({op for op, _ in calls if module_for(op, arch) is None})
    try:
        pack = build_pack(
            requests_for(calls, arch), arch, out, version=megamoe.__version__, model=" ".join(map(str, models))
        )
    except CompileError as error:
        print(f"megamoe: error: {error}", file=sys.stderr)  # the compiler's words, on as many lines as it needs
        return EXIT_BAD_INPUT
    num_bytes = sum(one.path.stat().st_size for one in pack.objects.values())
    seconds = time.perf_counter() - start
    print(f"{len(pack.objects)} kernels for {pack.target} in {out}: {num_bytes} bytes, {seconds:.1f} s")
    if without:
        print(f"without a kernel for {pack.target}: {', '.join(without)}")
    few = [f"{op} ({number})" for op, number in only_few_tokens({op for op, _ in calls}, arch)]
    if few:
        print(f"for few tokens only on {pack.target}: {', '.join(few)}")
    return 0


def _calls_of(model: str, recipes: Sequence[str]) -> list[tuple[str, Mapping[str, int]]]:
    """Return the operation calls of a model that is named or lies in a directory."""
    from megamoe.models.deepseek_v4.calls import checkpoint_calls, pairs
    from megamoe.models.deepseek_v4.shapes import MODELS, op_calls
    from megamoe.models.recipe import get_recipe

    if model in MODELS:
        if recipes:
            raise ValueError(
                f"compile: --recipe goes with a checkpoint's directory; got {recipes[0]!r} with the name {model}, "
                "which stands for every recipe. Leave --recipe out."
            )
        return list(pairs(op_calls(model)))
    chosen = [get_recipe(name) for name in recipes or ("w4a16", "w4a4")]
    return list(pairs(checkpoint_calls(model, chosen)))


@cli.command()
@click.argument("directory", metavar="tiny|DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object that names every tensor.")
@click.option("--hash", "with_hashes", is_flag=True, help="Prove files by the hashes that a hub cache names them by.")
@click.option("--vllm", "with_vllm", is_flag=True, help="Say what vLLM takes it for, and where its tensors differ.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Plan for N GPUs.  [default: 1, 2, 4 and 8]")
@click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Memory of one GPU.")
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Plan for sequences of N tokens.")
@click.option("--sequences", type=click.IntRange(min=1), metavar="N", help="Say whether N sequences fit.")
def inspect(
    directory: str,
    as_json: bool,
    with_hashes: bool,
    with_vllm: bool,
    gpus: int | None,
    gpu_memory: float | None,
    context: int | None,
    sequences: int | None,
) -> int:
    """Say what a checkpoint is, what is wrong with it and what memory it takes, from its headers.

    Exit code: 0 good, 1 findings, 2 unreadable.
    """
    from megamoe.verify.checkpoint_report import PlanRequest, run

    request = PlanRequest(gpus=gpus, gpu_memory_gb=gpu_memory, context=context, sequences=sequences)
    return run(directory, request, as_json=as_json, with_hashes=with_hashes, with_vllm=with_vllm)


def _read_standard_input() -> str:
    """Return standard input as text, exactly as it is."""
    with open(0, "rb", closefd=False) as stream:  # not sys.stdin: its encoding is the locale's, and it may be closed
        content = stream.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt: standard input must be UTF-8; got byte 0x{content[error.start]:02x} at position {error.start}. "
            "Convert it with iconv."
        ) from error


def _tokens_per_second(times: Sequence[float]) -> float:
    """Return the decoding speed from the start time and the time of each token.

    The first token waits for the prompt, so the speed is that of the tokens after it. One token alone is timed from
    the start; without tokens the speed is 0.
    """
    if len(times) < 2:
        return 0.0
    first = 1 if len(times) > 2 else 0
    return (len(times) - 1 - first) / (times[-1] - times[first])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # One token of a small model is a thousand small operations: a second thread brings little on idle cores and costs
    # most of the speed beside a busy process (docs/experiments.md). Read when torch is loaded; changes no number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        status = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _discard_unwritable_output()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.filename and error.strerror else str(error)
        _discard_unwritable_output()
    except (ValueError, NotImplementedError) as error:
        message = str(error)
    print(f"megamoe: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _dispatch(arguments: list[str]) -> int:
    """Parse and run. `click.Command.main` is not used: it prints errors and ends the process in its own ways."""
    try:
        with cli.make_context("megamoe", arguments) as context:
            status: int = cli.invoke(context)
            return status
    except click.exceptions.Exit as done:  # --help and --version
        return done.exit_code


def _discard_unwritable_output() -> None:
    """Point standard output at nothing if it takes nothing any more: the flush at exit would fail again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
