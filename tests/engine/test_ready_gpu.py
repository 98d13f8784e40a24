# SPDX-License-Identifier: Apache-2.0
"""On a GPU: a model whose linears are all NVFP4 gets ready, is sealed, and runs.

An operation that has no kernel for the GPU yet is lent its reference (tests/lent.py), run by torch there, so that
everything else is what it will be: kernels from the pack or the compiler, weights in the kernels' order, every bucket,
the seal, and steps of an engine after it. Decode steps are captured unless an operation inside of them is lent.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

import pytest
import torch

from megamoe.checkpoint import write_safetensors
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import explain, warm_up
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.kernels import KERNELS
from megamoe.kernels.compile import Request
from megamoe.kernels.rows import rms_norm
from megamoe.kernels.store import SealedError, store_for, target_of
from megamoe.models.deepseek_v4.config import parse_config
from megamoe.models.deepseek_v4.inventory import Role, inventory
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.models.load import load
from megamoe.ops import dispatch
from megamoe.verify.inputs import INPUTS, kernel_inputs
from megamoe.verify.values import copied, parts

from ..lent import OUTSIDE_OF_GRAPHS
from ..models.deepseek_v4.checkpoints import CONFIG, encode

pytestmark = pytest.mark.gpu

# The sizes of the bundled model, with fewer words: its kernels are those of `megamoe compile --model tiny`.
SMALL: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 512,
    "hidden_size": 256,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "max_position_embeddings": 2048,
    "index_head_dim": 128,
    "index_topk": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
}

PACK = os.environ.get("MEGAMOE_TEST_PACK")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint of random weights, all of its linears in NVFP4."""
    directory = tmp_path_factory.mktemp("checkpoint")
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for entry in inventory(parse_config(SMALL), num_mtp=1):
        if entry.role is Role.TABLE:
            tensors[entry.name] = torch.randint(SMALL["n_routed_experts"], entry.shape, generator=generator)
            continue
        values = torch.randn(entry.shape, generator=generator) * entry.shape[-1] ** -0.5
        if entry.role in (Role.LINEAR, Role.EXPERT):
            leaves, _ = encode(values.bfloat16(), "nvfp4")
            tensors.update({f"{entry.name}.{leaf}": tensor for leaf, tensor in leaves.items()})
        elif entry.name.endswith("norm.weight"):
            tensors[entry.name] = (1.0 + values).bfloat16()
        else:
            tensors[entry.name] = values.bfloat16() if entry.role is Role.PLAIN else values
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(SMALL))
    return directory


def generate(engine: Engine) -> dict[str, list[int]]:
    """Return the tokens of a few requests that run together."""
    tokens: dict[str, list[int]] = {}
    for index, size in enumerate((1, 5, 40, 300)):
        ids = [(31 * at + 7 * index) % SMALL["vocab_size"] for at in range(size)]
        tokens[str(index)] = []
        engine.add(str(index), ids, SamplingParams(max_tokens=8, ignore_eos=True))
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
def test_a_model_gets_ready_is_sealed_and_runs(
    recipe: str, checkpoint: pathlib.Path, lent: list[str], sealed_no_longer: None
) -> None:
    start = time.perf_counter()
    model = load(checkpoint, recipe=recipe, device="cuda", pack=PACK)
    assert isinstance(model, Model) and model.weights.num_relaid > 50
    assert model.weights.blocks[0].attention.wq_a.code_layout is CodeLayout.FRAGMENT_16X64  # type: ignore[union-attr]
    loaded = time.perf_counter() - start
    graphs = set(lent) <= OUTSIDE_OF_GRAPHS
    config = EngineConfig(
        max_sequences=4, max_step_tokens=256, num_pages=24, speculative_tokens=1, decode_graphs=graphs
    )
    engine = Engine(model, config)
    seconds = warm_up(engine)
    store = store_for(target_of(model.device))
    assert store.sealed
    reserved, kernels = torch.cuda.memory_reserved(), len(store.ledger)
    first = generate(engine)
    second = generate(engine)  # finds prefixes of the first
    assert first == second and all(len(one) == 8 for one in first.values())
    assert len(store.ledger) == kernels
    print(f"{recipe}: loaded in {loaded:.2f} s, ready after {seconds:.2f} s more; {kernels} kernels")
    print(f"memory reserved before and after traffic: {reserved} {torch.cuda.memory_reserved()}")
    print(explain(model).splitlines()[-2:])
    other = Request.of(rms_norm.Config(24, "f32", None, "f32"))
    with pytest.raises(SealedError, match=r"rms_norm\[width=24"):
        store.get(other)
    ids = torch.arange(3, 200) % SMALL["vocab_size"]
    got = model.logits(ids).cpu()
    want = load(checkpoint, recipe=recipe).logits(ids)
    cosine = torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1)
    # Random gates leave experts close together: where one is swapped a token's logits are others, in both precisions.
    print(f"logits beside the CPU's: cosine {float(cosine.min()):.6f} at worst, {float(cosine.median()):.6f} mostly")
    assert bool(got.isfinite().all()) and float(cosine.median()) > 0.95


def test_sealed_operations_are_captured_and_replayed(sealed_no_longer: None) -> None:
    """F12: operations that have kernels, at the bundled model's sizes: warm up, run, seal, capture, change, replay."""
    device = torch.device("cuda")
    calls = [call for call in op_calls("tiny") if call.op in KERNELS and call.op in INPUTS]
    dispatch.prepare([(one.op, one.dims) for one in calls], device, what="tiny", pack=PACK and pathlib.Path(PACK))
    first_of_op = {call.op: call for call in reversed(calls)}
    made = []
    for op, call in first_of_op.items():
        for inputs in kernel_inputs(op):
            arguments, other = (inputs.make(call.dims, 9, torch.Generator("cuda").manual_seed(seed)) for seed in (1, 2))
            fresh = {name: copied(arguments[name], device) for name in inputs.written}
            inputs.run(arguments)
            made.append((op, inputs, arguments, other, fresh))
    dispatch.seal(device)
    kernels = len(store_for(target_of(device)).ledger)
    for op, inputs, arguments, other, fresh in made:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = inputs.run(arguments)
        changed = {name: other[name] for name in _tensors(arguments) if name not in fresh}
        again = {name: copied(value, device) for name, value in fresh.items()}
        wanted = inputs.run({**arguments, **changed, **again})
        for name, value in changed.items():
            arguments[name].copy_(value)
        for name, value in fresh.items():
            for part, before in zip(parts(arguments[name]).values(), parts(value).values(), strict=True):
                part.copy_(before)
        graph.replay()
        torch.cuda.synchronize()
        for name, part in parts(wanted).items() if wanted is not None else ():
            if part is None:
                continue
            assert torch.equal(_bytes(part), _bytes(parts(got)[name])), f"{op}: {name} of a replay differs from a call"
    assert len(store_for(target_of(device)).ledger) == kernels
    print(f"{len(made)} ways of calling {len(first_of_op)} operations captured after the seal and replayed")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensors(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
