# SPDX-License-Identifier: Apache-2.0
"""Kernels that write latent rows, entries and index keys: their PTX on the CPU (simt.py) gives the references' bytes.

What a GPU adds is its own last bits of rsqrt and ex2, and the speed; those tests stand beside the operations' others.
"""

from __future__ import annotations

import functools
import pathlib
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.cache.compressor_state import state_capacity
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.kernels.cache import compress_config, write_latent_config
from megamoe.kernels.cache.compress import tokens_of_block
from megamoe.kernels.compile import Request, compile_objects
from megamoe.kernels.parts.launch import DTYPE_NAMES
from megamoe.kernels.parts.pool import ROW_NAMES
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.plan_slots import RowTables
from megamoe.ops.write_index_keys import write_index_keys
from megamoe.ops.write_latent import write_latent
from megamoe.verify.inputs import INPUTS
from megamoe.verify.values import copied, whole_storage

from ..ops.compressor_cases import Sequences
from ..ops.steps import tables_of
from .simt import Block

pytestmark = pytest.mark.kernels

Ptx = Callable[[Any], str]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Ptx:
    """Compile a kernel and return its PTX."""

    @functools.cache
    def compiled(config: object) -> str:
        folder: pathlib.Path = tmp_path_factory.mktemp("rows")
        (one,) = compile_objects([Request.of(config)], "sm90a", folder, keep_code=True)
        assert one.ptx is not None
        return one.ptx.read_text()

    return compiled


@pytest.mark.parametrize(("largest", "mantissa", "exponent"), [(448.0, 0x600000, 8), (6.0, 0x400000, 2)])
def test_scales_without_a_division(largest: float, mantissa: int, exponent: int) -> None:
    """parts/pool_device.py: power_of_two_scale, of all mantissas; exponents are alike, for no quotient is subnormal."""
    for first in (0x3F800000, 0x38800000, 0x7E800000):
        bits = torch.arange(first, first + (1 << 23), dtype=torch.int32)
        quotient = bits.view(torch.float32) / torch.tensor(largest)
        want = (quotient.view(torch.int32) + 0x7FFFFF) >> 23
        assert torch.equal(((bits + (0x7FFFFF - mantissa)) >> 23) - exponent, want)


class Launch:
    """Buffers and parameters of a launch, in the order of the arguments."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.params: list[bytes] = []

    def tensor(self, value: torch.Tensor, *numbers: int, form: str = "") -> None:
        """Add a tensor: its address, then what of shape and strides is not known when a kernel is compiled."""
        self.buffers.append(value)
        self.params.append(struct.pack(f"<q{form}", len(self.buffers) << 32, *numbers))

    def rows(self, value: torch.Tensor) -> None:
        """Add a matrix of any number of rows and any row stride."""
        self.tensor(value, value.shape[0], 0, value.stride(0), form="iiq")

    def vector(self, value: torch.Tensor) -> None:
        """Add a number a token."""
        self.tensor(value.contiguous(), value.shape[0], 0, form="ii")

    def pool(self, pool: CachePool) -> None:
        """Add a pool with all that its memory holds."""
        shape = pool.num_blocks, pool.page_bytes, pool.block_stride_bytes
        self.tensor(whole_storage(pool.storage), *shape, form="iiq")

    def numbers(self, form: str, *numbers: float) -> None:
        """Add plain numbers."""
        self.params += [struct.pack(f"<{kind}", one) for kind, one in zip(form, numbers, strict=True)]


def differing(got: CachePool, want: CachePool) -> int:
    return int((whole_storage(got.storage) != whole_storage(want.storage)).sum())


def run_write_latent(ptx: Ptx, given: dict[str, Any]) -> torch.Tensor | None:
    """Run the kernel, one block after another; return the normed query latents."""
    query, kv, pool, launch = given["query_latent"], given["kv"], given["pool"], Launch()
    num_blocks = -(-kv.shape[0] // write_latent_config.one_warp_tile(512).rows)
    names: tuple[Any, ...] = (None, None, None)
    y = None
    if query is not None:
        y = torch.full(query.shape, torch.nan, dtype=torch.bfloat16)
        launch.rows(query)
        launch.tensor(given["q_norm"])
        launch.rows(y)
        num_blocks += -(-kv.shape[0] // write_latent_config.one_warp_tile(query.shape[1]).rows)
        names = (query.shape[1], "bf16", "bf16")
    launch.rows(kv)
    launch.tensor(given["kv_norm"])
    launch.pool(pool)
    launch.vector(given["slots"])
    launch.vector(given["pos"])
    launch.tensor(given["table"].inv_freq)
    launch.numbers("if", pool.rows_per_block, 1e-6)
    text = ptx(write_latent_config.Config(512, 64, "bf16", "bf16", "fp8_rope_bf16", *names))
    for block in range(num_blocks):
        Block(text, 128, launch.params, launch.buffers, (block, 0)).run()
    return y


@pytest.mark.parametrize("query_width", [None, 128, 1024, 1536])
def test_write_latent(ptx: Ptx, query_width: int | None, seed: int) -> None:
    inputs = INPUTS["write_latent"][0]
    dims = {"C": 512, "R": 64} | ({} if query_width is None else {"Q": query_width})
    given = inputs.make(dims, 19, torch.Generator().manual_seed(seed))
    expected = {name: copied(value, "cpu") for name, value in given.items()}
    want, y = inputs.door(**expected), run_write_latent(ptx, given)
    assert differing(given["pool"], expected["pool"]) == 0
    assert y is None or torch.equal(y, want)


def test_rows_at_the_ends_of_the_range(ptx: Ptx, seed: int) -> None:
    """Norms so large that rows saturate at 57344, rotary channels as well; amaxes on a power of two and below 1e-4."""
    given = INPUTS["write_latent"][0].make({"C": 512, "R": 64}, 8, torch.Generator().manual_seed(seed))
    given["slots"] = torch.arange(8)
    kv, weight = given["kv"], given["kv_norm"]
    weight.fill_(2.0**13)
    weight[64:128] = 2.0**-9
    weight[128:192] = 0.0
    weight[448:480] = 57344.0
    kv[1] = torch.where(torch.arange(512) % 64 == 3, 7.0, 0.125)
    kv[2] = 0.0
    kv[3] = -kv[3]
    expected = {name: copied(value, "cpu") for name, value in given.items()}
    write_latent(**expected)
    run_write_latent(ptx, given)
    assert differing(given["pool"], expected["pool"]) == 0
    data, scales = given["pool"].data_rows[0], given["pool"].scale_rows[0]
    assert int(scales[:, :7].max()) == 134 and 0x7E in data[:, :448] and 57344.0 in data[:, 448:].view(torch.bfloat16)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_does_not_become_one(ptx: Ptx, wrong: float, seed: int) -> None:
    """Its scale is NaN, which readers refuse by name; its neighbours are what they were. Infinity makes others 0."""
    inputs = INPUTS["write_latent"][0]
    given = inputs.make({"C": 512, "R": 64}, 8, torch.Generator().manual_seed(seed))
    given["slots"] = torch.arange(8)
    expected = {name: copied(value, "cpu") for name, value in given.items()}
    write_latent(**expected)
    given["kv"][3, 7] = wrong
    run_write_latent(ptx, given)
    others = 255 if wrong != wrong else 105  # 2^ceil(log2(1e-4 / 448))
    assert given["pool"].scale_rows[0, 3].tolist() == [255] + [others] * 6 + [0]
    for pool in (given["pool"], expected["pool"]):
        pool.data_rows[0, 3], pool.scale_rows[0, 3] = 0, 0
    assert differing(given["pool"], expected["pool"]) == 0


def run_compress(ptx: Ptx, many: bool, *arguments: Any) -> None:
    """Run the kernel of cache/compress.py, one block after another; arguments as those of compress_kv.reference.

    `many` says which of its two: a token a block, or several.
    """
    raw, ape, norm, state, step, entries, positions, requests, first_idx, tables, *rest = arguments
    state_slots, entry_slots, table, ratio, overlap, eps, out_dtype, *rotate = rest
    config = compress_config.Config(
        norm.shape[0],
        ratio,
        overlap,
        table.rope_dim,
        DTYPE_NAMES[ape.dtype],
        DTYPE_NAMES[norm.dtype],
        out_dtype == torch.bfloat16,
        ROW_NAMES[entries.row_format],
        any(rotate),
        tokens_of_block(ratio, many),
    )
    into, launch = state if step is None else step, Launch()
    launch.rows(raw.contiguous())
    launch.tensor(ape, ape.shape[1], form="q")
    launch.tensor(norm)
    for pool in (state, into, entries):
        launch.pool(pool)
    for one in (positions, requests, first_idx):
        launch.vector(one)
    launch.tensor(tables, *tables.shape, tables.stride(0), form="iiq")
    for one in (state_slots, entry_slots):
        launch.vector(one)
    launch.tensor(table.inv_freq)
    rows = (state.rows_per_block, into.rows_per_block, entries.rows_per_block)
    launch.numbers("iiiif", *rows, 0 if step is None else 1, eps)
    for block in range(-(-raw.shape[0] // config.tokens)):
        Block(ptx(config), config.lanes * config.parts, launch.params, launch.buffers, (block, 0)).run()


COMPRESSORS = pytest.mark.parametrize(
    ("ratio", "overlap", "width", "row_format", "rotate"),
    [
        (4, True, 512, RowFormat.FP8_ROPE_BF16, None),
        (128, False, 512, RowFormat.FP8_ROPE_BF16, None),
        (4, True, 128, RowFormat.INDEX_FP4, True),
    ],
    ids=["CSA", "HCA", "index keys"],
)


@pytest.fixture
def on_simt(ptx: Ptx, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return what makes the operations run the kernel, that of a token a block or that of several."""

    def switch(many: bool) -> None:
        def entries(*arguments: Any) -> None:
            run_compress(ptx, many, *arguments)

        def keys(*arguments: Any) -> None:
            *given, ratio, rotate, eps, out_dtype = arguments
            run_compress(ptx, many, *given, ratio, True, eps, out_dtype, rotate)

        monkeypatch.setattr(sys.modules[compress_kv.__module__], "pick", lambda *_: entries)
        monkeypatch.setattr(sys.modules[write_index_keys.__module__], "pick", lambda *_: keys)

    return switch


@COMPRESSORS
def test_decoding(
    ratio: int,
    overlap: bool,
    width: int,
    row_format: RowFormat,
    rotate: bool | None,
    on_simt: Callable[[bool], None],
    seed: int,
) -> None:
    """A token a request: first blocks of sequences, tokens that complete none, nobody's; pools with gaps."""
    op = "compress_kv" if rotate is None else "write_index_keys"
    inputs, name = INPUTS[op][0], "entries" if rotate is None else "keys"
    dims = {"ratio": ratio, "coff": 2 if overlap else 1, "D": width}
    given = inputs.make(dims, 9, torch.Generator().manual_seed(seed))
    want = {key: copied(value, "cpu") for key, value in given.items()}
    inputs.run(want)
    on_simt(False)
    inputs.run(given)
    assert [differing(given[pool], want[pool]) for pool in ("state", name)] == [0, 0]


@COMPRESSORS
@pytest.mark.parametrize("in_step", [False, True])
def test_steps_of_several_requests(
    ratio: int,
    overlap: bool,
    width: int,
    row_format: RowFormat,
    rotate: bool | None,
    in_step: bool,
    on_simt: Callable[[bool], None],
    seed: int,
) -> None:
    """Rows of the step before the token, rows of rings of several blocks, nobody's tokens between the requests."""
    torch.manual_seed(seed)
    one = Sequences(
        ratio,
        overlap,
        width,
        longest=140,
        row_format=row_format,
        rotate=rotate,
        out_dtype=torch.bfloat16,
        rope_dim=64,
    )
    one.norm = one.norm.bfloat16()
    if ratio == 128:
        steps = [[(1, 125), (-1, 1), (0, 2)], [(1, 1)], [(0, 2), (1, 4)]]
        counts = (4, 130)
    else:
        steps = [[(1, 6), (-1, 1), (0, 9)], [(1, 1), (-1, 2)], [(0, 3), (1, 6)], [(1, 1), (0, 1)]]
        counts = (13, 14)
    state, pages = tables_of(3, 2, state_capacity(ratio, overlap, 9 if ratio == 4 else 125)), tables_of(3, 35, 1)
    want = one.run(steps, state, pages, in_step=in_step)
    on_simt(in_step)
    # Where rows go into the rings, nobody may look at first_idx.
    got = one.run(steps, state, pages, in_step=in_step, first_idx=None if in_step else 10**9)
    assert got.same_bytes(want)
    for request, count in enumerate(counts):
        assert torch.equal(one.values(got, pages, request, count), one.expected(request, count))


def test_one_block_of_many_rows_is_a_ring_too(on_simt: Callable[[bool], None], seed: int) -> None:
    torch.manual_seed(seed)
    one = Sequences(4, True, 128, row_format=RowFormat.INDEX_FP4, rotate=True, out_dtype=torch.bfloat16, rope_dim=64)
    one.norm = one.norm.bfloat16()
    ring, pages = RowTables(torch.tensor([[2], [0], [1]], dtype=torch.int32), 17), tables_of(3, 5, 2)
    steps = [[(0, 9)], [(0, 9)], [(0, 1)], [(0, 1)]]
    want = one.run(steps, ring, pages, in_step=False)
    on_simt(True)
    assert one.run(steps, ring, pages, in_step=False).same_bytes(want)
