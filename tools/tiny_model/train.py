# SPDX-License-Identifier: Apache-2.0
"""Train the tiny DeepSeek-V4 from scratch, in three phases that share one time budget.

A  context 512, every visible compressed entry attended, no indexer, no MTP
B  context 2048; the indexer learns the attention's mass over entries (first with dense attention, then with the model
   attending to the indexer's top-k only); the MTP layer is trained too
C  the same with fake quantisation: NVFP4 weights and inputs of the exported linears, FP8 key-value rows

The schedule follows elapsed time, not steps, so a run ends when it should on any machine:

    python train.py --data <work folder of data.py> --out <run folder> --hours 1.5

A run continues from <run folder>/last.pt if that file exists; SIGTERM writes that file and ends the run.
`--start-phase C --init <ckpt.pt>` starts a later phase from an earlier checkpoint. Phase ends are kept as phase_a.pt,
phase_b.pt, phase_c.pt, each with an export_<phase> folder, and `export/` always holds the newest export.
"""

import argparse
import json
import math
import os
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch

import model as network
from export_master import HERE, export
from model import Config, Mode, Model

PHASES = ("A", "B", "C")
PHASE_SHARE = {"A": 0.60, "B": 0.25, "C": 0.15}
CONTEXT = {"A": 512, "B": 2048, "C": 2048}
INDEX_WARMUP = 0.35  # share of phase B during which the model still attends densely
INDEX_QUERIES = 256
MTP_WEIGHT = 0.3
EARLY_BATCH_END = 0.35  # fraction of the schedule up to which --early-batch-tokens holds
BIAS_STEP, BIAS_STEP_EARLY, BIAS_EARLY_STEPS = 5e-3, 2e-2, 300
EVAL_TOKENS = 16_384
BOS_ID = 0


class Batches:
    """Rows of tokens from a stream, in an order that is a function of (seed, phase, number of rows drawn)."""

    def __init__(self, stream: np.ndarray, context: int, seed: int) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        self.num_rows = (stream.size - context - 2) // context
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def starts(self, epoch: int) -> np.ndarray:
        """Start of every row of an epoch in the stream, in the order they are drawn."""
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, self.context, epoch))
            offset = int(rng.integers(self.context))
            starts = rng.permutation(self.num_rows) * self.context + offset
            self._epoch, self._starts = epoch, np.minimum(starts, self.stream.size - self.context - 2)
        return self._starts

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows number first .. first + count - 1, [count, context + 2]; every row starts with BOS."""
        out = np.empty((count, self.context + 2), dtype=np.int64)
        for i in range(count):
            epoch, index = divmod(first + i, self.num_rows)
            start = self.starts(epoch)[index]
            out[i] = self.stream[start : start + self.context + 2]
        out[:, 0] = BOS_ID
        return torch.from_numpy(out)


def split_parameters(model: Model) -> tuple[list[torch.nn.Parameter], dict[str, list[torch.nn.Parameter]]]:
    """Hidden matrices for Muon; the rest by kind for AdamW."""
    hidden, rest = [], {"embed": [], "head": [], "gate": [], "small": []}
    for name, parameter in model.named_parameters():
        if name == "embed.weight":
            rest["embed"].append(parameter)
        elif name == "head.weight":
            rest["head"].append(parameter)
        elif parameter.ndim == 2 and not any(part in name for part in ("hc_", ".gate.weight", ".ape", "weights_proj")):
            hidden.append(parameter)
        elif name.endswith("gate.weight"):
            rest["gate"].append(parameter)
        else:
            rest["small"].append(parameter)
    return hidden, rest


class Muon(torch.optim.Optimizer):
    """Muon for many small matrices: matrices of one shape are orthogonalised together in one batched iteration.

    The same update as torch.optim.Muon (Nesterov momentum, quintic Newton-Schulz, step scaled by
    sqrt(max(1, rows / columns))), which handles one matrix at a time and is slower on a CPU for hundreds of small ones.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)
            for parameters in shapes.values():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                    update = parameter.grad.lerp(buffer, group["momentum"])
                    updates.append(update.T if update.shape[0] > update.shape[1] else update)
                for parameter, update in zip(parameters, self.orthogonalise(torch.stack(updates)), strict=True):
                    rows, columns = parameter.shape
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update.T if rows > columns else update
                    parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def orthogonalise(self, x: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz steps on [n, rows <= columns]."""
        a, b, c = self.COEFFICIENTS
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


class Run:
    """One training run: model, optimizers, data position and clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        self.config = Config.load(HERE / "config.json")
        self.model = Model(self.config).to(self.device)
        hidden, rest = split_parameters(self.model)
        self.muon = Muon(hidden, lr=args.lr_muon, weight_decay=args.weight_decay)
        groups = [
            {"params": rest["embed"], "lr": args.lr_embed},
            {"params": rest["head"], "lr": args.lr_head},
            {"params": rest["gate"], "lr": args.lr_gate},
            {"params": rest["small"], "lr": args.lr_small},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        self.base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in (self.muon, self.adamw)]
        self.stream = np.fromfile(args.data / "train.bin", dtype=np.uint16)
        self.heldout = np.fromfile(args.data / "heldout.bin", dtype=np.uint16)
        self.batches = {context: Batches(self.stream, context, args.seed) for context in set(CONTEXT.values())}
        self.phase, self.step, self.rows_drawn, self.tokens = args.start_phase, 0, 0, 0
        self.elapsed_before = 0.0
        self.stop_asked = False
        self.started = time.time()
        self.saved_at = self.evaluated_at = time.time()

    # --- clock -----------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds of training so far, over all restarts."""
        return self.elapsed_before + time.time() - self.started

    def fraction(self) -> float:
        """Position in the whole schedule, 0 to 1. A restart or a later start phase keeps the end time."""
        start = sum(PHASE_SHARE[p] for p in PHASES[: PHASES.index(self.args.start_phase)])
        used = self.elapsed() / max(self.elapsed() + self.end - time.time(), 1e-9)
        return min(1.0, start + (1.0 - start) * used)

    def lr_factor(self, fraction: float) -> float:
        """Warm-up, constant, linear to 0.12 at the end of phase B, linear to 0 at the end of C."""
        knee, end_b = 0.40, PHASE_SHARE["A"] + PHASE_SHARE["B"]
        if fraction < knee:
            return min(1.0, (self.step + 1) / 40)
        if fraction < end_b:
            return 1.0 - 0.88 * (fraction - knee) / (end_b - knee)
        return 0.12 * max(0.0, 1.0 - fraction) / (1.0 - end_b)

    def mode(self, fraction: float) -> Mode:
        """How the forward pass runs at this point of the schedule."""
        if self.phase == "A":
            return Mode(select="all")
        into_b = (fraction - PHASE_SHARE["A"]) / PHASE_SHARE["B"]
        dense = self.phase == "B" and into_b < INDEX_WARMUP
        return Mode(select="all" if dense else "topk", index_queries=INDEX_QUERIES, quantized=self.phase == "C")

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Write everything a restart needs, atomically."""
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": {
                "phase": self.phase, "step": self.step, "rows_drawn": self.rows_drawn, "tokens": self.tokens,
                "elapsed": self.elapsed(), "start_phase": self.args.start_phase,
            },
        }  # fmt: skip
        path = self.args.out / name
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint written by `save`."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        torch.set_rng_state(state["rng"].cpu())
        progress = state["progress"]
        self.phase, self.step = progress["phase"], progress["step"]
        self.rows_drawn, self.tokens = progress["rows_drawn"], progress["tokens"]
        self.args.start_phase, self.elapsed_before = progress["start_phase"], progress["elapsed"]

    def write_export(self, name: str) -> None:
        """Write a DeepSeek-native directory below the run folder."""
        export(self.model.state_dict(), self.args.data / "tokenizer.json", self.args.out / name)

    def draw(self) -> None:
        """Draw the loss curve, unless --no-plot left that for later."""
        if self.args.plot:
            plot(self.args.out)

    def log(self, record: dict[str, float | int | str]) -> None:
        """Append one JSON line and print it."""
        with (self.args.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)

    # --- training --------------------------------------------------------------------------------------------

    def train_step(self, fraction: float) -> dict[str, float]:
        """One optimizer step; returns the losses."""
        context = CONTEXT[self.phase]
        early = self.args.early_batch_tokens and fraction < EARLY_BATCH_END
        batch_tokens = self.args.early_batch_tokens if early else self.args.batch_tokens
        count = max(1, batch_tokens // context)
        rows = self.batches[context].rows(self.rows_drawn, count).to(self.device)
        factor = self.lr_factor(fraction)
        for optimizer, base_lrs in zip((self.muon, self.adamw), self.base_lrs, strict=True):
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * factor
        micro = min(count, max(1, self.args.micro_tokens // context))
        totals: dict[str, float] = {}
        loads: dict[str, torch.Tensor] = {}
        for piece in rows.split(micro):
            mode = self.mode(fraction)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss, mtp_loss = self.model.losses(piece, mode, with_mtp=self.phase != "A")
            total, parts = loss, {"loss": loss}
            if mtp_loss is not None:
                total = total + MTP_WEIGHT * mtp_loss
                parts["mtp"] = mtp_loss
            if mode.index_losses:
                parts["index"] = sum(mode.index_losses)
                total = total + parts["index"]
            (total * (len(piece) / count)).backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(piece) / count
            for name, load in mode.loads.items():
                loads[name] = loads.get(name, 0) + load
        if not math.isfinite(totals["loss"]):
            raise FloatingPointError(f"loss is {totals['loss']} at step {self.step}")
        torch.nn.utils.clip_grad_norm_([p for g in self.adamw.param_groups for p in g["params"]], 1.0)
        self.muon.step()
        self.adamw.step()
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)
        for name, load in loads.items():
            gate = self.model.get_submodule(name).ffn.gate
            load = load.float()
            size = BIAS_STEP_EARLY if self.step < BIAS_EARLY_STEPS else BIAS_STEP * max(factor, 0.02)
            gate.bias.add_(torch.sign(load.mean() - load), alpha=size)
            totals["imbalance"] = max(totals.get("imbalance", 0.0), (load.max() / load.mean()).item())
        self.step += 1
        self.rows_drawn += count
        self.tokens += count * context
        return totals

    @torch.no_grad()
    def heldout_loss(self, fraction: float) -> dict[str, float]:
        """Mean held-out losses over fixed rows, in the mode that is being trained."""
        context = CONTEXT[self.phase]
        batches = Batches(self.heldout, context, seed=1)
        count = max(1, self.args.micro_tokens // context)
        sums, num = {}, 0
        for first in range(0, EVAL_TOKENS // context, count):
            mode = self.mode(fraction)
            mode.index_queries = 0
            rows = batches.rows(first, count).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss, mtp_loss = self.model.losses(rows, mode, with_mtp=self.phase != "A")
            sums["heldout"] = sums.get("heldout", 0.0) + loss.item()
            if mtp_loss is not None:
                sums["heldout_mtp"] = sums.get("heldout_mtp", 0.0) + mtp_loss.item()
            num += 1
        return {name: value / num for name, value in sums.items()}

    def record(self, totals: dict[str, float], fraction: float, rate: float) -> dict[str, float | int | str]:
        """One log record."""
        return {
            "step": self.step, "phase": self.phase, "fraction": round(fraction, 5), "tokens": self.tokens,
            "minutes": round(self.elapsed() / 60, 3), "tokens_per_s": round(rate, 1), "lr": self.lr_factor(fraction),
            **totals,
        }  # fmt: skip

    def train(self, deadline: float) -> None:
        """Run until the deadline (seconds since the epoch), through all phases."""
        self.end = deadline
        bounds = np.cumsum([PHASE_SHARE[p] for p in PHASES])
        while True:
            fraction = self.fraction()
            due = PHASES[min(int(np.searchsorted(bounds, fraction, side="right")), len(PHASES) - 1)]
            if fraction >= 1.0 or due != self.phase or (self.args.max_steps and self.step >= self.args.max_steps):
                self.log(
                    {"event": "end of phase", "phase": self.phase, "step": self.step, **self.heldout_loss(fraction)}
                )
                name = f"phase_{self.phase.lower()}"
                if fraction >= 1.0 or due == self.phase:
                    break
                self.phase, self.rows_drawn = due, 0
                self.save(f"{name}.pt")
                self.save("last.pt")
                self.write_export(f"export_{name}")
                self.write_export("export")
                self.draw()
                continue
            begin, tokens = time.time(), self.tokens
            totals = self.train_step(fraction)
            rate = (self.tokens - tokens) / (time.time() - begin)
            record = self.record(totals, fraction, rate)
            if time.time() - self.evaluated_at > self.args.eval_minutes * 60:
                record |= self.heldout_loss(fraction)
                self.evaluated_at = time.time()
            if self.step % 5 == 0 or "heldout" in record or self.step < 10:
                self.log(record)
            if self.stop_asked or time.time() - self.saved_at > self.args.save_minutes * 60:
                self.save("last.pt")
                if self.stop_asked:
                    print(f"stopped at step {self.step}; the same command continues", flush=True)
                    return
                self.write_export("export")
                self.draw()
                self.saved_at = time.time()
        for file in (f"{name}.pt", "last.pt"):
            self.save(file)
        self.write_export(f"export_{name}")
        self.write_export("export")
        self.draw()
        print("finished", flush=True)


def plot(folder: Path) -> None:
    """Draw loss_curve.png and write loss.csv from log.jsonl, where there is one."""
    if not (folder / "log.jsonl").exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    records = [r for r in records if "event" not in r]
    columns = [
        "step",
        "phase",
        "tokens",
        "minutes",
        "tokens_per_s",
        "lr",
        "loss",
        "mtp",
        "index",
        "heldout",
        "heldout_mtp",
    ]
    lines = [",".join(columns)] + [",".join(str(r.get(c, "")) for c in columns) for r in records]
    (folder / "loss.csv").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for key, label in (
        ("loss", "training"),
        ("mtp", "training, MTP"),
        ("heldout", "held-out"),
        ("heldout_mtp", "held-out, MTP"),
    ):
        points = [(r["tokens"] / 1e6, r[key]) for r in records if key in r]
        if points:
            style = {"marker": "o", "markersize": 3} if key.startswith("heldout") else {"linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for phase in PHASES[1:]:
        first = next((r["tokens"] / 1e6 for r in records if r["phase"] == phase), None)
        if first is not None:
            axes.axvline(first, color="grey", linewidth=0.6)
            axes.text(first, 0.97, f" {phase}", va="top", transform=axes.get_xaxis_transform())
    axes.set(xlabel="tokens (millions)", ylabel="cross-entropy per token (nats)", ylim=(None, 6.5))
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss_curve.tmp.png", dpi=120)
    plt.close(figure)
    os.replace(folder / "loss_curve.tmp.png", folder / "loss_curve.png")


def parse_deadline(text: str) -> float:
    """HH:MM (local time, the next occurrence) as seconds since the epoch."""
    hour, minute = (int(part) for part in text.split(":"))
    now = datetime.now()
    when = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (when if when > now else when + timedelta(days=1)).timestamp()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--hours", type=float)
    budget.add_argument("--plot-only", action="store_true", help="draw the curve of a run made with --no-plot, and end")
    budget.add_argument("--deadline", help="local time HH:MM at which training stops and the last files are written")
    parser.add_argument("--start-phase", choices=PHASES, default="A")
    parser.add_argument("--init", type=Path, help="take the weights of this checkpoint")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--early-batch-tokens", type=int, default=0, help="smaller batch early on; 0: the same batch")
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--lr-muon", type=float, default=0.02)
    parser.add_argument("--lr-embed", type=float, default=0.01)
    parser.add_argument("--lr-head", type=float, default=0.003)
    parser.add_argument("--lr-gate", type=float, default=0.001)
    parser.add_argument("--lr-small", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-minutes", type=float, default=3.0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early, for learning-rate probes")
    parser.add_argument("--compile", action="store_true", help="fuse pointwise pieces with torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the loss curve as the run goes"
    )
    args = parser.parse_args()
    if args.plot_only:
        plot(args.out)
        return
    deadline = parse_deadline(args.deadline) if args.deadline else time.time() + args.hours * 3600
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.compile:
        network.compile_pointwise()
    run = Run(args)
    last = args.out / "last.pt"
    if last.exists():
        run.resume(last)
        print(f"continuing from {last} at step {run.step}")
    elif args.init:
        run.model.load_state_dict(torch.load(args.init, map_location=run.device, weights_only=True)["model"])
    num_parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{num_parameters:,} parameters, {run.stream.size:,} training tokens, {run.device}")
    run.write_export("export")
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop_asked", True))
    run.train(deadline)


if __name__ == "__main__":
    main()
