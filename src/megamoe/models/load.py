# SPDX-License-Identifier: Apache-2.0
"""megamoe.load: a checkpoint directory (or the bundled model) and a recipe become a model, or one clear refusal."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterable

import torch

from megamoe.cache.pools import CacheSize, capacity_report
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.models import BUNDLED, find_checkpoint
from megamoe.models.deepseek_v4.cache import backbone_specs, tokens_per_page
from megamoe.models.deepseek_v4.calls import model_calls, pairs, weight_ops
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.dummy import DummyWeights, dummy_bytes, dummy_model
from megamoe.models.deepseek_v4.examine import examine
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.rules import check_accept
from megamoe.models.deepseek_v4.weights import WeightLoader, bytes_when_loaded
from megamoe.models.recipe import Recipe, get_recipe
from megamoe.models.room import Budget, no_room_is_told, require_budget, require_room
from megamoe.ops import dispatch

__all__ = ["BUNDLED", "load"]

LOAD_FORMATS = ("safetensors", "dummy")


def load(
    model: str | os.PathLike[str],
    recipe: str = "w4a16",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    pack: str | os.PathLike[str] | None = None,
    accept: Iterable[str] = (),
    load_format: str = "safetensors",
    num_layers: int | None = None,
    budget: Budget | None = None,
) -> Model:
    """Load a model.

    On a CUDA device its kernels come first: a model that calls an operation without a kernel for that device is refused
    before any weight is read, naming all of them; then every kernel is loaded, or compiled where it has to be; then the
    weights, in the order that the kernels take them in.

    Args:
        model: "tiny" (bundled) or a checkpoint directory with config.json and safetensors.
        recipe: "exact", "w4a16" or "w4a4"; fixes every numeric choice, see megamoe.models.recipe.
        device: "cpu" or a CUDA device.
        dtype: only torch.float32, and only with recipe "exact" (where it is the default).
        pack: a kernel pack to load kernels from, on a CUDA device (megamoe compile).
        accept: rules of docs/checkpoints.md that the checkpoint may break, of those that can be accepted; what was
            accepted is among the model's `notes`.
        load_format: "safetensors", or "dummy": random weights are made on the device and no tensor is read; config.json
            alone is needed, and "flash" and "pro" are models as well. They have no draft.
        num_layers: of dummy weights, how many of the model's layers are made, the first ones; None for all.
        budget: the device memory that may be used; a model that cannot fit it is refused before its weights are read.

    Returns:
        The model: `logits`, `new_cache`, `step`.

    Raises:
        ValueError: unknown model, recipe, device or dtype; no memory for the weights; CheckpointError (a ValueError)
            when the checkpoint is damaged, incomplete or not DeepSeek-V4, naming the tensors; PackError (a ValueError)
            when the pack is damaged or foreign.
        NotImplementedError: the device has no kernel for operations of the model.
    """
    chosen = get_recipe(recipe)
    if dtype is not None and (chosen.name != "exact" or dtype is not torch.float32):
        raise ValueError(
            f"load: dtype may only be torch.float32 with recipe 'exact'; got {dtype} with {chosen.name!r}. "
            "A recipe fixes its own dtypes: leave dtype out."
        )
    where = _check_device(device)
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load: unknown load_format {load_format!r}; allowed are {', '.join(LOAD_FORMATS)}.")
    if load_format == "dummy":
        return _load_dummy(os.fspath(model), chosen, where, pack, num_layers, budget)
    if num_layers is not None:
        raise ValueError(
            f"load: num_layers goes with load_format 'dummy', where layers are made; got {num_layers}. Leave it out: a "
            "checkpoint is loaded as a whole."
        )
    clock = _Clock()
    directory = find_checkpoint(model, "load")
    accepted = check_accept(accept)
    examined = examine(directory)
    warnings = examined.refuse(accepted)
    config = examined.usable_config
    _check_recipe(chosen, config)
    assert examined.stored is not None and examined.claims is not None
    num_bytes = bytes_when_loaded(examined.stored, examined.claims, _held_dtype(chosen))
    what = f"load: model {str(model)!r} with recipe {chosen.name}"
    with CheckpointReader(directory, examined.headers) as reader:
        loader = WeightLoader(
            reader,
            config,
            dequantize=chosen.dequantize_weights,
            dtype=chosen.activation_dtype,
            device=where,
            examined=examined,
        )
        clock.ends("headers")
        calls = model_calls(config, loader.formats, chosen)
        dispatch.prepare(pairs(calls), where, what=what, pack=None if pack is None else pathlib.Path(pack))
        clock.ends("kernels")
        if budget is not None:
            require_budget(what, {"weights": num_bytes, **_least_caches(config, chosen, budget)}, budget.memory_bytes)
        require_room(what, num_bytes, examined.headers.num_bytes, where)
        with no_room_is_told(what, num_bytes):
            weights = loader.load(_layouts(chosen, where))
        clock.ends("weights")
    notes = tuple(f"{finding.rule}: {finding}" for finding in (*warnings, *examined.told))
    seconds = clock.seconds
    return Model(config, weights, chosen, where, name=str(model), directory=directory, warnings=notes, seconds=seconds)


def _load_dummy(
    model: str,
    recipe: Recipe,
    where: torch.device,
    pack: str | os.PathLike[str] | None,
    num_layers: int | None,
    budget: Budget | None,
) -> Model:
    """Make a model of random weights; arguments and errors are those of `load`."""
    clock = _Clock()
    made = dummy_model(model, num_layers)
    _check_recipe(recipe, made.config)
    what = f"load: dummy model {model!r} with recipe {recipe.name}"
    clock.ends("headers")
    calls = model_calls(made.config, made.formats, recipe)
    dispatch.prepare(pairs(calls), where, what=what, pack=None if pack is None else pathlib.Path(pack))
    clock.ends("kernels")
    num_bytes = dummy_bytes(made, _held_dtype(recipe))
    if budget is not None:
        needed = {"weights": num_bytes, **_least_caches(made.config, recipe, budget)}
        require_budget(what, needed, budget.memory_bytes)
    require_room(what, num_bytes, 0, where)
    with no_room_is_told(what, num_bytes, "of weights were made", "make fewer layers (num_layers)"):
        weights = DummyWeights(made, dtype=_held_dtype(recipe), device=where, layouts=_layouts(recipe, where)).make()
    clock.ends("weights")
    return Model(
        made.config,
        weights,
        recipe,
        where,
        name=model,
        directory=made.directory,
        warnings=made.notes,
        seconds=clock.seconds,
    )


class _Clock:
    """Times phases that follow each other.

    Attributes:
        seconds: phase → how long it took.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def ends(self, phase: str) -> None:
        """Note that a phase has ended and the next one begins."""
        now = time.perf_counter()
        self.seconds[phase], self._start = now - self._start, now


def _held_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return what weights are dequantized to, None where they stay in their containers."""
    return recipe.activation_dtype if recipe.dequantize_weights else None


def _least_caches(config: ModelConfig, recipe: Recipe, budget: Budget) -> dict[str, int]:
    """Return the bytes of the least caches that an engine can run with, by what they are for."""
    per_page = tokens_per_page(config) if budget.tokens_per_page is None else budget.tokens_per_page
    size = CacheSize(budget.num_sequences, 1, per_page, budget.ring_tokens, budget.step_tokens)
    report = capacity_report(backbone_specs(config, recipe), size)
    return {
        f"rings of {size.num_sequences} sequences": size.num_sequences * report.bytes_per_sequence,
        "step area": report.step_area_bytes,
        "one page": report.bytes_per_page,
    }


def _layouts(recipe: Recipe, device: torch.device) -> dict[str, CodeLayout]:
    """Return in which order each kind of NVFP4 weight is wanted: that of the operation which will multiply by it."""
    ops = weight_ops(Format.NVFP4, recipe)
    return {kind: dispatch.weight_layout(op, device) for kind, op in ops.items()}


def _check_device(device: str | torch.device) -> torch.device:
    """Return the device, refusing what this machine does not have."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"load: unknown device {str(device)!r}; allowed are 'cpu' and 'cuda[:N]'.") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"load: device {str(device)!r} is not supported; allowed are 'cpu' and 'cuda[:N]'.")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"load: device {str(device)!r} asked for, but torch sees no CUDA device. Use device='cpu'.")
    return where


def _check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse a recipe whose cache formats cannot hold this model's rows."""
    problems = []
    nope = config.head_dim - config.qk_rope_head_dim
    if recipe.kv_row_format is RowFormat.FP8_ROPE_BF16 and (config.qk_rope_head_dim != 64 or nope % 64):
        problems.append(
            f"FP8 KV rows need 64 rotary dims and a multiple of 64 others; got head_dim {config.head_dim} "
            f"with {config.qk_rope_head_dim} rotary dims"
        )
    has_index = LayerKind.CSA in config.layer_kinds
    if has_index and recipe.index_key_format is RowFormat.INDEX_FP4 and config.index_head_dim != 128:
        problems.append(f"FP4 index keys need index_head_dim 128; got {config.index_head_dim}")
    if problems:
        raise ValueError(f"load: recipe {recipe.name!r} does not fit this model: {'; '.join(problems)}. Use 'exact'.")
