# SPDX-License-Identifier: Apache-2.0
"""Which operations one decode step calls, what it launches beside them, and how many graph nodes that will be.

    python tools/step_calls.py                        # Flash, every linear NVFP4, recipe w4a16, one rank
    python tools/step_calls.py --model pro --recipe w4a4
    python tools/step_calls.py --config some/checkpoint --plain --list

The model is built of tensors without memory (torch's meta device), so that sizes of any model cost nothing and a host
read is an error. Every operation call is recorded by `ops.watch` and answered with an empty result. Every other tensor
operation that would be a launch, that is neither a view nor an allocation, is glue. What fills the plan
on the host, and the one copy that takes it to the device, are not recorded.

Nodes are what a call becomes in a CUDA graph. Where kernels exist the number is that of their host halves, read from
kernels/; where none exists yet it is a plan, marked as such in NODES.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe import ops
from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.linear.linear_stream import MAX_COLUMNS
from megamoe.models.deepseek_v4 import weights as loading
from megamoe.models.deepseek_v4.cache import Cache
from megamoe.models.deepseek_v4.config import ModelConfig, parse_config
from megamoe.models.deepseek_v4.inventory import inventory
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.stacked import LinearWeight
from megamoe.models.deepseek_v4.weights import ModelWeights
from megamoe.models.recipe import Recipe, get_recipe

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_checkpoint import CONFIGS  # noqa: E402

META = torch.device("meta")
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),  # allocations
    *("detach", "alias", "lift_fresh", "_unsafe_view"),  # views that do not say so
}


# Weights without memory


class _Shapes(loading._Loader):
    """Builds weights of the sizes of a configuration, on the meta device; nothing is read."""

    def __init__(self, config: ModelConfig, recipe: Recipe, *, plain: bool) -> None:
        dtype = torch.float32 if recipe.dequantize_weights else None
        no_claims = types.SimpleNamespace(formats={}, unused=())
        super().__init__(cast(Any, None), cast(Any, no_claims), config, dtype, META)
        self._is_plain = plain or dtype is not None
        self._sizes = {entry.name: entry.shape for entry in inventory(config)}

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._sizes[name], dtype=dtype or self.dtype or torch.bfloat16, device=META)

    def table(self, name: str) -> torch.Tensor:
        return torch.empty(self._sizes[name], dtype=torch.int64, device=META)

    def linear(self, module: str) -> LinearWeight:
        return self._weight(*self._sizes[module])

    def grouped(self, module: str) -> torch.Tensor | NvFp4Tensor:
        num_rows, num_columns = self._sizes[module]
        groups = self.config.o_groups
        return cast(Any, self._weight(groups, num_rows // groups, num_columns))

    def experts(self, prefix: str) -> tuple[LinearWeight, LinearWeight, LinearWeight]:
        count = self.config.n_routed_experts
        w1, w3, w2 = (self._weight(count, *self._sizes[f"{prefix}.0.{name}"]) for name in ("w1", "w3", "w2"))
        return w1, w3, w2

    def _weight(self, *shape: int) -> LinearWeight:
        if self._is_plain:
            return torch.empty(shape, dtype=self.dtype or torch.bfloat16, device=META)
        return NvFp4Tensor(
            torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=META),
            torch.empty((*shape[:-1], shape[-1] // 16), dtype=torch.float8_e4m3fn, device=META),
            torch.empty(shape[:-2], dtype=torch.float32, device=META),
        )


def weights_without_memory(config: ModelConfig, recipe: Recipe, *, plain: bool) -> ModelWeights:
    """Return the backbone's weights on the meta device: every linear NVFP4, or plain."""
    return _Shapes(config, recipe, plain=plain).build(0, 0)


# What operations return


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _nvfp4_rows(x: torch.Tensor) -> NvFp4Tensor:
    *rows, width = x.shape
    codes, scales = _empty(*rows, width // 2, dtype=torch.uint8), _empty(*rows, width // 16, dtype=torch.float8_e4m3fn)
    return NvFp4Tensor(codes, scales, _empty(*rows, dtype=torch.float32), ScaleLayout.ROW_MAJOR, "row")


def _mxfp4_rows(x: torch.Tensor) -> MxFp4Tensor:
    *rows, width = x.shape
    return MxFp4Tensor(
        _empty(*rows, width // 2, dtype=torch.uint8), _empty(*rows, width // 32, dtype=torch.float8_e8m0fnu)
    )


def _fp8_rows(x: torch.Tensor, group: int) -> Fp8RowTensor:
    *rows, width = x.shape
    scales = _empty(*rows, -(-width // group), dtype=torch.float8_e8m0fnu)
    return Fp8RowTensor(_empty(*rows, width, dtype=torch.float8_e4m3fn), scales, group)


def _index_query(q: torch.Tensor, key_format: RowFormat) -> torch.Tensor | MxFp4Tensor | Fp8RowTensor:
    if key_format is RowFormat.INDEX_FP4:
        return _mxfp4_rows(q)
    return _fp8_rows(q, q.shape[-1]) if key_format is RowFormat.INDEX_FP8 else _like(q)


def _like(x: torch.Tensor) -> torch.Tensor:
    return _empty(*x.shape, dtype=x.dtype)


def _mixed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, streams, width = x.shape
    post, comb = (
        _empty(num_tokens, streams, dtype=torch.float32),
        _empty(num_tokens, streams, streams, dtype=torch.float32),
    )
    return _empty(num_tokens, width, dtype=x.dtype), post, comb


def _experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _empty(*x.shape, dtype=torch.bfloat16 if not isinstance(x, torch.Tensor) else x.dtype)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "embed_streams": lambda table, ids, streams, dtype: _empty(ids.shape[0], streams, table.shape[1], dtype=dtype),
    "hyper_connection_pre_norm": lambda x, *rest: _mixed(x),
    "hyper_connection_post": lambda y, x, *rest: _like(x),
    "hyper_connection_post_pre_norm": lambda y, x, *rest: (_like(x), *_mixed(x)),
    "hyper_connection_head": lambda x, *rest: _mixed(x)[0],
    "hyper_connection_head_norm": lambda x, fn, base, scale, weight, rows, *rest: _empty(
        len(x if rows is None else rows), x.shape[2], dtype=x.dtype
    ),
    "rms_norm": lambda x, weight, eps, dtype: _empty(*x.shape, dtype=dtype),
    "rope": lambda x, *rest: _like(x),
    "hadamard": lambda x, dtype: _empty(*x.shape, dtype=dtype),
    "rotate_queries": lambda q, *rest: _like(q),
    "write_latent": lambda latent, *rest: None if latent is None else _like(latent),
    "round_index_query": lambda q, weights, pos, table, key_format, *rest: (
        _index_query(q, key_format),
        _like(weights),
    ),
    "linear": lambda x, w, dtype: _empty(x.shape[0], w.shape[0], dtype=dtype),
    "nvfp4_linear": lambda x, w, dtype: _empty(x.shape[0], w.shape[0], dtype=dtype),
    "nvfp4_weight_only_linear": lambda x, w, dtype: _empty(x.shape[0], w.shape[0], dtype=dtype),
    "grouped_linear": lambda x, w, dtype: _empty(*x.shape[:2], w.shape[1], dtype=dtype),
    "nvfp4_grouped_linear": lambda x, w, dtype: _empty(*x.shape[:2], w.shape[1], dtype=dtype),
    "nvfp4_weight_only_grouped_linear": lambda x, w, dtype: _empty(*x.shape[:2], w.shape[1], dtype=dtype),
    "quantize_nvfp4": lambda x, scale, layout: _nvfp4_rows(x),
    "quantize_mxfp4": lambda x: _mxfp4_rows(x),
    "quantize_fp8_rows": lambda x, group: _fp8_rows(x, group),
    "route_experts": lambda x, gate, top_k, *rest: (
        _empty(x.shape[0], top_k, dtype=torch.float32),
        _empty(x.shape[0], top_k, dtype=torch.int64),
    ),
    "experts": _experts,
    "nvfp4_experts": _experts,
    "nvfp4_weight_only_experts": _experts,
    "clamped_swiglu": lambda gate, *rest: _like(gate),
    "plan_slots": lambda *rest: None,
    "write_block_tables": lambda *rest: None,
    "write_cache": lambda *rest: None,
    "compress_kv": lambda *rest: None,
    "write_index_keys": lambda *rest: None,
    "index_topk": lambda q, weights, keys, tables, requests, visible, top_k: _empty(
        q.shape[0], top_k, dtype=torch.int32
    ),
    "copy_cache": lambda *rest: None,
    "sparse_attention": lambda q, *rest: _like(q),
}
"""Operation → its result from the arguments that its door passes on."""


def _linear_nodes(dims: tuple[int, ...]) -> int:
    return -(-dims[-1] // MAX_COLUMNS)  # kernels/linear/linear_stream.py: parts of columns, one launch each


NODES: dict[str, int] = {
    "route_experts": 2,  # kernels/router/route_experts.py: scores, selection
    "nvfp4_weight_only_experts": 4,  # kernels/experts/expert_stream.py: sort_pairs, gate_up, down, sum_slots
    "nvfp4_experts": 5,  # and the quantization of h between its products
    "index_topk": 2,  # planned: scores of parts of the entries, selection
    "sparse_attention": 2,  # planned: parts of the items, their combination with the rotation
}
"""Operation → graph nodes of one call with few tokens; 1 where nothing is said."""

LINEARS = {"nvfp4_linear", "nvfp4_weight_only_linear"}


# Recording


@dataclasses.dataclass(frozen=True)
class Event:
    """One call or one launch beside the operations.

    Attributes:
        place: kind of layer ("SWA", "CSA", "HCA"), or "model".
        layer: its number, or -1.
        op: operation, or the name of the tensor operation.
        is_glue: whether it is not an operation of ours.
        nodes: graph nodes it becomes.
    """

    place: str
    layer: int
    op: str
    is_glue: bool
    nodes: int


class Recorder(TorchDispatchMode):
    """Collects events while it is entered; `at` says where they belong."""

    def __init__(self) -> None:
        """Start with no events."""
        super().__init__()
        self.events: list[Event] = []
        self._place, self._layer, self._depth = "model", -1, 0

    @contextlib.contextmanager
    def at(self, place: str, layer: int) -> Iterator[None]:
        """Let events inside the block belong to a layer."""
        before = self._place, self._layer
        self._place, self._layer = place, layer
        yield
        self._place, self._layer = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what would be a launch, and run it."""
        name = func.overloadpacket.__name__
        if not self._depth and not func.is_view and name not in NO_LAUNCH:
            self.events.append(Event(self._place, self._layer, name, True, 1))
        return func(*args, **(kwargs or {}))

    def observe(self, op: str, run: ops.dispatch.Run, reference: ops.dispatch.Run) -> ops.dispatch.Run:
        """Note an operation call and answer it; for `ops.watch`."""

        def answered(*args: Any) -> Any:
            nodes = _linear_nodes(args[1].shape) if op in LINEARS else NODES.get(op, 1)
            self.events.append(Event(self._place, self._layer, op, False, nodes))
            self._depth += 1
            result = OUTPUTS[op](*args)
            self._depth -= 1
            return result

        return answered


class _Placed:
    """A block that says where it is."""

    def __init__(self, block: Any, recorder: Recorder, layer: int) -> None:
        self._block, self._recorder, self._layer = block, recorder, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._recorder.at(self._block.attention.kind.name, self._layer):
            return self._block(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def record_step(config: ModelConfig, recipe: Recipe, *, num_tokens: int = 1, plain: bool = False) -> list[Event]:
    """Record one step of a backbone and its head: tokens of one sequence.

    Args:
        config: any.
        recipe: any.
        num_tokens: 1 for decoding.
        plain: weights that could be NVFP4 are bf16.
    """
    weights = weights_without_memory(config, recipe, plain=plain)
    model = Model(config, weights, recipe, META, name="meta", directory=pathlib.Path())
    recorder = Recorder()
    model.blocks = cast(Any, tuple(_Placed(block, recorder, layer) for layer, block in enumerate(model.blocks)))
    cache = Cache(config, recipe, max_tokens=4096, num_draft_stages=0, device=META)
    ids = torch.zeros(num_tokens, dtype=torch.int64)  # the plan is made on the host
    with (
        ops.use("reference"),
        ops.watch(recorder.observe),
        torch.no_grad(),
    ):  # inference mode hides what composite operations do
        cache.plan(ids)  # a sequence that has just got its pages writes more of its block table than one that goes on
        recorder.events.clear()
        plan = cache.plan(ids)
        with recorder:
            model.head(model.forward(plan, cache.layers))
    return recorder.events


# Reports


def by_kind(events: list[Event]) -> dict[str, tuple[int, float, float, float]]:
    """Return, by place, its number of layers and a layer's calls, glue launches and nodes; for "model" all of them."""
    rows = {}
    for place in dict.fromkeys(event.place for event in events):
        here = [event for event in events if event.place == place]
        layers = len({event.layer for event in here})
        calls = sum(not event.is_glue for event in here) / layers
        rows[place] = (layers, calls, len(here) / layers - calls, sum(event.nodes for event in here) / layers)
    return rows


def totals(events: list[Event]) -> tuple[int, int, int]:
    """Return operation calls, glue launches and graph nodes of a step, glue included."""
    glue = sum(event.is_glue for event in events)
    return len(events) - glue, glue, sum(event.nodes for event in events)


def report(events: list[Event], *, with_list: bool) -> str:
    """Return Markdown tables: by kind of layer, and with a list every operation of each kind."""
    lines = ["| | layers | calls | glue | nodes |", "| --- | --- | --- | --- | --- |"]
    for place, (layers, *numbers) in by_kind(events).items():
        lines.append(f"| {place} | {layers} | {' | '.join(f'{number:g}' for number in numbers)} |")
    calls, glue, nodes = totals(events)
    lines.append(f"| step | | {calls:,} | {glue:,} | {nodes:,} |")
    if with_list:
        lines += ["", "| | what | a layer |", "| --- | --- | --- |"]
        for place, (layers, *_) in by_kind(events).items():
            found = collections.Counter((event.is_glue, event.op) for event in events if event.place == place)
            for (is_glue, op), count in found.items():
                lines.append(f"| {place} | {'glue: ' if is_glue else ''}{op} | {count / layers:g} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=tuple(CONFIGS), default="flash", help="sizes of a released model")
    parser.add_argument("--config", type=pathlib.Path, help="a config.json, or a directory with one")
    parser.add_argument("--recipe", default="w4a16", help="exact, w4a16 or w4a4")
    parser.add_argument("--tokens", type=int, default=1, help="tokens of the step; 1 is decoding")
    parser.add_argument("--plain", action="store_true", help="bf16 weights where NVFP4 would be possible")
    parser.add_argument("--list", action="store_true", help="every operation, by kind of layer")
    options = parser.parse_args(arguments)
    raw = CONFIGS[options.model]
    if options.config is not None:
        path = options.config / "config.json" if options.config.is_dir() else options.config
        raw = json.loads(path.read_text(encoding="utf-8"))
    events = record_step(parse_config(raw), get_recipe(options.recipe), num_tokens=options.tokens, plain=options.plain)
    print(report(events, with_list=options.list))


if __name__ == "__main__":
    main()
