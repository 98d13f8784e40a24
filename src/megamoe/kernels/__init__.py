# SPDX-License-Identifier: Apache-2.0
"""The support table: which operation has a kernel on which architecture.

`KERNELS[op][arch]` is the dotted name of the module whose `run` computes `op` on `arch`, a column of the printed table.
A module that serves several architectures is named for each; a file bound to one has it in its name. The table is a
literal: read it, grep it, print it. Only `ops/dispatch.py` reads it to run something, and imports a kernel module when
it is first picked.

`WEIGHT_LAYOUTS` says in which order an operation's kernels take NVFP4 weights; a model is brought into it once, when it
is loaded.
"""

from megamoe.formats.fragment_layout import CodeLayout

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
    "nvfp4_linear": {"sm90": "megamoe.kernels.linear.nvfp4_linear"},
    "nvfp4_weight_only_linear": {"sm90": "megamoe.kernels.linear.nvfp4_weight_only_linear"},
    "nvfp4_experts": {"sm90": "megamoe.kernels.experts.nvfp4_experts"},
    "nvfp4_weight_only_experts": {"sm90": "megamoe.kernels.experts.nvfp4_weight_only_experts"},
    "fp8_linear": {"sm90": "megamoe.kernels.fp8.fp8_linear"},
    "linear": {"sm90": "megamoe.kernels.linear.linear_sm90"},
    "grouped_linear": {"sm90": "megamoe.kernels.linear.grouped_linear_sm90"},
    "nvfp4_grouped_linear": {"sm90": "megamoe.kernels.linear.nvfp4_grouped_linear"},
    "nvfp4_weight_only_grouped_linear": {"sm90": "megamoe.kernels.linear.nvfp4_weight_only_grouped_linear"},
}

WEIGHT_LAYOUTS: dict[str, dict[str, CodeLayout]] = {
    "nvfp4_linear": {"sm90": CodeLayout.FRAGMENT_16X64},
    "nvfp4_weight_only_linear": {"sm90": CodeLayout.FRAGMENT_16X64},
    "nvfp4_grouped_linear": {"sm90": CodeLayout.FRAGMENT_16X64},
    "nvfp4_weight_only_grouped_linear": {"sm90": CodeLayout.FRAGMENT_16X64},
    "nvfp4_experts": {"sm90": CodeLayout.FRAGMENT_16X64},
    "nvfp4_weight_only_experts": {"sm90": CodeLayout.FRAGMENT_16X64},
}
"""Operation → architecture → order of its NVFP4 weights; row-major where nothing is said, and on the CPU."""

ARCHITECTURES = ("sm90", "sm100", "sm103")
"""Columns of the printed table."""


def support_table() -> str:
    """Return the support table as Markdown, as docs/kernels.md and the README print it."""
    lines = [
        f"| operation | {' | '.join(ARCHITECTURES)} |",
        f"| --- |{' --- |' * len(ARCHITECTURES)}",
    ]
    for op in sorted(KERNELS):
        table = KERNELS[op]
        cells = ["yes" if arch in table else "–" for arch in ARCHITECTURES]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)
