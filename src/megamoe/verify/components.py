# SPDX-License-Identifier: Apache-2.0
"""Cosine of every quantized component against the unquantized weights, on real activations.

The reference model (recipe `exact` on the original weights) runs over held-out text. At each layer every component
of the quantized model gets the same bf16 input as the reference weights, so that a number speaks of one component and
not of what came before it. A row is the worst layer.

    linear            attention and index projections
    experts           routed experts of a layer, given the reference's routing
    shared            shared expert of a layer
    kv_row            window latents after a round trip through the cache's row format
    decode_attention  attention output over cached rows against the same over unquantized rows, tokens that are decoded
    prefill_attention the same over all tokens; the first ones average over few rows, and one FP8 row alone has the
                      cosine of kv_row
    decode_prefill    logits of token-by-token decoding against one pass, same model
    logits            whole model against the reference, for information: errors of all layers together

Bars (MINIMUM) hold for w4a16. A W4A4 linear rounds both sides: two independent NVFP4 roundings of Gaussian data have
cosine 0.9955 each, 0.991 together, so its rows are reported without a bar.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile

import torch
import torch.nn.functional as F

from megamoe.cache.pools import LayerPools
from megamoe.checkpoint.overlay import write_overlay
from megamoe.checkpoint.reader import CheckpointError
from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.cache import MAX_CHUNK
from megamoe.models.deepseek_v4.hyper_connection import wrap_sublayer
from megamoe.models.deepseek_v4.linear import LinearInput, experts_op, grouped
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.load import BUNDLED, load
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.route_experts import route_experts
from megamoe.ops.write_cache import write_cache
from megamoe.text.tokenizer import Tokenizer

MINIMUM = {
    "linear": 0.994,
    "experts": 0.988,
    "shared": 0.990,
    "kv_row": 0.9997,
    "decode_attention": 0.9998,
    "prefill_attention": 0.9998,
    "decode_prefill": 0.999,
}
NUM_TOKENS = MAX_CHUNK
NUM_DECODED = 64  # the last tokens are decoded one by one
SOURCE_TREE_MASTER = pathlib.Path(__file__).parents[3] / "tools" / "tiny_model" / "master"


@dataclasses.dataclass(frozen=True)
class ComponentResult:
    """One row of the table.

    Attributes:
        component: see the module docstring.
        recipe: recipe of the quantized model.
        cosine: smallest over layers.
        worst: where that was.
        count: comparisons.
        minimum: the bar, or None where the row is for information.
    """

    component: str
    recipe: str
    cosine: float
    worst: str
    count: int
    minimum: float | None

    @property
    def passed(self) -> bool:
        """True unless the cosine is under the bar (NaN never passes)."""
        return self.minimum is None or self.cosine >= self.minimum


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the cosine of two tensors of one shape, in fp64."""
    return float(F.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0))


def verify_components(
    model: str = "tiny", originals: pathlib.Path | None = None, recipes: tuple[str, ...] = ("w4a16", "w4a4")
) -> list[ComponentResult]:
    """Compare every component of a quantized model with its original weights.

    Args:
        model: "tiny" or a directory in NVIDIA's NVFP4 layout, with sample.txt (held-out text) beside it.
        originals: directory with the original weights of what is quantized; for "tiny" in a source checkout
            tools/tiny_model/master is found by itself.
        recipes: quantized recipes to compare.

    Returns:
        One row per component and recipe.

    Raises:
        ValueError: the originals or the sample text cannot be found.
    """
    directory = BUNDLED.get(model, pathlib.Path(model))
    if originals is None:
        originals = SOURCE_TREE_MASTER
        if model != "tiny" or not originals.is_dir():
            raise CheckpointError(
                f"verify: the original weights of {model!r} are needed to compare with and were not found. "
                "Run in a source checkout (tools/tiny_model/master), or pass --originals DIR."
            )
    sample = directory / "sample.txt"
    if not sample.is_file():
        raise CheckpointError(f"verify: {sample} is missing; put held-out text there.")
    rows: list[ComponentResult] = []
    with tempfile.TemporaryDirectory() as master, torch.inference_mode():
        write_overlay(directory, originals, master)
        reference = load(master, recipe="exact")
        text = sample.read_text(encoding="utf-8")
        ids = torch.tensor([reference.config.bos_token_id, *Tokenizer(directory).encode(text)])[:NUM_TOKENS]
        if len(ids) < NUM_TOKENS:
            raise CheckpointError(
                f"verify: {sample} has {len(ids)} tokens; {NUM_TOKENS} are needed. Put more text there."
            )
        for recipe in recipes:
            rows += _compare(reference, load(model, recipe=recipe), ids)
    return rows


def _compare(reference: Model, quantized: Model, ids: torch.Tensor) -> list[ComponentResult]:
    """Return the rows of one recipe."""
    found: dict[str, list[tuple[float, str]]] = {}

    def record(component: str, where: str, got: torch.Tensor, want: torch.Tensor) -> None:
        found.setdefault(component, []).append((cosine(got, want), where))

    cache, quantized_cache = reference.new_cache(len(ids)), quantized.new_cache(len(ids))
    plan = cache.plan(ids)
    streams = reference.embed(ids)[:, None, :].repeat(1, reference.config.hc_mult, 1)
    for layer, (ref, quant) in enumerate(zip(reference.blocks, quantized.blocks, strict=True)):
        walk = _BlockWalk(ref, quant, plan, cache.layers[layer], quantized_cache.layers[layer], f"layers.{layer}")
        streams = walk.run(streams, record)

    one_pass = quantized.logits(ids)
    decode_cache = quantized.new_cache(len(ids))
    quantized.step(ids[:-NUM_DECODED], decode_cache)
    for token in range(len(ids) - NUM_DECODED, len(ids)):
        decoded = quantized.step(ids[token : token + 1], decode_cache)
        record("decode_prefill", f"token {token}", decoded[0], one_pass[token])
    record("logits", "all tokens", one_pass, reference.logits(ids))

    has_bar = quantized.recipe.name == "w4a16"
    always = ("kv_row", "decode_attention", "prefill_attention", "decode_prefill")
    return [
        ComponentResult(
            component,
            quantized.recipe.name,
            *min(values),
            count=len(values),
            minimum=MINIMUM.get(component) if has_bar or component in always else None,
        )
        for component, values in found.items()
    ]


class _BlockWalk:
    """One block of the reference, with every component of the quantized block run on the same inputs."""

    def __init__(
        self, ref: Block, quant: Block, plan: StepPlan, ref_pools: LayerPools, quant_pools: LayerPools, where: str
    ) -> None:
        self.ref, self.quant, self.plan = ref, quant, plan
        self.ref_pools, self.quant_pools, self.where = ref_pools, quant_pools, where

    def run(self, streams: torch.Tensor, record) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Return the reference's streams after the block; `record` gets every comparison."""
        self.record = record
        w, config = self.ref.weights, self.ref.config
        after = wrap_sublayer(streams, w.hc_attn, w.attn_norm, self._attention, config)
        return wrap_sublayer(after, w.hc_ffn, w.ffn_norm, self._moe, config).mixed()

    def _linear(self, name: str, x: torch.Tensor, ref_w: object, quant_w: object) -> None:
        """Compare one linear on the bf16 input both sides get."""
        x = x.to(torch.bfloat16)
        want = LinearInput(x.float(), self.ref.attention.recipe).times(ref_w)  # type: ignore[arg-type]
        got = LinearInput(x, self.quant.attention.recipe).times(quant_w)  # type: ignore[arg-type]
        self.record("linear", f"{self.where}.{name}", got.float(), want)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        ref, quant, plan = self.ref.attention, self.quant.attention, self.plan
        slots = plan.slots.window_slots
        q, index_q = ref.project(x, plan.positions, self.ref_pools.window, slots)
        kv = read_cache(self.ref_pools.window, slots)  # as it was written: rows of the reference are fp32
        query_latent = rms_norm(
            LinearInput(x, ref.recipe).times(ref.weights.wq_a), ref.weights.q_norm, eps=ref.eps
        )  # [T, q_lora]
        self._linear("wq_a", x, ref.weights.wq_a, quant.weights.wq_a)
        self._linear("wkv", x, ref.weights.wkv, quant.weights.wkv)
        self._linear("wq_b", query_latent, ref.weights.wq_b, quant.weights.wq_b)
        if ref.weights.indexer is not None and quant.weights.indexer is not None:
            self._linear("indexer.wq_b", query_latent, ref.weights.indexer.wq_b, quant.weights.indexer.wq_b)

        write_cache(kv.to(torch.bfloat16), self.quant_pools.window, slots)
        stored = read_cache(self.quant_pools.window, slots)
        self.record("kv_row", self.where, stored, kv)

        selected = ref.select_entries(x, index_q, plan, self.ref_pools)
        if self.ref_pools.entries is not None and self.quant_pools.entries is not None:
            _copy_entries(self.ref_pools.entries, self.quant_pools.entries, plan.entry_slots(ref.kind).entry_slots)
        o = ref.attend(q, plan, self.ref_pools, selected)  # [T, H, C]
        got = quant.attend(q.to(torch.bfloat16), plan, self.quant_pools, selected)
        self.record("decode_attention", self.where, got[-NUM_DECODED:].float(), o[-NUM_DECODED:])
        self.record("prefill_attention", self.where, got.float(), o)

        groups = o.reshape(o.shape[0], ref.num_groups, -1).to(torch.bfloat16)
        z = grouped(groups.float(), ref.weights.wo_a, ref.recipe)
        self.record("linear", f"{self.where}.wo_a", grouped(groups, quant.weights.wo_a, quant.recipe).float(), z)
        self._linear("wo_b", z.flatten(1), ref.weights.wo_b, quant.weights.wo_b)
        return ref.project_output(o)

    def _moe(self, x: torch.Tensor) -> torch.Tensor:
        ref, quant = self.ref.moe, self.quant.moe
        rounded = x.to(torch.bfloat16)
        self.record("shared", self.where, quant.shared(rounded).float(), ref.shared(rounded.float()))
        w = ref.weights
        route_weights, expert_ids = route_experts(
            x,
            w.gate,
            token_ids=self.plan.token_ids,
            top_k=ref.top_k,
            routed_scaling=ref.routed_scaling,
            bias=w.bias,
            expert_table=w.expert_table,
        )
        outputs = [
            experts_op(moe.weights, moe.recipe)(
                source,
                route_weights,
                expert_ids,
                moe.weights.w1,
                moe.weights.w3,
                moe.weights.w2,
                shared_output=None,
                swiglu_limit=moe.swiglu_limit,
            )
            for moe, source in ((quant, rounded), (ref, rounded.float()))
        ]
        self.record("experts", self.where, outputs[0].float(), outputs[1])
        return ref(x, self.plan.token_ids)


def _copy_entries(source: CachePool, target: CachePool, slots: torch.Tensor) -> None:
    """Write the source's rows into the target, rounded by the target's row format."""
    write_cache(read_cache(source, slots).to(torch.bfloat16), target, slots)


def run(model: str, *, originals: pathlib.Path | None, as_json: bool) -> int:
    """Print the table (or one JSON object) and return the exit code: 1 if a component is under its bar."""
    rows = verify_components(model, originals)
    failed = [row for row in rows if not row.passed]
    if as_json:
        content = [{**dataclasses.asdict(row), "passed": row.passed} for row in rows]
        print(json.dumps({"model": model, "passed": not failed, "components": content}))
        return int(bool(failed))
    print("| component | recipe | worst cosine | bar | where | compared |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        bar = f"{row.minimum:g}{'' if row.passed else ' MISSED'}" if row.minimum is not None else "for information"
        if row.minimum is None and row.component in MINIMUM:  # a row without a bar still shows where it stands
            wanted = MINIMUM[row.component]
            bar += f"; {'reaches' if row.cosine >= wanted else 'under'} w4a16's {wanted:g}"
        print(f"| {row.component} | {row.recipe} | {row.cosine:.6f} | {bar} | {row.worst} | {row.count} |")
    print(f"{len(rows) - len(failed)} of {len(rows)} rows within their bars")
    return int(bool(failed))
