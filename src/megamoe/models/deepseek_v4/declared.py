# SPDX-License-Identifier: Apache-2.0
"""What config.json and hf_quant_config.json declare about formats, held against the tensors, module by module.

This package reads the format of every weight from its own tensors and needs no declaration. Others do not, and a global
flag taken for every module is how draft experts in MXFP4 were once run as NVFP4. So a declaration that does not fit the
tensors is a finding even where the tensors are sound.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.names import native_name

_EXPORT = "Write the declaration from the tensors, or take the config.json of the original export."


def check_declared(
    raw: Mapping[str, Any],
    quant: Mapping[str, Any] | None,
    formats: Mapping[str, Format],
    *,
    is_packed: bool,
    spelled: Callable[[str], str],
) -> list[Problem]:
    """Return every declaration that does not fit the tensors.

    Args:
        raw: content of config.json.
        quant: content of hf_quant_config.json, or None without one.
        formats: weight -> format, by native name without ".weight".
        is_packed: some weight is spelled by compressed-tensors.
        spelled: native name of a weight -> its name as stored.
    """
    content = raw.get("quantization_config")
    if content is not None and not isinstance(content, dict):
        text = f"config.json: quantization_config is {str(content)[:60]!r}; expected an object."
        return [_problem("quantization_config", text, content, "an object")]
    declared = content or {}
    return [
        *_check_labels(declared),
        *_check_method(declared, formats, is_packed),
        *_check_expert_dtype(raw, declared, formats),
        *_check_modules(declared, formats),
        *_check_groups(declared, formats, spelled),
        *_check_quant_file(declared, quant),
    ]


def declared_formats(raw: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Format]:
    """Return the formats that config.json declares; where it declares nothing, a weight is bf16.

    Args:
        raw: content of config.json.
        modules: native names of weights without ".weight".
    """
    declared = raw.get("quantization_config")
    declared = declared if isinstance(declared, dict) else {}
    layers, ignore = declared.get("quantized_layers"), declared.get("ignore", declared.get("exclude_modules"))
    patterns = (
        [one.removeprefix("model.") for one in ignore if isinstance(one, str)] if isinstance(ignore, list) else []
    )
    nvfp4 = None
    if isinstance(layers, dict):
        algorithms = {_native_module(name): entry for name, entry in layers.items() if isinstance(entry, dict)}
        nvfp4 = {name for name, entry in algorithms.items() if "NVFP4" in str(entry.get("quant_algo"))}
    has_blocks = declared.get("quant_method") == "fp8" or "weight_block_size" in declared
    expert_dtype = str(raw.get("expert_dtype", declared.get("expert_dtype")))
    formats = {}
    for module in modules:
        is_expert = ".ffn.experts." in module
        if nvfp4 is not None:
            is_nvfp4 = any(ancestor in nvfp4 for ancestor in _ancestors(module))
        else:
            is_nvfp4 = declared.get("quant_algo") == "NVFP4" or (
                is_expert and declared.get("moe_quant_algo") == "NVFP4"
            )
        if is_nvfp4 and not any(fnmatch.fnmatchcase(module, one) for one in patterns):
            formats[module] = Format.NVFP4
        elif is_expert and has_blocks and expert_dtype == "fp4":
            formats[module] = Format.MXFP4
        else:
            formats[module] = Format.FP8 if has_blocks else Format.PLAIN
    return formats


def _problem(subject: str, text: str, got: object = "", allowed: object = "") -> Problem:
    return Problem("config-format", subject, text, _EXPORT, str(got), str(allowed))


_LABELS: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8", "modelopt", "compressed-tensors"),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([128, 128], None),
    "group_size": (16, None),
}


def _check_labels(declared: Mapping[str, Any]) -> Iterable[Problem]:
    """Find labels that nobody knows, or that mean what no tensor here is."""
    for name, values in _LABELS.items():
        value = declared.get(name)
        if not declared or value in values:
            continue
        known = " or ".join(repr(one) for one in values if one is not None)
        said = "has no" if name not in declared else f"has {value!r} as"
        text = (
            f"config.json: quantization_config {said} {name}; known is {known}. The tensors were read as what they are."
        )
        yield _problem(f"quantization_config.{name}", text, value, known)


def _check_method(declared: Mapping[str, Any], formats: Mapping[str, Format], is_packed: bool) -> Iterable[Problem]:
    method = declared.get("quant_method")
    is_known = method in _LABELS["quant_method"]
    quantized = {found.value for found in formats.values()} - {Format.PLAIN.value}
    if not declared and quantized:
        text = f"config.json: no quantization_config, but weights are stored as {', '.join(sorted(quantized))}."
        yield _problem("quantization_config", text, "absent", ", ".join(sorted(quantized)))
    elif declared and formats and not quantized:
        text = f"config.json: quantization_config.quant_method is {method!r}, but no weight is quantized."
        yield _problem("quantization_config", text, method, "absent")
    elif is_known and (method == "compressed-tensors") != is_packed and quantized:
        spelled = "compressed-tensors" if is_packed else "DeepSeek or ModelOpt"
        text = f"config.json: quantization_config.quant_method is {method!r}, but the tensors are spelled by {spelled}."
        yield _problem("quantization_config", text, method, spelled)


def _check_expert_dtype(
    raw: Mapping[str, Any], declared: Mapping[str, Any], formats: Mapping[str, Format]
) -> Iterable[Problem]:
    said = raw.get("expert_dtype", declared.get("expert_dtype"))
    experts = [module for module in formats if module.startswith("layers.") and ".ffn.experts." in module]
    if said is None or not experts:
        return
    fits = {"fp4": (Format.MXFP4, Format.NVFP4), "fp8": (Format.FP8,)}.get(str(said), ())
    wrong = [module for module in experts if formats[module] not in fits]
    if wrong:
        found = ", ".join(sorted({formats[module].value for module in wrong}))
        text = (
            f"config.json: expert_dtype is {said!r}, but {len(wrong)} of {len(experts)} routed expert weights are "
            f"{found}, {wrong[0]} among them."
        )
        yield _problem("expert_dtype", text, said, found)


def _ancestors(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _native_module(name: str) -> str:
    """Return the native name of a module, however it is spelled."""
    return native_name(f"{name}.weight").removesuffix(".weight")


def _check_modules(declared: Mapping[str, Any], formats: Mapping[str, Format]) -> Iterable[Problem]:
    """Hold quantized_layers, ignore and the global algorithm against every weight."""
    if not declared or declared.get("quant_method") == "compressed-tensors":
        return
    layers, ignore = declared.get("quantized_layers"), declared.get("ignore", declared.get("exclude_modules"))
    patterns = [one for one in ignore if isinstance(one, str)] if isinstance(ignore, list) else []
    flags = [declared.get("moe_quant_algo"), declared.get("quant_algo")]
    if isinstance(layers, dict):
        nvfp4: set[str] | None = {
            _native_module(name)
            for name, entry in layers.items()
            if isinstance(entry, dict) and "NVFP4" in str(entry.get("quant_algo"))
        }
        where = "quantization_config.quantized_layers"
    elif "NVFP4" in flags:
        nvfp4, where = None, "quantization_config (global NVFP4, no quantized_layers)"
    else:
        nvfp4, where = set(), "quantization_config"
    for module, found in formats.items():
        is_nvfp4 = found is Format.NVFP4
        ignored = any(fnmatch.fnmatchcase(module, one.removeprefix("model.")) for one in patterns)
        if nvfp4 is None:
            is_expert = ".ffn.experts." in module
            says_nvfp4 = not ignored and (is_expert or "NVFP4" in flags[1:])
        else:
            says_nvfp4 = any(ancestor in nvfp4 for ancestor in _ancestors(module))
        if says_nvfp4 and not is_nvfp4:
            yield _problem(module, f"{module}: {found.value}, but {where} declares it NVFP4.", "nvfp4", found.value)
        elif is_nvfp4 and not says_nvfp4:
            yield _problem(module, f"{module}: nvfp4, but {where} does not declare it so.", "not nvfp4", "nvfp4")
        elif is_nvfp4 and ignored:
            yield _problem(module, f"{module}: nvfp4, but a pattern of ignore excludes it.", "ignored", "nvfp4")


_BITS = {Format.FP8: 8, Format.MXFP4: 4, Format.NVFP4: 4}
_SIMPLE_PATTERN = re.compile(r"[\w.\\^$-]*(?:\*[\w.\\^$-]*){0,4}")  # no pattern from a file may take long to match


def _check_groups(
    declared: Mapping[str, Any], formats: Mapping[str, Format], spelled: Callable[[str], str]
) -> Iterable[Problem]:
    """Hold the groups and the ignore list of compressed-tensors against every weight."""
    groups = declared.get("config_groups")
    if declared.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    floats = [one.get("num_bits") for one in weights if isinstance(one, dict) and one.get("type") == "float"]
    bits = {one for one in floats if type(one) is int}
    ignore = declared.get("ignore")
    patterns = [one for one in ignore if isinstance(one, str)] if isinstance(ignore, list) else []
    exact = {one for one in patterns if not one.startswith("re:")}
    expressions = [
        re.compile(one.removeprefix("re:"))
        for one in patterns
        if one.startswith("re:") and _SIMPLE_PATTERN.fullmatch(one.removeprefix("re:")) and _is_expression(one)
    ]
    for module, found in formats.items():
        if found is Format.PLAIN:
            continue
        name = spelled(module)
        if _BITS[found] not in bits:
            text = f"{name}: {found.value}, but no group of config_groups has floats of {_BITS[found]} bits."
            yield _problem(name, text, sorted(bits), _BITS[found])
        elif name in exact or any(one.match(name) for one in expressions):
            yield _problem(name, f"{name}: {found.value}, but a pattern of ignore excludes it.", "ignored", found.value)


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error:
        return False
    return True


def _check_quant_file(declared: Mapping[str, Any], quant: Mapping[str, Any] | None) -> Iterable[Problem]:
    content = quant.get("quantization") if quant is not None else None
    if not isinstance(content, dict):
        return
    pairs = [(name, name) for name in ("quant_algo", "moe_quant_algo", "group_size", "quantized_layers")]
    for theirs, ours in [*pairs, ("exclude_modules", "ignore")]:
        if theirs in content and ours in declared and not _is_same(content[theirs], declared[ours]):
            text = f"hf_quant_config.json: {theirs} differs from quantization_config.{ours} of config.json."
            remedy = "Keep the one that fits the tensors and write the other from it."
            yield Problem("quant-config-disagrees", theirs, text, remedy)


def _is_same(one: Any, other: Any) -> bool:
    """Compare two declarations; the order of patterns means nothing."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return bool(one == other)
