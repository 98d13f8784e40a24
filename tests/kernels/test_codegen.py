# SPDX-License-Identifier: Apache-2.0
"""Every kernel and configuration of the table, compiled without a GPU: what PTX and SASS must and must not hold.

`make test-kernels`. Sizes are those of all models: for sm_90a all of them, for sm_100a and sm_103a some of every kernel
that is not bound to Hopper.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
from typing import Any

import pytest

from megamoe.kernels import KERNELS
from megamoe.kernels.compile import TARGETS, Built, Request, compile_objects
from megamoe.kernels.plan import requests_for
from megamoe.kernels.store import load_library
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls

from .ptx import divergent_whole_warp_instructions, instructions

pytestmark = pytest.mark.kernels

SHARED_LIMIT = 227 * 1024
PTX_WANTED = {
    "rows.rms_norm": ["rsqrt.approx.f32", "shfl.sync.bfly.b32", "griddepcontrol.wait"],
    "rows.quantize_nvfp4": ["div.rn.f32", "rcp.rn.f32", "cvt.rn.satfinite.e4m3x2.f32", "max.NaN.f32"],
    "rows.rms_norm_quantize_nvfp4": ["div.rn.f32", "cvt.rn.satfinite.e4m3x2.f32", "rsqrt.approx.f32"],
    "rows.quantize_fp8_rows": ["div.rn.f32", "cvt.rn.satfinite.e4m3x2.f32"],
    "hyper_connection.hyper_connection_pre": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32",
        "cp.async.bulk.prefetch.L2.global",
        "barrier.cluster.arrive",
        "barrier.cluster.wait",
        "griddepcontrol.wait",
    ],
    "rows.clamped_swiglu": ["min.NaN.f32", "max.NaN.f32", "ex2.approx"],
    "router.route_scores": ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "sqrt.rn.f32"],
    "router.route_tiles": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "cp.async.cg.shared.global",
        "sqrt.rn.f32",
    ],
    "router.route_select": ["div.rn.f32", "griddepcontrol.wait"],
    "linear.linear_stream": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mul.rn.bf16x2",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "elect.sync",
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "experts.expert_stream": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mul.rn.bf16x2",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "griddepcontrol.wait",
    ],
    "experts.expert_tiles_sm90": [
        "wgmma.mma_async.sync.aligned.m64n",
        "cp.async.bulk.tensor.2d.shared::cta.global",
        "mul.rn.bf16x2",
    ],
    "linear.grouped_stream": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mul.rn.bf16x2",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "linear.weight_tiles_sm90": ["wgmma.mma_async.sync.aligned.m64n", "setmaxnreg.inc"],
    "experts.sort_pairs": ["match.any.sync.b32", "griddepcontrol.wait"],
    "experts.sum_slots": ["griddepcontrol.wait"],
    "rows.expand_nvfp4": ["mul.rn.bf16x2"],
    "fp8.fp8_stream": [
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "cvt.rn.f16x2.e4m3x2",
        "cp.async.cg.shared.global.L2::128B",
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "fp8.fp8_tiles_sm90": ["wgmma.mma_async.sync.aligned.m64n", "setmaxnreg.inc"],
    "fp8.fp8_expand": ["cvt.rn.f16x2.e4m3x2"],
    "attention.attention_tiles": [
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cvt.rn.f16x2.e4m3x2",
        "ex2.approx.ftz.f32",
        "setmaxnreg.inc",
        "griddepcontrol.wait",
    ],
    "attention.attention_tiles_sm90": [
        "wgmma.mma_async.sync.aligned.m64n32k16",
        "wgmma.mma_async.sync.aligned.m64n128k16",
        "cvt.rn.f16x2.e4m3x2",
        "fence.proxy.async.shared::cta",
        "setmaxnreg.inc",
        "griddepcontrol.wait",
    ],
    "attention.attention_combine": ["griddepcontrol.wait", "griddepcontrol.launch_dependents"],
    "cache.plan_slots": ["griddepcontrol.wait", "griddepcontrol.launch_dependents"],
    "cache.write_latent": [
        "cvt.rn.satfinite.e4m3x2.f32",
        "max.NaN.f32",
        "rsqrt.approx.f32",
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "cache.compress": ["div.rn.f32", "add.rn.f32", "ex2.approx", "max.NaN.f32", "griddepcontrol.wait"],
    "cache.copy_rows": [
        "ld.global.v4.b32",
        "st.global.v4.b32",
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "rows.rotate_queries": ["rsqrt.approx.f32", "cvt.rni.s32.f32", "fma.rn.f32", "griddepcontrol.wait"],
    "rows.round_index_query": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "cvt.rni.s32.f32",
        "fma.rn.bf16x2",
        "max.NaN.bf16x2",
    ],
    "hyper_connection.hyper_connection_post": ["mul.rn.f32", "add.rn.f32"],
    "indexer.index_scores": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mul.rn.bf16x2",
        "cp.async.cg.shared.global",
        "griddepcontrol.wait",
    ],
    "indexer.index_scores_sm90": [
        "wgmma.mma_async.sync.aligned.m64n",
        "mul.rn.bf16x2",
        "cp.async.cg.shared.global",
        "fence.proxy.async.shared::cta",
        "griddepcontrol.wait",
    ],
    "indexer.index_select": ["red.shared.add.u32", "vote.sync.ballot.b32", "griddepcontrol.wait"],
    "sampling.sample": [
        "barrier.cluster.arrive",
        "mul.rn.f32",
        "add.rn.f32",
        "cvt.rzi.s64.f32",
        "mul.rn.f64",
        "red.shared.add.u32",
        "griddepcontrol.wait",
    ],
    "sampling.token_logprobs": ["barrier.cluster.arrive", "redux.sync.max.s32", "griddepcontrol.wait"],
    "sampling.penalize": ["div.rn.f32", "mul.rn.f32", "sub.rn.f32", "griddepcontrol.wait"],
}
"""Module → instructions that its PTX must hold."""

PTX_FORBIDDEN = {
    "rows.quantize_nvfp4": ["div.full.f32", "div.approx", "rcp.approx"],
    "rows.rms_norm_quantize_nvfp4": ["div.full.f32", "div.approx", "rcp.approx"],
    "rows.quantize_fp8_rows": ["div.full.f32", "div.approx", "rcp.approx"],
    "rows.mean_of_streams": ["div.full.f32", "div.approx", "rcp.approx", "fma.rn.f32"],
    "rows.rotate_queries": ["sin.approx", "cos.approx"],
    "rows.round_index_query": ["sin.approx", "cos.approx", "div.full.f32", "div.approx"],
    "hyper_connection.hyper_connection_post": ["fma.rn.f32"],
    "cache.write_latent": ["div.full.f32", "div.approx", "rcp.approx", "sin.approx", "cos.approx"],
    "cache.compress": ["div.full.f32", "div.approx", "rcp.approx", "sin.approx", "cos.approx"],
    "sampling.sample": ["div.full.f32", "div.approx", "fma.rn.f32", "ex2.approx"],
    "sampling.penalize": ["div.full.f32", "div.approx", "fma.rn.f32"],
}
"""Module → instructions whose rounding is not the operation's."""

SASS_WANTED = {
    "rows.rms_norm": ["LDG.E.128", "STG.E.128"],
    "rows.quantize_nvfp4": ["LDG.E.128", "STG.E.64"],
    "rows.rms_norm_quantize_nvfp4": ["LDG.E.128", "STG.E.128", "STG.E.64"],
    "rows.quantize_fp8_rows": ["LDG.E.128", "STG.E.64"],
    "rows.clamped_swiglu": ["LDG.E.128", "STG.E.128"],
    "hyper_connection.hyper_connection_post": ["LDG.E.128", "STG.E.128"],
    "hyper_connection.hyper_connection_pre": ["LDG.E.128", "STG.E.128", "LDS.128", "HMMA.16816.F32.BF16"],
    "router.route_scores": ["LDG.E.128", "HMMA.16816.F32.BF16"],
    "router.route_tiles": ["LDGSTS.E.BYPASS", "LDSM.16.M88.4", "HMMA.16816.F32.BF16"],
    "linear.linear_stream": ["UBLKCP", "LDS.128", "HMUL2.BF16_V2", "HMMA.16816.F32.BF16"],
    "experts.expert_stream": ["UBLKCP", "LDS.128", "HMUL2.BF16_V2", "HMMA.16816.F32.BF16"],
    "experts.expert_tiles_sm90": ["UTMALDG.2D", "LDS.128", "HGMMA.64x", "HMUL2.BF16_V2"],
    "experts.gather_rows": ["STG.E.128"],
    "linear.grouped_stream": ["UBLKCP", "LDS.128", "HMUL2.BF16_V2", "HMMA.16816.F32.BF16"],
    "linear.weight_tiles_sm90": ["UTMALDG.2D", "HGMMA.64x", "STG.E"],
    "experts.sum_slots": ["LDG.E.128", "STG.E.128"],
    "rows.expand_nvfp4": ["STG.E.128"],
    "fp8.fp8_stream": ["LDGSTS.E.BYPASS.LTC128B.128", "LDS.128", "F2FP.F16.E4M3.UNPACK_B", "HMMA.16816.F32"],
    "fp8.fp8_tiles_sm90": ["UTMALDG.2D", "HGMMA.64x", "STSM.16.MT88.4", "STG.E.128"],
    "fp8.fp8_expand": ["STG.E.128"],
    "attention.attention_tiles": ["LDG.E.128", "STS.128", "STG.E.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "HMMA.16816"],
    "attention.attention_tiles_sm90": ["LDG.E.128", "STS.128", "STG.E.128", "HGMMA.64x32x16", "HGMMA.64x128x16"],
    "attention.attention_combine": ["LDG.E.128", "STG.E.128"],
    "cache.copy_rows": ["LDG.E.128", "STG.E.128"],
    "rows.embed_streams": ["LDG.E.128", "STG.E.128"],
    "rows.mean_of_streams": ["LDG.E.128", "STG.E.128"],
    "rows.add_to_streams": ["LDG.E.128", "STG.E.128"],
    "rows.rotate_queries": ["LDG.E.128", "STG.E.128"],
    "rows.round_index_query": ["LDG.E.128", "STG.E.128", "HMMA.16816.F32.BF16", "HFMA2.BF16_V2"],
    "cache.write_latent": ["LDG.E.128", "STG.E.128", "STG.E.64", "STG.E.U8"],
    "cache.compress": ["LDG.E.128", "STG.E.128", "STG.E.U8"],
    "indexer.index_scores": ["LDGSTS.E.BYPASS", "LDS.128", "HMUL2.BF16_V2", "HMMA.16816.F32.BF16"],
    "indexer.index_scores_sm90": ["LDGSTS.E.BYPASS", "LDS.128", "HMUL2.BF16_V2", "HGMMA.64x"],
    "indexer.index_select": ["ATOMS.POPC.INC.32", "VOTE.ANY"],
    "sampling.sample": ["LDGSTS.E.BYPASS", "ATOMS.ADD"],
    "sampling.token_logprobs": ["LDGSTS.E.BYPASS"],
}
"""Module → prefixes of instructions that its SASS must hold."""

SPILLS_ALLOWED = {
    "experts.expert_stream": 4,
    "fp8.fp8_stream": 13,
    "hyper_connection.hyper_connection_pre": 36,
    "attention.attention_tiles": 228,
    "attention.attention_tiles_sm90": 34,
    "cache.compress": 24,  # arguments of the launch, once a token where a block has several
}
"""Module → stack accesses in its SASS. 512 threads leave 128 registers; one or two that are needed once a launch, a
pass or a unit do not fit in some configurations, most of them with a second token tile. In hyper_connection_pre it is a
few addresses, once a tile of 16 tokens. In fp8_stream it is the second half of K = 12288 and 16384, whose 1,024 threads
have 64 registers each, and the group's place in a launch of several. In attention_tiles it is addresses of fetching
threads, once a tile, and on sm_100a of multiplying threads, whose sums take 128 of 184 registers. In
attention_tiles_sm90 nearly all of it lies before the first tile."""


def planned(target: str) -> list[Request]:
    """Return what is compiled for a target: for Hopper everything, for the others some of every kind.

    A kind is a kernel and the values of its key that are no sizes. Of each kind its largest key, and for sm100a the
    smallest, too: what the architectures share is the source, and what may differ is how it is compiled.
    """
    calls = [(call.op, call.dims) for model in MODELS for call in op_calls(model) if call.op in KERNELS]
    requests = requests_for(calls, target)
    if target == "sm90a":
        return requests
    kinds: dict[tuple[Any, ...], list[Request]] = {}
    for one in requests:
        kind = tuple(value for _, value in one.values if type(value) is not int)
        kinds.setdefault((one.module, kind), []).append(one)
    chosen = set()
    for alike in kinds.values():
        alike.sort(key=lambda one: [value for _, value in one.values if type(value) is int])
        chosen |= {alike[-1]} if target == "sm103a" else {alike[0], alike[-1]}
    return [one for one in requests if one in chosen or str(one) == LOADED]


LOADED = "rows.rms_norm[width=4096,x=bf16,weight=bf16,out=bf16]"
"""The object that is loaded and launched with wrong arguments."""


@dataclasses.dataclass(frozen=True)
class Code:
    """What was read of one object.

    Attributes:
        request, path: which kernel, and its library.
        ptx: its PTX.
        ptx_names: instructions of the PTX.
        divergent: whole-warp instructions that only some lanes reach.
        sass: instructions of the SASS, counted.
        usage: REG, STACK, SHARED and LOCAL of `cuobjdump -res-usage`.
    """

    request: Request
    path: pathlib.Path
    ptx: pathlib.Path
    ptx_names: frozenset[str]
    divergent: list[str]
    sass: collections.Counter[str]
    usage: dict[str, int]

    def count(self, prefix: str) -> int:
        """Return how many SASS instructions start like this."""
        return sum(number for name, number in self.sass.items() if name.startswith(prefix))


@functools.cache
def tool(name: str) -> str:
    """Return the path of a binary of NVIDIA's wheel."""
    distribution = importlib.metadata.distribution(f"nvidia-cuda-{name}")
    (path,) = [one for one in distribution.files or [] if one.name == name]
    return str(distribution.locate_file(path))


def printed(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def read(one: Built) -> Code:
    assert one.ptx is not None and one.cubin is not None
    text = one.ptx.read_text()
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", printed("nvdisasm", str(one.cubin)))
    usage = printed("cuobjdump", "-res-usage", str(one.cubin))
    return Code(
        request=one.request,
        path=one.path,
        ptx=one.ptx,
        ptx_names=frozenset(instructions(text)),
        divergent=divergent_whole_warp_instructions(text),
        sass=collections.Counter(sass),
        usage={name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)},
    )


@pytest.fixture(scope="module", params=["sm90a", "sm100a", "sm103a"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Code]]:
    directory = tmp_path_factory.mktemp(request.param)
    requests = planned(request.param)
    result = compile_objects(requests, request.param, directory, keep_code=True)
    assert [one.request for one in result] == requests
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        return request.param, list(pool.map(read, result, chunksize=8))


def test_everything_compiles_for_its_target(built: tuple[str, list[Code]]) -> None:
    target, kernels = built
    for one in kernels:
        assert f".target {TARGETS[target]}" in one.ptx.read_text(), one.request
        assert one.path.stat().st_size < 200_000


def test_ptx_holds_what_it_must(built: tuple[str, list[Code]]) -> None:
    for one in built[1]:
        text = one.ptx.read_text()
        for wanted in PTX_WANTED.get(one.request.module, []):
            if wanted == "rcp.rn.f32" and ("x", "f32") in one.request.values:
                continue  # values of 24 bits are divided
            found = any(name.startswith(wanted) for name in one.ptx_names)
            assert found or wanted in text, (str(one.request), wanted)
        for forbidden in PTX_FORBIDDEN.get(one.request.module, []):
            assert not any(name.startswith(forbidden) for name in one.ptx_names), (str(one.request), forbidden)


def test_no_lane_waits_alone(built: tuple[str, list[Code]]) -> None:
    for one in built[1]:
        assert one.divergent == [], str(one.request)


def test_sass_has_wide_accesses_and_no_spills(built: tuple[str, list[Code]]) -> None:
    for one in built[1]:
        assert one.sass.total() > 40
        spills = one.count("LDL") + one.count("STL")
        assert spills <= SPILLS_ALLOWED.get(one.request.module, 0), str(one.request)
        for wanted in SASS_WANTED.get(one.request.module, []):
            assert one.count(wanted), (str(one.request), wanted)


def test_products_are_issued_without_waits_between_them(built: tuple[str, list[Code]]) -> None:
    """Where registers run short, the compiler waits after every wgmma: right, and half as fast."""
    for one in built[1]:
        if one.request.module == "experts.expert_tiles_sm90":
            assert one.count("WARPGROUP.DEPBAR") <= 4, str(one.request)  # for each set of registers, the end; else 16


def test_wgmma_instructions_overlap(built: tuple[str, list[Code]]) -> None:
    """Where the compiler cannot see that sums stay in place between instructions, it waits after every single one."""
    for one in built[1]:
        if one.request.module == "indexer.index_scores_sm90":
            assert one.count("HGMMA") == 8 * one.count("WARPGROUP.ARRIVE"), str(one.request)
        if one.request.module == "linear.weight_tiles_sm90":
            assert one.count("HGMMA") >= 4 * one.count("WARPGROUP.ARRIVE"), str(one.request)


def test_resources_are_within_limits(built: tuple[str, list[Code]]) -> None:
    for one in built[1]:
        allowed = 8 * SPILLS_ALLOWED.get(one.request.module, 0)
        assert max(one.usage["STACK"], one.usage["LOCAL"]) <= allowed, str(one.request)
        assert one.usage["REG"] <= 255
        config = one.request.config()
        assert one.usage["SHARED"] + getattr(config, "shared_bytes", 0) <= SHARED_LIMIT


def test_a_block_of_the_collapsing_kernel_fits_a_multiprocessor(built: tuple[str, list[Code]]) -> None:
    """hyper_connection_pre: two groups of 8 warps hold a tile each; with more than 128 registers one would be left."""
    kernels = [one for one in built[1] if one.request.module == "hyper_connection.hyper_connection_pre"]
    assert kernels
    for one in kernels:
        config = one.request.config()
        assert one.usage["REG"] * 32 * config.warps * config.groups <= 65536


def test_two_streaming_linears_share_a_multiprocessor(built: tuple[str, list[Code]]) -> None:
    """A launch fills its rings while the one before is still there: registers and shared memory of a half, or all."""
    for one in built[1]:
        if one.request.module == "linear.linear_stream":
            plan = one.request.config().plan
            assert one.usage["REG"] * plan.threads * plan.blocks_per_multiprocessor <= 65536


def test_rows_of_an_entry_are_loaded_before_they_are_used(built: tuple[str, list[Code]]) -> None:
    """compress: values and scores of four rows, 8 channels of each, and the bias; two blocks on a multiprocessor."""
    for one in built[1]:
        if one.request.module == "cache.compress":
            config = one.request.config()
            assert one.count("LDG.E.128") >= 6 * config.rows_at_once, str(one.request)
            assert one.usage["REG"] * config.lanes * config.parts <= 32768, str(one.request)  # two blocks and more


def test_objects_load_without_a_gpu_and_check_their_arguments(built: tuple[str, list[Code]]) -> None:
    """F6: dtype, shape and device are checked at every launch, by the object itself."""
    import torch

    one = next(one for one in built[1] if str(one.request) == "rows.rms_norm[width=4096,x=bf16,weight=bf16,out=bf16]")
    launch = load_library(one.path, one.request.symbol)
    x = torch.zeros(2, 4096, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected device_type=cuda"):
        launch(x, x[0], x, 1e-6)
