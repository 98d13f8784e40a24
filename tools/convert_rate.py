# SPDX-License-Identifier: Apache-2.0
"""How fast `megamoe convert` recodes routed experts, as a share of what `cp` needs for the same files.

    python tools/convert_rate.py                     # 2 GB of Flash-sized experts in a temporary folder, 5 repeats
    python tools/convert_rate.py --gigabytes 1 --repeats 3 --jobs 1 --folder /mnt/disk
    python tools/convert_rate.py --make some/folder --gigabytes 0.3     # only write the checkpoint, to try convert on

Writes a checkpoint whose experts are real sizes in random MXFP4 (everything else is small), then takes turns: `cp` of
its files, `cp` and flushing what it wrote to the disk, and `megamoe convert`, which always flushes. Each runs in a
process of its own, sources are in the page cache, and every result is removed before the next turn. Ratios are medians
over turns of the two times of one turn, so that a load that comes and goes weighs on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from megamoe.checkpoint.headers import read_headers
from megamoe.checkpoint.writer import write_json, write_safetensors
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.inventory import Role, inventory

HIDDEN, INNER = 4096, 2048  # of an expert of V4-Flash
EXPERT_BYTES = 3 * HIDDEN * INNER * 17 // 32
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "compress_ratios": [0],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 64,
    "o_groups": 1,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "max_position_embeddings": 4096,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 16,
    "moe_intermediate_size": INNER,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 0,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
}


def make_checkpoint(folder: pathlib.Path, gigabytes: float, shard_gigabytes: float, seed: int) -> int:
    """Write a checkpoint with this many bytes of experts; returns the bytes of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = max(2, round(gigabytes * 1e9 / EXPERT_BYTES))
    write_json(folder / "config.json", {**CONFIG, "n_routed_experts": num_experts})
    shards: list[dict[str, torch.Tensor]] = [{}]
    total = size = 0
    for entry in inventory(load_config(folder)):
        if entry.role is Role.EXPERT:
            rows, columns = entry.shape
            codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
            scales = torch.randint(112, 122, (rows, columns // 32), dtype=torch.uint8, generator=generator)
            made = {
                f"{entry.name}.weight": codes.view(torch.int8),
                f"{entry.name}.scale": scales.view(torch.float8_e8m0fnu),
            }
        else:
            name = f"{entry.name}.weight" if entry.role is Role.LINEAR else entry.name
            made = {name: torch.ones(entry.shape, dtype=torch.bfloat16)}  # zeros would be refused as damage
        if size > shard_gigabytes * 1e9:
            shards.append({})
            size = 0
        shards[-1].update(made)
        size += sum(tensor.nbytes for tensor in made.values())
        total += sum(tensor.nbytes for tensor in made.values())
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total


@dataclasses.dataclass(frozen=True)
class Times:
    """What a command took: by the clock, and of the processors (which other work on the machine lengthens less)."""

    wall: float
    cpu: float
    peak_bytes: int = 0


def timed(command: list[str]) -> Times:
    """Run a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Times(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def main() -> None:
    """Measure and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-gigabytes", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--proof", choices=("codes", "values"), default="codes")
    parser.add_argument("--folder", type=pathlib.Path, help="where to work  [default: the temporary folder]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--make", type=pathlib.Path, metavar="FOLDER", help="write the checkpoint here and stop")
    arguments = parser.parse_args()
    if arguments.make is not None:
        arguments.make.mkdir(parents=True)
        num_bytes = make_checkpoint(arguments.make, arguments.gigabytes, arguments.shard_gigabytes, arguments.seed)
        print(f"wrote {arguments.make}: {num_bytes:,} bytes of tensors")
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = pathlib.Path(name)
        source, target = work / "source", work / "target"
        sizes = ["--gigabytes", str(arguments.gigabytes), "--shard-gigabytes", str(arguments.shard_gigabytes)]
        # In another process: the peak memory of a child counts from what its parent had.
        make = [sys.executable, __file__, "--make", str(source), *sizes, "--seed", str(arguments.seed)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        num_bytes = read_headers(source).num_bytes
        convert = [sys.executable, "-m", "megamoe.cli", "convert", str(source), str(target)]
        commands = {
            "cp": ["cp", "-r", str(source), str(target)],
            "cp, flushed": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(target)],
            "convert": [*convert, "--jobs", str(arguments.jobs), "--proof", arguments.proof],
            "starting Python": [sys.executable, "-c", "import megamoe.models.deepseek_v4.convert_command"],
        }
        turns: list[dict[str, Times]] = []
        for turn in range(arguments.repeats + 1):
            taken = {}
            for what, command in commands.items():
                taken[what] = timed(command)
                if what == "convert":
                    report = json.loads((target / "report.json").read_text(encoding="utf-8"))
                    assert report["proved_exact"] == report["weights"] > 0
                if target.exists():
                    shutil.rmtree(target)
            start = taken.pop("starting Python")
            converted = taken["convert"]
            taken["convert, Python started"] = Times(converted.wall - start.wall, converted.cpu - start.cpu)
            if turn:  # the first turn fills the page cache
                turns.append(taken)
    print(f"{num_bytes / 1e9:.2f} GB of tensors, {arguments.repeats} turns, {arguments.jobs} jobs")
    print("| what | seconds, median (range) | GB/s | of cp | of cp, flushed | processor seconds | of cp |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    for what in turns[0]:
        wall = [turn[what].wall for turn in turns]
        median, cpu = statistics.median(wall), statistics.median(turn[what].cpu for turn in turns)
        ratios = [
            statistics.median(turn[base].wall / turn[what].wall for turn in turns) for base in ("cp", "cp, flushed")
        ]
        cpu_ratio = statistics.median(turn["cp"].cpu / turn[what].cpu for turn in turns)
        rows[what] = {"seconds": median, "cpu_seconds": cpu, "of_cp": ratios[0], "of_cp_flushed": ratios[1]}
        print(
            f"| {what} | {median:.2f} ({min(wall):.2f} to {max(wall):.2f}) | {num_bytes / 1e9 / median:.2f} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} | {cpu:.2f} | {cpu_ratio:.2f} |"
        )
    peak = max(turn["convert"].peak_bytes for turn in turns)
    print(f"peak memory of convert: {peak / 2**20:.0f} MiB")
    print(
        json.dumps(
            {"bytes": num_bytes, "peak_bytes": peak, "jobs": arguments.jobs, "proof": arguments.proof, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
