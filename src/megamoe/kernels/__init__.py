# SPDX-License-Identifier: Apache-2.0
"""The support table: which operation has a kernel on which architecture.

`KERNELS[op][arch]` is the dotted name of the module whose `run` computes `op` on `arch`, a column of the printed table.
A module that serves several architectures is named for each; a file bound to one has it in its name. The table is a
literal: read it, grep it, print it. Only `ops/dispatch.py` reads it to run something, and imports a kernel module when
it is first picked.

`BORDERS` says up to how many tokens an operation takes one path where it has two, and where the other one exists.

`WEIGHT_LAYOUTS` says in which order an operation's kernels take NVFP4 weights; a model is brought into it once, when it
is loaded.
"""

import dataclasses

from megamoe.formats.fragment_layout import CodeLayout

ARCHITECTURES = ("sm90", "sm100", "sm103")
"""Columns of the printed table."""

KERNELS: dict[str, dict[str, str]] = {
    "rms_norm": {
        "sm90": "megamoe.kernels.rows.rms_norm",
        "sm100": "megamoe.kernels.rows.rms_norm",
        "sm103": "megamoe.kernels.rows.rms_norm",
    },
    "rms_norm_quantize_nvfp4": {
        "sm90": "megamoe.kernels.rows.rms_norm_quantize_nvfp4",
        "sm100": "megamoe.kernels.rows.rms_norm_quantize_nvfp4",
        "sm103": "megamoe.kernels.rows.rms_norm_quantize_nvfp4",
    },
    "quantize_nvfp4": {
        "sm90": "megamoe.kernels.rows.quantize_nvfp4",
        "sm100": "megamoe.kernels.rows.quantize_nvfp4",
        "sm103": "megamoe.kernels.rows.quantize_nvfp4",
    },
    "quantize_fp8_rows": {
        "sm90": "megamoe.kernels.rows.quantize_fp8_rows",
        "sm100": "megamoe.kernels.rows.quantize_fp8_rows",
        "sm103": "megamoe.kernels.rows.quantize_fp8_rows",
    },
    "clamped_swiglu": {
        "sm90": "megamoe.kernels.rows.clamped_swiglu",
        "sm100": "megamoe.kernels.rows.clamped_swiglu",
        "sm103": "megamoe.kernels.rows.clamped_swiglu",
    },
    "route_experts": {
        "sm90": "megamoe.kernels.router.route_experts",
        "sm100": "megamoe.kernels.router.route_experts",
        "sm103": "megamoe.kernels.router.route_experts",
    },
    "hyper_connection_pre": {
        "sm90": "megamoe.kernels.hyper_connection.hyper_connection_pre",
        "sm100": "megamoe.kernels.hyper_connection.hyper_connection_pre",
        "sm103": "megamoe.kernels.hyper_connection.hyper_connection_pre",
    },
    "hyper_connection_pre_norm": {
        "sm90": "megamoe.kernels.hyper_connection.hyper_connection_pre_norm",
        "sm100": "megamoe.kernels.hyper_connection.hyper_connection_pre_norm",
        "sm103": "megamoe.kernels.hyper_connection.hyper_connection_pre_norm",
    },
    "hyper_connection_head": {
        "sm90": "megamoe.kernels.hyper_connection.hyper_connection_head",
        "sm100": "megamoe.kernels.hyper_connection.hyper_connection_head",
        "sm103": "megamoe.kernels.hyper_connection.hyper_connection_head",
    },
    "hyper_connection_post": {
        "sm90": "megamoe.kernels.hyper_connection.hyper_connection_post",
        "sm100": "megamoe.kernels.hyper_connection.hyper_connection_post",
        "sm103": "megamoe.kernels.hyper_connection.hyper_connection_post",
    },
    "nvfp4_linear": {
        "sm90": "megamoe.kernels.linear.nvfp4_linear",
        "sm100": "megamoe.kernels.linear.nvfp4_linear",
        "sm103": "megamoe.kernels.linear.nvfp4_linear",
    },
    "nvfp4_weight_only_linear": {
        "sm90": "megamoe.kernels.linear.nvfp4_weight_only_linear",
        "sm100": "megamoe.kernels.linear.nvfp4_weight_only_linear",
        "sm103": "megamoe.kernels.linear.nvfp4_weight_only_linear",
    },
    "nvfp4_experts": {
        "sm90": "megamoe.kernels.experts.nvfp4_experts",
        "sm100": "megamoe.kernels.experts.nvfp4_experts",
        "sm103": "megamoe.kernels.experts.nvfp4_experts",
    },
    "nvfp4_weight_only_experts": {
        "sm90": "megamoe.kernels.experts.nvfp4_weight_only_experts",
        "sm100": "megamoe.kernels.experts.nvfp4_weight_only_experts",
        "sm103": "megamoe.kernels.experts.nvfp4_weight_only_experts",
    },
    "fp8_linear": {
        "sm90": "megamoe.kernels.fp8.fp8_linear",
        "sm100": "megamoe.kernels.fp8.fp8_linear",
        "sm103": "megamoe.kernels.fp8.fp8_linear",
    },
    "linear": {"sm90": "megamoe.kernels.linear.linear_sm90"},
    "grouped_linear": {"sm90": "megamoe.kernels.linear.grouped_linear_sm90"},
    "nvfp4_grouped_linear": {
        "sm90": "megamoe.kernels.linear.nvfp4_grouped_linear",
        "sm100": "megamoe.kernels.linear.nvfp4_grouped_linear",
        "sm103": "megamoe.kernels.linear.nvfp4_grouped_linear",
    },
    "nvfp4_weight_only_grouped_linear": {
        "sm90": "megamoe.kernels.linear.nvfp4_weight_only_grouped_linear",
        "sm100": "megamoe.kernels.linear.nvfp4_weight_only_grouped_linear",
        "sm103": "megamoe.kernels.linear.nvfp4_weight_only_grouped_linear",
    },
    "rotate_queries": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.rows.rotate_queries"),
    "write_latent": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.write_latent"),
    "round_index_query": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.rows.round_index_query"),
    "compress_kv": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.compress_kv"),
    "write_index_keys": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.write_index_keys"),
    "plan_slots": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.plan_slots"),
    "write_block_tables": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.write_block_tables"),
    "copy_cache": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.copy_cache"),
    "save_rows": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.cache.save_rows"),
    "sparse_attention": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.attention.sparse_attention"),
    "sample": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.sampling.sample"),
    "penalize": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.sampling.penalize"),
    "token_logprobs": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.sampling.token_logprobs"),
    "embed_streams": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.rows.embed_streams"),
    "mean_of_streams": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.rows.mean_of_streams"),
    "add_to_streams": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.rows.add_to_streams"),
    "hyper_connection_post_pre_norm": dict.fromkeys(
        ARCHITECTURES, "megamoe.kernels.hyper_connection.hyper_connection_post_pre_norm"
    ),
    "hyper_connection_head_norm": dict.fromkeys(
        ARCHITECTURES, "megamoe.kernels.hyper_connection.hyper_connection_head_norm"
    ),
    "index_topk": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.indexer.index_topk"),
    "fp8_grouped_linear": dict.fromkeys(ARCHITECTURES, "megamoe.kernels.fp8.fp8_grouped_linear"),
}

WEIGHT_LAYOUTS: dict[str, dict[str, CodeLayout]] = {
    "nvfp4_linear": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
    "nvfp4_weight_only_linear": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
    "nvfp4_grouped_linear": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
    "nvfp4_weight_only_grouped_linear": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
    "nvfp4_experts": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
    "nvfp4_weight_only_experts": dict.fromkeys(ARCHITECTURES, CodeLayout.FRAGMENT_16X64),
}
"""Operation → architecture → order of its NVFP4 weights; row-major where nothing is said, and on the CPU."""


@dataclasses.dataclass(frozen=True)
class Border:
    """The number of tokens up to which an operation takes one path, and beyond which another.

    Attributes:
        few: the number, in words; its host half computes it.
        more: architectures that have the path for more. On others more tokens are refused, with the number.
    """

    few: str
    more: tuple[str, ...]


BORDERS: dict[str, Border] = {
    "route_experts": Border("1,536", ("sm90", "sm100", "sm103")),
    "nvfp4_linear": Border("64 (N ≤ 2,048), 32 (N ≤ 4,096), 16", ("sm90",)),
    "nvfp4_weight_only_linear": Border("64 (N ≤ 2,048), 32 (N ≤ 4,096), 16", ("sm90",)),
    "nvfp4_grouped_linear": Border("16", ("sm90",)),
    "nvfp4_weight_only_grouped_linear": Border("16", ("sm90",)),
    "nvfp4_experts": Border("4 E / A, at least 12", ("sm90",)),
    "nvfp4_weight_only_experts": Border("4 E / A, at least 12", ("sm90",)),
    "fp8_linear": Border("64 (N ≤ 4,095), 32", ("sm90",)),
    "fp8_grouped_linear": Border("32", ("sm90",)),
    "sparse_attention": Border("22 (H ≤ 64), 11", ("sm90", "sm100", "sm103")),
}
"""Operations with two paths. Others take any number of tokens wherever they have a kernel."""


def support_table() -> str:
    """Return the support table as Markdown, as docs/kernels.md and the README print it."""
    lines = [
        f"| operation | few tokens: up to | {' | '.join(ARCHITECTURES)} |",
        f"| --- | --- |{' --- |' * len(ARCHITECTURES)}",
    ]
    for op in sorted(KERNELS):
        few = BORDERS[op].few if op in BORDERS else "–"
        lines.append(f"| `{op}` | {few} | {' | '.join(_cell(op, arch) for arch in ARCHITECTURES)} |")
    return "\n".join(lines)


def _cell(op: str, arch: str) -> str:
    if arch not in KERNELS[op]:
        return "–"
    if op not in BORDERS:
        return "any"
    return "few, more" if arch in BORDERS[op].more else "few"
