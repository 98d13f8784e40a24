# SPDX-License-Identifier: Apache-2.0
"""What a converter does with one weight: carry it over, recode it exactly, or round it.

A step gets the places of bytes and functions that read tensors; which weight is what is decided by the model's code
(models/<architecture>/convert.py). Every exact step proves its claim on the bytes that it wrote: they are read back
from the file and compared with the source after dequantization (see `formats.recode`), and a difference ends the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megamoe.checkpoint.byte_range import ByteRange
from megamoe.checkpoint.convert import Output, Target
from megamoe.checkpoint.manifest import Record
from megamoe.checkpoint.problem import CheckpointError
from megamoe.checkpoint.rounding import measure
from megamoe.formats import fp8, mxfp4, nvfp4, recode
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.mxfp4 import MxFp4Tensor, mxfp4_to_nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_search import ScaleSearch, quantize_weights

MAX_LISTED_BLOCKS = 10_000  # of one weight in the report
_ROWS = 128  # an FP8 block is that high
_VALUES = 1 << 20  # compared or converted at once


def nvfp4_outputs(module: str, shape: tuple[int, int], *, has_input_scale: bool) -> tuple[Output, ...]:
    """Return the tensors of an NVFP4 weight [N, K]."""
    num_rows, num_columns = shape
    found = (
        Output(f"{module}.weight", "U8", (num_rows, num_columns // 2)),
        Output(f"{module}.weight_scale", "F8_E4M3", (num_rows, num_columns // nvfp4.BLOCK)),
        Output(f"{module}.weight_scale_2", "F32", ()),
    )
    return (*found, Output(f"{module}.input_scale", "F32", ())) if has_input_scale else found


@dataclasses.dataclass(frozen=True)
class Carry:
    """Copy a tensor's bytes.

    Attributes:
        output: the tensor.
        source: its bytes.
    """

    output: Output
    source: ByteRange
    memory_bytes: int = 1 << 20

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes."""
        return (self.output,)

    @property
    def source_bytes(self) -> int:
        """Bytes it reads."""
        return self.source.num_bytes

    def run(self, target: Target) -> list[Record]:
        """Copy; carried tensors are not reported one by one."""
        target.copy(self.output.name, self.source)
        return []


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Write tensors that are stored under other names or in another spelling, values unchanged.

    Attributes:
        outputs: tensors it makes.
        source_bytes: bytes it reads.
        load: returns them by name.
    """

    outputs: tuple[Output, ...]
    source_bytes: int
    load: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs."""
        return 3 * sum(output.num_bytes for output in self.outputs)

    def run(self, target: Target) -> list[Record]:
        """Write them."""
        tensors = self.load()
        for output in self.outputs:
            target.write(output.name, tensors[output.name])
        return []


@dataclasses.dataclass(frozen=True)
class Mxfp4ToNvfp4:
    """Recode MXFP4 to NVFP4: codes copied, scales translated; blocks without an equal are rounded if there are any.

    Attributes:
        module: weight, without ".weight".
        group: what the report counts it under.
        shape: logical [N, K].
        codes: packed codes.
        load: reads the weight.
        load_scales: reads its scales.
        top_exponent: from `recode.scan_scales`.
        inexact: numbers of the blocks without an equal.
        spans: the scan's counts of exponents, on one weight of those that share it; else None.
        input_scale: for engines with static activation scales.
        by_values: prove by comparing every value instead of codes and scales.
    """

    module: str
    group: str
    shape: tuple[int, int]
    codes: ByteRange
    load: Callable[[], MxFp4Tensor]
    load_scales: Callable[[], torch.Tensor]
    top_exponent: int
    inexact: torch.Tensor
    spans: Mapping[int, int] | None
    input_scale: float
    by_values: bool = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes."""
        return nvfp4_outputs(self.module, self.shape, has_input_scale=True)

    @property
    def source_bytes(self) -> int:
        """Bytes it reads."""
        return self.codes.num_bytes + self.codes.num_bytes // recode.CODE_BYTES

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs."""
        num_values = self.shape[0] * self.shape[1]
        return 24 * num_values if self.inexact.numel() else num_values + (64 << 20)

    def run(self, target: Target) -> list[Record]:
        """Recode and prove."""
        tensor_scale = torch.tensor(recode.tensor_scale_of(self.top_exponent), dtype=torch.float32)
        target.write(f"{self.module}.weight_scale_2", tensor_scale)
        target.write(f"{self.module}.input_scale", torch.tensor(self.input_scale, dtype=torch.float32))
        record = {
            **_record(self, "mxfp4", "nvfp4", self.source_bytes),
            "top_exponent": self.top_exponent,
            "blocks": self.shape[0] * self.shape[1] // recode.BLOCK,
            "inexact_blocks": self.inexact.numel(),
        }
        if self.spans is not None:
            record["exponent_spans"] = {str(span): count for span, count in sorted(self.spans.items())}
        if self.inexact.numel():
            weight = self.load()
            rounded, _ = mxfp4_to_nvfp4(weight, top_exponent=self.top_exponent)
            target.write(f"{self.module}.weight", rounded.codes)
            target.write(f"{self.module}.weight_scale", rounded.scales)
            written = _read_nvfp4(target, self.module)
            differing = recode.differing_blocks(weight, written)
            unexpected = differing[~torch.isin(differing, self.inexact)]
            record["method"] = "recoded, some blocks rounded"
            record["listed_blocks"] = listed(self.inexact, self.shape)
            record.update(measure(mxfp4.dequantize(weight), nvfp4.dequantize(written)))
        else:
            scales = self.load_scales()
            target.write(f"{self.module}.weight_scale", recode.nvfp4_scales(scales, self.top_exponent))
            same_codes = target.copy_checked(f"{self.module}.weight", self.codes)
            unexpected = recode.unequal_scales(
                scales,
                target.read(f"{self.module}.weight_scale"),
                target.read(f"{self.module}.weight_scale_2"),
            )
            if not same_codes or unexpected.numel() or self.by_values:
                unexpected = _compare(self.load(), _read_nvfp4(target, self.module), by_values=self.by_values)
            record["method"] = "recoded"
        _require_proof(self.module, unexpected, self.shape)
        return [record]


@dataclasses.dataclass(frozen=True)
class Nvfp4ToMxfp4:
    """Recode NVFP4 to MXFP4, codes copied; the plan has checked that it is exact.

    Attributes:
        module: weight, without ".weight".
        group: what the report counts it under.
        shape: logical [N, K].
        source_bytes: bytes it reads.
        load: reads the weight.
        by_values: prove by comparing every value.
    """

    module: str
    group: str
    shape: tuple[int, int]
    source_bytes: int
    load: Callable[[], NvFp4Tensor]
    by_values: bool = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes, as DeepSeek labels them."""
        num_rows, num_columns = self.shape
        return (
            Output(f"{self.module}.weight", "I8", (num_rows, num_columns // 2)),
            Output(f"{self.module}.scale", "F8_E8M0", (num_rows, num_columns // mxfp4.BLOCK)),
        )

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs."""
        return 24 * self.shape[0] * self.shape[1]

    def run(self, target: Target) -> list[Record]:
        """Recode and prove."""
        weight = self.load()
        converted = to_mxfp4(weight)
        assert converted is not None, self.module
        target.write(f"{self.module}.weight", converted.codes.view(torch.int8))
        target.write(f"{self.module}.scale", converted.scales)
        written = MxFp4Tensor(
            target.read(f"{self.module}.weight").view(torch.uint8), target.read(f"{self.module}.scale")
        )
        _require_proof(self.module, _compare(written, weight, by_values=self.by_values), self.shape)
        blocks = self.shape[0] * self.shape[1] // recode.BLOCK
        record = _record(self, "nvfp4", "mxfp4", self.source_bytes)
        return [{**record, "method": "recoded", "blocks": blocks, "inexact_blocks": 0}]


@dataclasses.dataclass(frozen=True)
class Fp4ToFp8:
    """Convert MXFP4 or NVFP4 to FP8 blocks; the plan has checked that it is exact.

    Attributes:
        module: weight, without ".weight".
        group: what the report counts it under.
        shape: logical [N, K].
        source_bytes: bytes it reads.
        load: reads the weight.
    """

    module: str
    group: str
    shape: tuple[int, int]
    source_bytes: int
    load: Callable[[], NvFp4Tensor | MxFp4Tensor]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes."""
        num_rows, num_columns = self.shape
        blocks = (-(-num_rows // fp8.BLOCK), -(-num_columns // fp8.BLOCK))
        return (
            Output(f"{self.module}.weight", "F8_E4M3", self.shape),
            Output(f"{self.module}.scale", "F8_E8M0", blocks),
        )

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs."""
        return 5 * self.shape[0] * self.shape[1] + (64 << 20)

    def run(self, target: Target) -> list[Record]:
        """Convert and prove."""
        weight = self.load()
        found = "nvfp4" if isinstance(weight, NvFp4Tensor) else "mxfp4"
        converted, inexact = to_fp8(weight)
        _require_proof(self.module, inexact, self.shape)
        target.write(f"{self.module}.weight", converted.codes)
        target.write(f"{self.module}.scale", converted.scales)
        written = Fp8BlockTensor(target.read(f"{self.module}.weight"), target.read(f"{self.module}.scale"))
        _require_proof(self.module, _differing_fp8(weight, written), self.shape)
        blocks = self.shape[0] * self.shape[1] // recode.BLOCK
        record = _record(self, found, "fp8", self.source_bytes)
        return [{**record, "method": "recoded", "blocks": blocks, "inexact_blocks": 0}]


@dataclasses.dataclass(frozen=True)
class RoundToNvfp4:
    """Round weights to NVFP4; those of one call share a tensor scale.

    Attributes:
        modules: weights to write, without ".weight".
        partners: weights that share the tensor scale and are written by another step.
        group: what the report counts them under.
        shape: logical [N, K] of each.
        found: format they are stored in.
        bytes_each: stored bytes of each weight to write.
        load: reads the values of a weight, exact.
        search: how block scales are chosen.
        input_scale: for engines with static activation scales.
    """

    modules: tuple[str, ...]
    partners: tuple[str, ...]
    group: str
    shape: tuple[int, int]
    found: str
    bytes_each: tuple[int, ...]
    load: Callable[[str], torch.Tensor]
    search: ScaleSearch
    input_scale: float

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes."""
        return tuple(one for name in self.modules for one in nvfp4_outputs(name, self.shape, has_input_scale=True))

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights it writes."""
        return sum(self.bytes_each)

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs: values in fp32, two candidates, and dequantized rows."""
        return 6 * self.shape[0] * self.shape[1] * (len(self.modules) + len(self.partners)) + (64 << 20)

    def run(self, target: Target) -> list[Record]:
        """Round, write, read back and measure."""
        # Sorted, so that the sum of errors that chooses the tensor scale does not depend on how files divide the pair.
        values = {name: self.load(name) for name in sorted((*self.modules, *self.partners))}
        rounded = dict(zip(values, quantize_weights(list(values.values()), self.search), strict=True))
        records = []
        for name, size in zip(self.modules, self.bytes_each, strict=True):
            target.write(f"{name}.weight", rounded[name].codes)
            target.write(f"{name}.weight_scale", rounded[name].scales)
            target.write(f"{name}.weight_scale_2", rounded[name].tensor_scale)
            target.write(f"{name}.input_scale", torch.tensor(self.input_scale, dtype=torch.float32))
            written = _read_nvfp4(target, name)
            records.append(
                {
                    "name": name,
                    "group": self.group,
                    "from": self.found,
                    "to": "nvfp4",
                    "shape": list(self.shape),
                    "bytes_before": size,
                    "bytes_after": sum(one.num_bytes for one in nvfp4_outputs(name, self.shape, has_input_scale=True)),
                    "method": f"rounded, {self.search.value}",
                    **measure(values[name], written),
                }
            )
        return records


def to_mxfp4(weight: NvFp4Tensor) -> MxFp4Tensor | None:
    """Return an NVFP4 weight as MXFP4 with the same values, or None where a block has no equal."""
    scales = recode.mxfp4_scales_of(weight.scales, weight.tensor_scale, weight.shape[1])
    if scales is not None:
        return MxFp4Tensor(weight.codes, scales)
    converted, exact = mxfp4.nvfp4_to_mxfp4(weight)
    return converted if bool(exact.all()) else None


def to_fp8(weight: NvFp4Tensor | MxFp4Tensor) -> tuple[Fp8BlockTensor, torch.Tensor]:
    """Return an FP4 weight in FP8 blocks, and the numbers of the blocks of 32 whose values it cannot hold."""
    num_rows, num_columns = weight.shape
    codes = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn)
    scales = torch.empty((-(-num_rows // _ROWS), -(-num_columns // fp8.BLOCK)), dtype=torch.float8_e8m0fnu)
    for start in range(0, num_rows, _ROWS):
        block = fp8.quantize_blocks(values_of(weight, slice(start, start + _ROWS)))
        codes[start : start + _ROWS] = block.codes
        scales[start // _ROWS] = block.scales[0]
    converted = Fp8BlockTensor(codes, scales)
    return converted, _differing_fp8(weight, converted)


def values_of(weight: NvFp4Tensor | MxFp4Tensor, rows: slice) -> torch.Tensor:
    """Return the fp32 values of some rows."""
    if isinstance(weight, NvFp4Tensor):
        return nvfp4.dequantize(NvFp4Tensor(weight.codes[rows], weight.scales[rows], weight.tensor_scale))
    return mxfp4.dequantize(MxFp4Tensor(weight.codes[rows], weight.scales[rows]))


def listed(numbers: torch.Tensor, shape: tuple[int, int]) -> list[list[int]]:
    """Return blocks as [row, block in the row], the first 10,000."""
    per_row = shape[1] // recode.BLOCK
    return [[number // per_row, number % per_row] for number in numbers[:MAX_LISTED_BLOCKS].tolist()]


def _record(step: Any, found: str, made: str, source_bytes: int) -> Record:
    return {
        "name": step.module,
        "group": step.group,
        "from": found,
        "to": made,
        "shape": list(step.shape),
        "bytes_before": source_bytes,
        "bytes_after": sum(output.num_bytes for output in step.outputs),
    }


def _read_nvfp4(target: Target, module: str) -> NvFp4Tensor:
    return NvFp4Tensor(
        target.read(f"{module}.weight"), target.read(f"{module}.weight_scale"), target.read(f"{module}.weight_scale_2")
    )


def _compare(mx: MxFp4Tensor, nv: NvFp4Tensor, *, by_values: bool) -> torch.Tensor:
    """Return the numbers of the blocks of 32 that differ."""
    if not by_values:
        return recode.differing_blocks(mx, nv)
    found = []
    rows = max(1, _VALUES // mx.shape[1])
    for start in range(0, mx.shape[0], rows):
        part = slice(start, start + rows)
        left, right = values_of(mx, part), values_of(nv, part)
        unequal = (left.view(torch.int32) != right.view(torch.int32)).view(-1, recode.BLOCK).any(-1)
        found.append(unequal.nonzero().flatten() + start * mx.shape[1] // recode.BLOCK)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _differing_fp8(weight: NvFp4Tensor | MxFp4Tensor, converted: Fp8BlockTensor) -> torch.Tensor:
    """Return the numbers of the blocks of 32 whose values differ."""
    found = []
    num_rows, num_columns = weight.shape
    for start in range(0, num_rows, _ROWS):
        part = slice(start, start + _ROWS)
        tile = slice(start // _ROWS, start // _ROWS + 1)
        theirs = fp8.dequantize(Fp8BlockTensor(converted.codes[part], converted.scales[tile]))
        unequal = values_of(weight, part).view(torch.int32) != theirs.view(torch.int32)
        found.append(unequal.view(-1, recode.BLOCK).any(-1).nonzero().flatten() + start * num_columns // recode.BLOCK)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _require_proof(module: str, differing: torch.Tensor, shape: tuple[int, int]) -> None:
    """Refuse to go on when what was written is not what was read."""
    if differing.numel():
        raise CheckpointError(
            f"convert: {module}: {differing.numel()} blocks of 32 differ from the source after they were written, "
            f"first [row, block] {listed(differing[:1], shape)[0]}. The source changed while it was read, or memory or "
            "disk is faulty: check them, and run again."
        )
