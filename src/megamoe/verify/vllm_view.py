# SPDX-License-Identifier: Apache-2.0
"""What vLLM takes a checkpoint for, and where that differs from what its tensors are.

vLLM decides formats by declarations: quant_method, expert_dtype, moe_quant_algo and quantized_layers of config.json.
This package decides by the tensors. Where the two differ, vLLM reads bytes in a format that they do not have; it may
stop with a shape that does not fit, or run and be wrong.

Source     vLLM 0.33, read and not run: models/deepseek_v4/quant_config.py, model_executor/models/config.py,
           layers/quantization/modelopt.py
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from megamoe.models.deepseek_v4.examine import Examined
from megamoe.models.deepseek_v4.layout import FLOATS, Format

VERSION = "0.33"
_DRAFTS = {"mtp": "DeepSeekV4MTPModel", "dspark": "DSparkDraftModel"}
_EXPERT_DTYPES = ("fp4", "fp8")


@dataclasses.dataclass(frozen=True)
class VllmView:
    """How vLLM reads a checkpoint.

    Attributes:
        architecture: the model class it looks up.
        quantization: the quantization it chooses, and why.
        experts: what it takes routed experts for.
        linears: what it takes the other linears for.
        draft: the draft it would build with speculative decoding.
        cache: the dtype of its caches.
        differences: where this is not what the tensors are, one line each.
    """

    architecture: str
    quantization: str
    experts: str
    linears: str
    draft: str
    cache: str
    differences: tuple[str, ...]


def vllm_view(examined: Examined) -> VllmView | None:
    """Return how vLLM reads a checkpoint; None where it could not be compared with an inventory."""
    if examined.claims is None or examined.stored is None or examined.raw is None:
        return None
    return _Reader(examined, examined.raw).view()


class _Reader:
    """Follows vLLM's decisions."""

    def __init__(self, examined: Examined, raw: Mapping[str, Any]) -> None:
        self.examined = examined
        self.raw = raw
        content = raw.get("quantization_config")
        self.declared: Mapping[str, Any] = content if isinstance(content, dict) else {}
        self.differences: list[str] = []

    def view(self) -> VllmView:
        quantization, experts, linears, taken = self.quantization()
        self.compare(taken)
        names = self.raw.get("architectures")
        return VllmView(
            architecture=str(names[0]) if isinstance(names, list) and names else "none",
            quantization=quantization,
            experts=experts,
            linears=linears,
            draft=self.draft(),
            cache=self.cache(),
            differences=tuple(self.differences),
        )

    def quantization(self) -> tuple[str, str, str, Mapping[str, Format]]:
        """Return the quantization in words, what experts and linears are taken for, and weight -> format."""
        method = self.declared.get("quant_method")
        modules = self.formats
        if not self.declared:
            plain = "unquantized"
            return "none: config.json has no quantization_config", plain, plain, dict.fromkeys(modules, Format.PLAIN)
        if method in ("fp8", "deepseek_v4_fp8"):
            return self.deepseek_fp8()
        if method == "compressed-tensors":
            words = "as config_groups and ignore say"
            return "compressed-tensors", words, words, modules  # declared.py holds these against the tensors
        if str(method).startswith("modelopt"):
            return self.modelopt(str(method))
        self.differences.append(
            f"quant_method is {method!r}, for which vLLM has no DeepSeek-V4: it stops, or wants a plugin of that name."
        )
        return f"{method!r}, unknown for this architecture", "unknown", "unknown", modules

    @property
    def formats(self) -> Mapping[str, Format]:
        assert self.examined.claims is not None
        return self.examined.claims.formats

    def deepseek_fp8(self) -> tuple[str, str, str, Mapping[str, Format]]:
        dtype = self.raw.get("expert_dtype", "fp4")
        algo = str(self.declared.get("moe_quant_algo") or "").upper()
        if dtype not in _EXPERT_DTYPES:
            self.differences.append(f"expert_dtype is {dtype!r}: vLLM stops, it knows {' and '.join(_EXPERT_DTYPES)}.")
        expert = Format.FP8 if dtype == "fp8" else Format.NVFP4 if algo == "NVFP4" else Format.MXFP4
        why = "moe_quant_algo NVFP4" if expert is Format.NVFP4 else f"expert_dtype {dtype}"
        if "expert_dtype" not in self.raw:
            why += " by default"
        scales = "e8m0" if dtype != "fp8" else "fp32"
        self.compare_scales(scales)
        ignored = self.declared.get("ignored_layers")
        skipped = {name for name in ignored if isinstance(name, str)} if isinstance(ignored, list) else set()
        taken = {
            module: Format.PLAIN if module in skipped else expert if ".ffn.experts." in module else Format.FP8
            for module in self.formats
        }
        experts = f"{expert.value}, backbone and draft alike ({why})"
        return "deepseek_v4_fp8 (quant_method fp8 of a deepseek_v4)", experts, f"fp8, {scales} scales", taken

    def modelopt(self, method: str) -> tuple[str, str, str, Mapping[str, Format]]:
        algo = str(self.declared.get("quant_algo") or "").upper()
        layers = self.declared.get("quantized_layers")
        if algo == "MIXED_PRECISION" or method == "modelopt_mixed":
            listed = set(layers) if isinstance(layers, dict) else set()
            taken = {module: Format.NVFP4 if _is_listed(module, listed) else Format.PLAIN for module in self.formats}
            words = "nvfp4 where quantized_layers lists them, else unquantized"
            return "modelopt_mixed (quant_algo MIXED_PRECISION)", words, words, taken
        ignore = self.declared.get("ignore", self.declared.get("exclude_modules"))
        patterns = [one for one in ignore if isinstance(one, str)] if isinstance(ignore, list) else []
        kind = Format.FP8 if algo == "FP8" else Format.NVFP4
        taken = {
            module: Format.PLAIN if any(fnmatch.fnmatchcase(module, one) for one in patterns) else kind
            for module in self.formats
        }
        name = "modelopt" if kind is Format.FP8 else "modelopt_fp4"
        words = f"{kind.value} but for what ignore excludes"
        return f"{name} (quant_algo {algo or 'absent'})", words, words, taken

    def compare_scales(self, expected: str) -> None:
        stored = self.examined.stored
        assert stored is not None
        found = collections.Counter(
            "fp32" if stored.dtype(stored.scales_name(module, kind)) in FLOATS else "e8m0"
            for module, kind in self.formats.items()
            if kind is Format.FP8
        )
        for name, count in found.items():
            if name != expected:
                self.differences.append(
                    f"scales of {count:,} FP8 weights are {name}; vLLM goes by expert_dtype and allocates {expected}."
                )

    def compare(self, taken: Mapping[str, Format]) -> None:
        """Take down every kind of weight that vLLM reads in another format."""
        wrong: dict[tuple[str, Format, Format], list[str]] = {}
        for module, found in self.formats.items():
            if taken[module] is not found:
                wrong.setdefault((_kind(module), found, taken[module]), []).append(module)
        for (kind, found, theirs), modules in wrong.items():
            verb = "unquantized" if theirs is Format.PLAIN else theirs.value
            self.differences.append(
                f"{kind}: {len(modules):,} weights are {found.value}, vLLM takes them for {verb} ({modules[0]} and on)."
            )

    def draft(self) -> str:
        draft, claimed = self.examined.draft, self.raw.get("num_nextn_predict_layers")
        assert draft is not None
        announced = "dspark_block_size" in self.raw
        if draft.num_dspark:
            if not announced:
                self.differences.append(
                    "the draft is DSpark, but config.json has no dspark_* fields: vLLM would build a classic MTP draft."
                )
            return f"{_DRAFTS['dspark']}, with a speculative_config that asks for it"
        if draft.num_mtp:
            if claimed != draft.num_mtp:
                self.differences.append(
                    f"num_nextn_predict_layers is {claimed}, the tensors hold {draft.num_mtp} stage(s): vLLM believes "
                    "config.json."
                )
            return f"{_DRAFTS['mtp']}, with a speculative_config that asks for it"
        if claimed:
            self.differences.append(
                f"num_nextn_predict_layers is {claimed}, but there is no draft: speculative decoding finds no weights."
            )
        return "none"

    def cache(self) -> str:
        algo = self.declared.get("kv_cache_quant_algo")
        said = f"kv_cache_quant_algo {algo}" if algo else "auto, the checkpoint names none"
        return f"{said}; --kv-cache-dtype fp8 makes it fp8_ds_mla, 584 bytes an entry as in this package"


def _is_listed(module: str, listed: set[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:count]) in listed for count in range(len(parts), 0, -1))


def _kind(module: str) -> str:
    where = "draft" if module.startswith("mtp.") else "backbone"
    what = (
        "shared experts" if ".shared_experts." in module else "routed experts" if ".experts." in module else "linears"
    )
    return f"{what} of the {where}"
