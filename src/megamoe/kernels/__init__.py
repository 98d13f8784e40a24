# SPDX-License-Identifier: Apache-2.0
"""The support table: which operation has a kernel on which architecture.

`KERNELS[op][arch]` is the dotted name of the module whose `run` computes `op`. `arch` is `sm90`, `sm100` or `portable`
(no architecture-specific instruction). The table is a literal: read it, grep it, print it. Only `ops/dispatch.py`
reads it to run something, and imports a kernel module when it is first picked.

`WEIGHT_LAYOUTS` says in which order an operation's kernels take NVFP4 weights; a model is brought into it once, when it
is loaded.
"""

from megamoe.formats.fragment_layout import CodeLayout

KERNELS: dict[str, dict[str, str]] = {
    "rms_norm": {"portable": "megamoe.kernels.portable.rms_norm"},
    "rms_norm_quantize_nvfp4": {"portable": "megamoe.kernels.portable.rms_norm_quantize_nvfp4"},
    "quantize_nvfp4": {"portable": "megamoe.kernels.portable.quantize_nvfp4"},
    "quantize_fp8_rows": {"portable": "megamoe.kernels.portable.quantize_fp8_rows"},
    "clamped_swiglu": {"portable": "megamoe.kernels.portable.clamped_swiglu"},
    "route_experts": {"portable": "megamoe.kernels.portable.route_experts"},
    "hyper_connection_pre": {"portable": "megamoe.kernels.portable.hyper_connection_pre"},
    "hyper_connection_pre_norm": {"portable": "megamoe.kernels.portable.hyper_connection_pre_norm"},
    "hyper_connection_head": {"portable": "megamoe.kernels.portable.hyper_connection_head"},
    "hyper_connection_post": {"portable": "megamoe.kernels.portable.hyper_connection_post"},
    "nvfp4_linear": {"sm90": "megamoe.kernels.sm90.nvfp4_linear"},
    "nvfp4_weight_only_linear": {"sm90": "megamoe.kernels.sm90.nvfp4_weight_only_linear"},
    "nvfp4_experts": {"sm90": "megamoe.kernels.sm90.nvfp4_experts"},
    "nvfp4_weight_only_experts": {"sm90": "megamoe.kernels.sm90.nvfp4_weight_only_experts"},
    "fp8_linear": {"sm90": "megamoe.kernels.sm90.fp8_linear"},
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
"""Columns of the printed table. Portable kernels are compiled for all of them."""


def support_table() -> str:
    """Return the support table as Markdown, as docs/kernels.md and the README print it."""
    lines = [
        f"| operation | {' | '.join(ARCHITECTURES)} |",
        f"| --- |{' --- |' * len(ARCHITECTURES)}",
    ]
    for op in sorted(KERNELS):
        table = KERNELS[op]
        cells = [arch if arch in table else "portable" if "portable" in table else "–" for arch in ARCHITECTURES]
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)
