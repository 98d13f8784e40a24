# SPDX-License-Identifier: Apache-2.0
"""megamoe convert for DeepSeek-V4: which weight becomes what, and the config.json that says so.

    official -> NVFP4    routed experts by exact recoding (w1 and w3 of an expert share a tensor scale), the rest as it
                         is: NVIDIA's layout. With attention="nvfp4" also attention projections, the indexer's wq_b and
                         the shared experts; with draft="convert" the draft's too: the layout of the bundled model.
    NVFP4 -> MXFP4, FP8  where every value stays the same; refused by name where one would not.

Nothing is written before everything has been checked: names, dtypes and shapes from headers, and from the scales (one
byte in seventeen) whether recoding is exact. What is not exact is refused with all its tensors named, or rounded if
experts="requantize" allows it. Tensors keep their files; a weight is written into the file that held its codes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megamoe.checkpoint import convert as files
from megamoe.checkpoint import report
from megamoe.checkpoint.byte_range import ByteRange, as_tensor, read_range
from megamoe.checkpoint.convert import Output, Plan, Result, Shard, Step
from megamoe.checkpoint.headers import INDEX_NAME
from megamoe.checkpoint.manifest import Record, other_weights, source_files
from megamoe.checkpoint.problem import CheckpointError, Problem
from megamoe.checkpoint.reader import DTYPES, CheckpointReader
from megamoe.checkpoint.steps import (
    Carry,
    Fp4ToFp8,
    Mxfp4ToNvfp4,
    Nvfp4ToMxfp4,
    Rewrite,
    RoundToNvfp4,
    listed,
    nvfp4_outputs,
    to_fp8,
    to_mxfp4,
)
from megamoe.checkpoint.stopped import MANIFEST_NAME
from megamoe.checkpoint.writer import encode_json
from megamoe.formats import fp8, nvfp4, recode
from megamoe.formats.e8m0 import e8m0_from_bytes
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.scale_search import ScaleSearch
from megamoe.models.deepseek_v4.examine import examine
from megamoe.models.deepseek_v4.inventory import COMPANIONS
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.names import native_name
from megamoe.models.deepseek_v4.rules import Finding, refusal
from megamoe.models.deepseek_v4.rules import group as grouped
from megamoe.models.deepseek_v4.stored import StoredTensors
from megamoe.models.deepseek_v4.weights import check_copies

UNCALIBRATED_INPUT_SCALE = 0.125
"""input_scale without a calibration, a power of two: block scales of inputs stay normal E4M3 numbers for block maxima
of 0.012 to 336; swiglu_limit keeps the inputs of w2 below 250. Engines with scales per token do not read it."""

CHOICES: dict[str, tuple[str, ...]] = {
    "to": ("nvfp4", "mxfp4", "fp8"),
    "experts": ("lossless", "requantize"),
    "attention": ("keep", "nvfp4", "fp8"),
    "draft": ("keep", "convert"),
    "proof": ("codes", "values"),
}

_REPORTS = ("report.json", "report.html")
_MADE_FILES = {"config.json", "hf_quant_config.json", INDEX_NAME, MANIFEST_NAME, *_REPORTS}
_FEW_BLOCKS = 256  # codes of more blocks than that are read in one piece
_MANY_LINES = 5
_MENDED = ("config-format", "quant-config-disagrees")  # rules that a conversion mends even where no weight changes

_FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
_NVFP4_KEYS = (
    "moe_quant_algo quant_algo kv_cache_quant_algo group_size producer quantized_layers ignore config_groups".split()
)


@dataclasses.dataclass(frozen=True)
class SearchChoice:
    """How block scales are chosen, for every kind of weight.

    Attributes:
        experts: routed experts.
        shared: shared experts.
        attention: all other linears.
    """

    experts: ScaleSearch = ScaleSearch.MSE
    shared: ScaleSearch = ScaleSearch.MSE
    attention: ScaleSearch = ScaleSearch.MSE

    @classmethod
    def parse(cls, text: str) -> SearchChoice:
        """Read "max" (for all), or "max,shared=mse" (for all but the shared experts).

        Raises:
            ValueError: it is not of this form.
        """
        names = [search.value for search in ScaleSearch]
        first, *others = text.split(",")
        chosen = dict.fromkeys(("experts", "shared", "attention"), first)
        for one in others:
            kind, _, search = one.partition("=")
            if kind not in chosen:
                first = ""
            chosen[kind] = search
        if first not in names or not set(chosen.values()) <= set(names):
            raise ValueError(
                f"convert: --scale-search must be one of {', '.join(names)}, and after a comma perhaps experts=, "
                f"shared= or attention= one of them; got {text!r}."
            )
        return cls(**{kind: ScaleSearch(search) for kind, search in chosen.items()})

    def __str__(self) -> str:
        """Return what `parse` reads."""
        kinds = {"experts": self.experts, "shared": self.shared, "attention": self.attention}
        first = self.attention
        rest = [f",{kind}={search.value}" for kind, search in kinds.items() if search is not first]
        return first.value + "".join(rest)

    def of(self, module: str) -> ScaleSearch:
        """Return the search for a weight."""
        if ".shared_experts." in module:
            return self.shared
        return self.experts if ".experts." in module else self.attention


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What to make of a checkpoint.

    Attributes:
        to: format of the routed experts, "nvfp4", "mxfp4" or "fp8".
        experts: "lossless" refuses what is not exact; "requantize" rounds it (to NVFP4 only).
        attention: what becomes of all other linears: "keep", "nvfp4" (rounded), or "fp8" (where exact).
        draft: "keep", or "convert" the linears of a draft like those of the backbone.
        scale_search: how block scales are chosen where values are rounded; a ScaleSearch stands for all kinds.
        calibration: largest magnitude of each weight's input, by weight; None writes UNCALIBRATED_INPUT_SCALE.
        proof: "codes" compares codes and scales, "values" every dequantized value as well.
        accept: rules that the source may break; what was accepted is written into the manifest.
        producer: name and version for the metadata.
    """

    to: str = "nvfp4"
    experts: str = "lossless"
    attention: str = "keep"
    draft: str = "keep"
    scale_search: SearchChoice | ScaleSearch = ScaleSearch.MSE
    calibration: Mapping[str, float] | None = None
    proof: str = "codes"
    accept: tuple[str, ...] = ()
    producer: tuple[str, str] = ("megamoe", "0")

    def __post_init__(self) -> None:
        """Refuse unknown choices and what contradicts itself."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"convert: {name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.to != "nvfp4" and self.experts == "requantize":
            raise ValueError(
                f"convert: --experts requantize rounds to NVFP4 only; got --to {self.to}. The way back is exact or "
                "refused."
            )

    @property
    def searches(self) -> SearchChoice:
        """The search for every kind."""
        chosen = self.scale_search
        return SearchChoice(chosen, chosen, chosen) if isinstance(chosen, ScaleSearch) else chosen

    def as_json(self) -> dict[str, Any]:
        """Return everything that decides what is written."""
        return {
            "to": self.to,
            "experts": self.experts,
            "attention": self.attention,
            "draft": self.draft,
            "scale_search": str(self.searches),
            "calibration": None if self.calibration is None else dict(sorted(self.calibration.items())),
            "proof": self.proof,
            "accept": list(self.accept),
            "producer": list(self.producer),
        }


@dataclasses.dataclass(frozen=True)
class Planned:
    """A conversion that has been checked.

    Attributes:
        plan: what to write.
        source_bytes: bytes of the source's tensors.
        inexact: weight -> blocks [row, block of 32] that have no equal and will be rounded, and how many in all.
        formats: weight -> format after the conversion.
        carried_bytes: bytes of tensors that are written as they are.
        left_out: files of the source that hold weights in another format.
        warnings: rules of the source that are broken and stop nothing.
    """

    plan: Plan
    source_bytes: int
    inexact: Mapping[str, tuple[int, list[list[int]]]]
    formats: Mapping[str, Format]
    carried_bytes: int
    left_out: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()


class RangeTensors(StoredTensors):
    """Stored tensors read into memory: nothing is mapped, and only the part that is asked for is read."""

    def __init__(self, reader: CheckpointReader, num_experts: int, natives: Mapping[str, str] | None = None) -> None:
        """As StoredTensors."""
        super().__init__(reader, num_experts, natives)
        self._paths: dict[str, pathlib.Path] = {}

    def byte_range(self, name: str) -> ByteRange:
        """Return where the bytes of a native tensor are; those of one expert in a fused tensor lie together."""
        source = self.source(name)
        info = self.infos[source.name]
        start = self.reader.headers.data_starts[info.shard] + info.begin
        size = info.num_bytes
        if source.expert is not None:
            size //= self.num_experts * source.num_parts
            start += (source.expert * source.num_parts + source.part) * size
        if info.shard not in self._paths:
            self._paths[info.shard] = self.reader.directory / info.shard
        return ByteRange(self._paths[info.shard], start, size)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a native tensor."""
        source = self.source(name)
        shape = self.infos[source.name].shape
        return shape if source.expert is None else (shape[1] // source.num_parts, *shape[2:])

    def read(self, name: str) -> torch.Tensor:
        """Return a native tensor in memory of its own."""
        return as_tensor(read_range(self.byte_range(name)), DTYPES[self.dtype(name)], self.shape(name))


def convert(
    source: pathlib.Path,
    destination: pathlib.Path,
    options: ConvertOptions,
    *,
    jobs: int = 1,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> tuple[Planned, Result]:
    """Convert a checkpoint; give the same arguments again to finish a conversion that was stopped.

    Args:
        source: checkpoint directory in any layout that is read.
        destination: new or empty folder outside it, or one where the same conversion was stopped.
        options: what to make of it.
        jobs: threads; changes no byte of the result.
        progress: makes a progress display (called with bytes done and in all) for each part of the work.

    Raises:
        CheckpointError: the source is damaged or cannot be converted as asked, naming every tensor; or the destination
            cannot be written, see `megamoe.checkpoint.convert.run`.
        ValueError: the calibration does not fit.
    """
    show = progress or (lambda label: lambda done, total: None)
    planned = plan(source, options, jobs=jobs, progress=show("check"))

    def finish(records: tuple[Record, ...]) -> dict[str, bytes]:
        content = report.make(
            records,
            options={key: value for key, value in options.as_json().items() if key not in ("producer", "calibration")},
            producer=options.producer,
            source=source.name,
            source_bytes=planned.source_bytes,
            made_bytes=planned.plan.num_bytes,
            carried_bytes=planned.carried_bytes,
            input_scales="uncalibrated" if options.calibration is None else "calibrated",
        )
        return {"report.json": report.encode_report(content), "report.html": report.render_html(content).encode()}

    result = files.run(planned.plan, destination, finish=finish, jobs=jobs, progress=show("convert"))
    return planned, result


def plan(
    source: pathlib.Path,
    options: ConvertOptions,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Planned:
    """Check a checkpoint and lay out what to write, without writing.

    Args:
        source: checkpoint directory.
        options: what to make of it.
        jobs: threads that read scales.
        progress: called with (bytes done, bytes in all) of the scales to read.

    Raises:
        CheckpointError: as `convert`.
        ValueError: the calibration does not fit.
    """
    examined = examine(source)
    warnings = examined.refuse(options.accept)
    claims = examined.claims
    assert claims is not None
    with CheckpointReader(source, examined.headers) as reader:
        stored = RangeTensors(reader, examined.usable_config.n_routed_experts, examined.natives)
        check_copies(stored, claims.copies)
        if stored.problems:
            raise refusal(f"checkpoint {source}", stored.problems)
        mends = any(finding.rule in _MENDED for finding in warnings)
        planner = _Planner(stored, claims.formats, source, options, mends_declarations=mends)
        return dataclasses.replace(
            planner.make(jobs, progress or (lambda done, total: None)), warnings=(*warnings, *examined.told)
        )


class _Planner:
    def __init__(
        self,
        stored: RangeTensors,
        formats: Mapping[str, Format],
        source: pathlib.Path,
        options: ConvertOptions,
        *,
        mends_declarations: bool,
    ) -> None:
        self.mends_declarations = mends_declarations
        self.stored = stored
        self.formats = formats
        self.source = source
        self.options = options
        self.problems: list[str] = []
        self.inexact: dict[str, tuple[int, list[list[int]]]] = {}
        self.carried_bytes = 0
        self.after: dict[str, Format] = dict(formats)

    def make(self, jobs: int, progress: Callable[[int, int], None]) -> Planned:
        self.calibration = native_calibration(self.options.calibration)
        goals = {module: self.goal(module) for module in self.formats}
        changed = {module: goal for module, goal in goals.items() if goal not in (None, self.formats[module])}
        self.after.update({module: goal for module, goal in changed.items() if goal is not None})
        self.input_scales = self.make_input_scales([m for m, goal in changed.items() if goal is Format.NVFP4])
        self.check_pairs(changed)
        self.stop_if_refused()
        self.refuse_nothing(goals, changed)
        groups = [group for group in sharing_groups(changed) if self.formats[group[0]] in (Format.MXFP4, Format.NVFP4)]
        total = sum(self.scale_bytes(module) for group in groups for module in group)
        done = 0
        scans: dict[str, recode.ScaleScan] = {}
        with concurrent.futures.ThreadPoolExecutor(jobs, "check") as pool:
            for group, scan in zip(
                groups, pool.map(lambda group: self.check_exact(group, changed), groups), strict=True
            ):
                done += sum(self.scale_bytes(module) for module in group)
                progress(done, total)
                if isinstance(scan, recode.ScaleScan):
                    scans.update(dict.fromkeys(group, scan))
                    self.take_scan(group, scan)
                else:
                    self.problems += scan
        self.stop_if_refused()
        return self.lay_out(changed, scans)

    def stop_if_refused(self) -> None:
        if self.problems:
            raise CheckpointError.listing(f"convert {self.source}", self.problems)

    def refuse_nothing(self, goals: Mapping[str, Format | None], changed: Mapping[str, Format | None]) -> None:
        """Refuse a conversion that would be a copy: no weight, no name and no declaration changes."""
        if (
            changed
            or self.mends_declarations
            or any(self.stored.source(name).name != name for name in self.stored.names)
        ):
            return
        if not all(self.is_spelled_ours(module) for module in self.formats):
            return
        wanted = collections.Counter(goal for goal in goals.values() if goal is not None)
        said = ", ".join(f"all {count:,} are {goal.value.upper()}" for goal, count in wanted.items())
        raise CheckpointError(
            f"convert {self.source}: nothing to convert: {said} already, and everything else is kept. Choose another "
            "--to, --attention or --draft, or copy the folder."
        )

    # What becomes of a weight

    def goal(self, module: str) -> Format | None:
        """Return the format a weight shall have, None to leave it alone."""
        if module.startswith("mtp.") and self.options.draft == "keep":
            return None
        is_expert = ".experts." in module
        wanted = self.options.to if is_expert else self.options.attention
        if wanted == "keep":
            return None
        goal, found = Format(wanted), self.formats[module]
        label = self.stored.label(self.stored.codes_name(module))
        if goal is found:
            return goal
        is_fp4 = found in (Format.MXFP4, Format.NVFP4)
        if goal is Format.NVFP4 and not is_fp4 and is_expert and self.options.experts == "lossless":
            self.problems.append(
                f"{label}: {found.value} cannot become NVFP4 without rounding. Allow it with --experts requantize."
            )
        if goal is not Format.NVFP4 and not is_fp4:
            option = f"--to {goal.value}" if is_expert else f"--attention {goal.value}"
            self.problems.append(
                f"{label}: {found.value} cannot become {goal.value} without rounding, and {option} does not round. "
                "Convert from the checkpoint it was made from."
            )
        return goal

    def check_pairs(self, changed: Mapping[str, Format | None]) -> None:
        """Refuse gate and up of one expert that could not share a tensor scale."""
        for group in sharing_groups(changed):
            partner = _partner(group[0])
            if partner is None or changed[group[0]] is not Format.NVFP4:
                continue
            kinds = [self.formats[module] for module in (group[0], partner)]
            if (kinds[0] is Format.MXFP4) != (kinds[1] is Format.MXFP4) or Format.NVFP4 in kinds:
                self.problems.append(
                    f"{group[0]} is {kinds[0].value} and {partner} is {kinds[1].value}: gate and up cannot be given "
                    "one tensor scale. Convert a checkpoint that stores both alike."
                )

    def check_exact(self, group: list[str], changed: Mapping[str, Format | None]) -> recode.ScaleScan | list[str]:
        """Find out from scales whether weights can be recoded; return the scan or what is wrong."""
        goal = changed[group[0]]
        try:
            if goal is Format.NVFP4:
                return recode.scan_scales(
                    [self.mxfp4_scales(module) for module in group], [self.codes_reader(module) for module in group]
                )
            return [line for module in group for line in self.check_back(module, goal)]
        except ValueError as error:
            return [f"{', '.join(group)}: {error}"]

    def take_scan(self, group: list[str], scan: recode.ScaleScan) -> None:
        for module, numbers in zip(group, scan.inexact, strict=True):
            if not numbers.numel():
                continue
            shape = self.logical_shape(module)
            self.inexact[module] = numbers.numel(), listed(numbers, shape)
            if ".experts." in module and self.options.experts == "lossless":
                few = ", ".join(str(block) for block in listed(numbers[:_MANY_LINES], shape))
                self.problems.append(
                    f"{module}: {numbers.numel()} of {shape[0] * shape[1] // recode.BLOCK} blocks have no equal in "
                    f"NVFP4: their scales lie more than 2^17 under the largest, 2^{scan.top_exponent} ([row, block] "
                    f"{few}{', …' if numbers.numel() > _MANY_LINES else ''}). Round them with --experts requantize."
                )

    def check_back(self, module: str, goal: Format | None) -> list[str]:
        """Say why an FP4 weight has no equal in MXFP4 or FP8, if it has none."""
        label = self.stored.label(self.stored.codes_name(module))
        if goal is Format.FP8 and self.formats[module] is Format.MXFP4:
            if recode.fits_fp8_blocks(self.mxfp4_scales(module)):
                return []
        else:
            scales = recode.mxfp4_scales_of(
                self.stored.read(f"{module}.weight_scale"), self.tensor_scale(module), self.logical_shape(module)[1]
            )
            if scales is not None and (goal is Format.MXFP4 or recode.fits_fp8_blocks(scales)):
                return []
        weight = self.stored.mxfp4(module) if self.formats[module] is Format.MXFP4 else self.stored.nvfp4(module)
        if goal is Format.MXFP4:
            assert isinstance(weight, nvfp4.NvFp4Tensor)
            return [] if to_mxfp4(weight) is not None else [f"{label}: {_NOT_POWERS} Keep it as NVFP4."]
        _, inexact = to_fp8(weight)
        if not inexact.numel():
            return []
        return [
            f"{label}: {inexact.numel()} of {weight.shape[0] * weight.shape[1] // recode.BLOCK} blocks have no equal "
            f"in FP8 blocks, first [row, block] {listed(inexact[:1], self.logical_shape(module))[0]}. Keep it as it is."
        ]

    # Reading

    def logical_shape(self, module: str) -> tuple[int, int]:
        """Return [N, K] of a weight."""
        num_rows, width = self.stored.shape(self.stored.codes_name(module))
        return num_rows, width * 2 if self.formats[module] in (Format.MXFP4, Format.NVFP4) else width

    def scale_bytes(self, module: str) -> int:
        return self.stored.byte_range(self.stored.scales_name(module, self.formats[module])).num_bytes

    def mxfp4_scales(self, module: str) -> torch.Tensor:
        scales = self.stored.read(self.stored.scales_name(module, Format.MXFP4))
        return e8m0_from_bytes(scales) if scales.dtype == torch.uint8 else scales

    def tensor_scale(self, module: str) -> torch.Tensor:
        if f"{module}.weight_scale_2" in self.stored:
            return self.stored.read(f"{module}.weight_scale_2").reshape(())
        return self.stored.read(f"{module}.weight_global_scale").reshape(()).reciprocal()

    def codes_reader(self, module: str) -> recode.CodesOf:
        where = self.stored.byte_range(self.stored.codes_name(module))
        size = recode.CODE_BYTES

        def read(numbers: torch.Tensor) -> torch.Tensor:
            if numbers.numel() > _FEW_BLOCKS:
                return as_tensor(read_range(where), torch.uint8, (where.num_bytes // size, size))[numbers]
            parts = [
                read_range(ByteRange(where.path, where.offset + number * size, size)) for number in numbers.tolist()
            ]
            return as_tensor(bytearray(b"".join(parts)), torch.uint8, (len(parts), size))

        return read

    def stored_bytes(self, module: str) -> int:
        """Return the bytes of everything that belongs to a weight."""
        return sum(self.stored.byte_range(name).num_bytes for name in self.parts(module))

    def parts(self, module: str) -> list[str]:
        return [name for leaf in COMPANIONS if (name := f"{module}.{leaf}") in self.stored]

    def values(self, module: str) -> torch.Tensor:
        """Return the exact values of a weight that is not FP4."""
        if self.formats[module] is not Format.FP8:
            return self.stored.read(f"{module}.weight")
        weight = self.stored.fp8(module)
        values = torch.empty(weight.shape)
        for tile in range(weight.scales.shape[0]):  # in tiles, because dequantizing takes several times its result
            rows = slice(tile * fp8.BLOCK, (tile + 1) * fp8.BLOCK)
            values[rows] = fp8.dequantize(Fp8BlockTensor(weight.codes[rows], weight.scales[tile : tile + 1]))
        return values

    # The plan

    def lay_out(self, changed: Mapping[str, Format | None], scans: Mapping[str, recode.ScaleScan]) -> Planned:
        steps: dict[str, list[tuple[int, Step]]] = {}

        def place(module_or_name: str, step: Step) -> None:
            where = self.stored.byte_range(module_or_name)
            steps.setdefault(where.path.name, []).append((where.offset, step))

        for name in self.loose_names():
            self.carried_bytes += self.stored.byte_range(name).num_bytes
            place(name, self.carry(name, name, self.stored.dtype(name)))
        for module in self.formats:
            if module not in changed:
                codes = self.stored.codes_name(module)
                for step in self.keep(module):
                    self.carried_bytes += sum(output.num_bytes for output in step.outputs)
                    place(codes, step)
        for group in sharing_groups(changed):
            goal = changed[group[0]]
            if goal is Format.NVFP4 and self.formats[group[0]] is not Format.MXFP4:
                for members in self.by_file(group):
                    place(self.stored.codes_name(members[0]), self.rounding(members, group))
                continue
            for module in group:
                place(
                    self.stored.codes_name(module), self.recoding(module, goal, scans.get(module), module == group[0])
                )
        shards = tuple(
            Shard(name, tuple(step for _, step in sorted(parts, key=lambda part: (part[0], part[1].outputs[0].name))))
            for name, parts in sorted(steps.items())
        )
        self.refuse_repeated_names(shards)
        plan = Plan(
            source=self.source,
            shards=shards,
            metadata={"format": "pt"},
            files=self.other_files(),
            options=self.options.as_json(),
        )
        left_out = tuple(other_weights(self.source))
        return Planned(plan, self.stored.reader.num_bytes, self.inexact, self.after, self.carried_bytes, left_out)

    def refuse_repeated_names(self, shards: tuple[Shard, ...]) -> None:
        names = [output.name for shard in shards for output in shard.outputs]
        assert len(names) == len(set(names)), "two steps make one tensor"

    def loose_names(self) -> Iterator[str]:
        """Yield the tensors that belong to no weight: norms, embeddings, drafts that are not converted."""
        owned = {name for module in self.formats for name in self.parts(module)}
        yield from (name for name in self.stored.names if name not in owned)

    def carry(self, name: str, made: str, dtype: str) -> Carry:
        return Carry(Output(made, dtype, self.stored.shape(name)), self.stored.byte_range(name))

    def is_spelled_ours(self, module: str) -> bool:
        """Say whether a weight is spelled as DeepSeek and NVIDIA spell it."""
        found = self.formats[module]
        return self.stored.codes_name(module) == f"{module}.weight" and (
            found in (Format.PLAIN, Format.NVFP4) or self.stored.scales_name(module, found) == f"{module}.scale"
        )

    def keep(self, module: str) -> list[Step]:
        """Return steps that write a weight as it is, in DeepSeek's and NVIDIA's spelling."""
        found = self.formats[module]
        codes = self.stored.codes_name(module)
        if self.is_spelled_ours(module):
            return [self.carry(name, name, self.stored.dtype(name)) for name in self.parts(module)]
        scales = self.stored.scales_name(module, found)
        if found is Format.MXFP4:
            return [self.carry(codes, f"{module}.weight", "U8"), self.carry(scales, f"{module}.scale", "F8_E8M0")]
        shape = self.logical_shape(module)
        size = self.stored_bytes(module)
        if found is Format.FP8:
            outputs: tuple[Output, ...] = (Output(f"{module}.scale", "F32", self.stored.shape(scales)),)
            rewrite = Rewrite(outputs, size, lambda: {f"{module}.scale": self.stored.fp8(module).scales.float()})
            return [self.carry(codes, f"{module}.weight", "F8_E4M3"), rewrite]
        has_input_scale = f"{module}.input_global_scale" in self.stored or f"{module}.input_scale" in self.stored

        def load() -> dict[str, torch.Tensor]:
            weight = self.stored.nvfp4(module)
            tensors = {"weight": weight.codes, "weight_scale": weight.scales, "weight_scale_2": weight.tensor_scale}
            input_scale = self.stored.input_scale(module)
            if input_scale is not None:
                tensors["input_scale"] = torch.tensor(input_scale, dtype=torch.float32)
            return {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}

        return [Rewrite(nvfp4_outputs(module, shape, has_input_scale=has_input_scale), size, load)]

    def by_file(self, group: list[str]) -> list[list[str]]:
        """Divide weights by the file that holds their codes."""
        divided: dict[str, list[str]] = {}
        for module in group:
            where = self.stored.byte_range(self.stored.codes_name(module))
            divided.setdefault(where.path.name, []).append(module)
        return list(divided.values())

    def rounding(self, members: list[str], group: list[str]) -> RoundToNvfp4:
        return RoundToNvfp4(
            modules=tuple(members),
            partners=tuple(module for module in group if module not in members),
            group=group_of(members[0]),
            shape=self.logical_shape(members[0]),
            found=self.formats[members[0]].value,
            bytes_each=tuple(self.stored_bytes(module) for module in members),
            load=self.values,
            search=self.options.searches.of(members[0]),
            input_scale=self.input_scales[members[0]],
        )

    def recoding(self, module: str, goal: Format | None, scan: recode.ScaleScan | None, is_first: bool) -> Step:
        shape, group = self.logical_shape(module), group_of(module)
        by_values = self.options.proof == "values"
        size = self.stored_bytes(module)
        if goal is Format.NVFP4:
            assert scan is not None
            inexact = self.inexact_numbers(module, scan)
            return Mxfp4ToNvfp4(
                module=module,
                group=group,
                shape=shape,
                codes=self.stored.byte_range(self.stored.codes_name(module)),
                load=lambda: self.stored.mxfp4(module),
                load_scales=lambda: self.mxfp4_scales(module),
                top_exponent=scan.top_exponent,
                inexact=inexact,
                spans=scan.spans if is_first else None,
                input_scale=self.input_scales[module],
                by_values=by_values,
            )
        if goal is Format.MXFP4:
            return Nvfp4ToMxfp4(module, group, shape, size, lambda: self.stored.nvfp4(module), by_values)
        is_mxfp4 = self.formats[module] is Format.MXFP4
        load = (lambda: self.stored.mxfp4(module)) if is_mxfp4 else (lambda: self.stored.nvfp4(module))
        return Fp4ToFp8(module, group, shape, size, load)

    def inexact_numbers(self, module: str, scan: recode.ScaleScan) -> torch.Tensor:
        """Return a weight's part of a scan that it may share with its partner."""
        is_second = _partner(module) is not None and module.endswith(".w3") and len(scan.inexact) == 2
        return scan.inexact[1 if is_second else 0]

    # Metadata

    def make_input_scales(self, modules: list[str]) -> dict[str, float]:
        """Return the input scale of every weight that becomes NVFP4."""
        if self.calibration is None:
            return dict.fromkeys(modules, UNCALIBRATED_INPUT_SCALE)
        amax = input_amax(modules, self.calibration, set(self.formats))
        return {module: value / nvfp4.TENSOR_SCALE_DIVISOR for module, value in amax.items()}

    def other_files(self) -> dict[str, bytes | pathlib.Path]:
        """Return config.json, hf_quant_config.json and everything else that is carried over."""
        found: dict[str, bytes | pathlib.Path] = {
            name: self.source / name
            for name in source_files(self.source)
            if name not in _MADE_FILES and not name.endswith(".safetensors")
        }
        content = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        declared = content.get("quantization_config")
        quantization = quantization_config(
            self.after, declared if isinstance(declared, dict) else None, producer=self.options.producer
        )
        content.pop("quantization_config", None)
        experts = {found for module, found in self.after.items() if ".experts." in module and module[0] == "l"}
        if experts <= {Format.NVFP4, Format.MXFP4}:
            content["expert_dtype"] = "fp4"
        elif experts == {Format.FP8}:
            content["expert_dtype"] = "fp8"
        else:
            content.pop("expert_dtype", None)
        if quantization is not None:
            content["quantization_config"] = quantization
            if "quantized_layers" in quantization:
                found["hf_quant_config.json"] = encode_json(hf_quant_config(quantization))
        found["config.json"] = encode_json(content)
        return found


_NOT_POWERS = "its block scales times its tensor scale are not powers of two, equal in pairs, so MXFP4 has no equal."


def sharing_groups(modules: Mapping[str, Any] | list[str]) -> list[list[str]]:
    """Group weights that share scales: w1 with w3 of the same expert, every other weight alone."""
    known = set(modules)
    groups = []
    for module in modules:
        partner = _partner(module)
        if module.endswith(".w3") and partner in known:
            continue  # with its w1
        groups.append([module, partner] if partner is not None and partner in known else [module])
    return groups


def _partner(module: str) -> str | None:
    """Return up for gate and gate for up, None for other weights."""
    if module.endswith(".w1"):
        return f"{module[:-3]}.w3"
    return f"{module[:-3]}.w1" if module.endswith(".w3") else None


def group_of(module: str) -> str:
    """Return what a weight is counted under."""
    if module.startswith("mtp."):
        return "draft"
    if ".shared_experts." in module:
        return "shared experts"
    return "routed experts" if ".experts." in module else "attention"


def input_amax(modules: list[str], calibration: Mapping[str, float], known: set[str]) -> dict[str, float]:
    """Return the input amax of every weight, filling in experts that calibration never reached.

    Such experts take the largest amax of the same projection in their layer: a scale near zero would make everything
    that ever reaches them infinite.

    Args:
        modules: weights that need one.
        calibration: amax by weight.
        known: all weights of the model.

    Raises:
        CheckpointError: the calibration is empty, an amax is missing, negative or not finite, or names no weight.
    """
    if not calibration:
        raise CheckpointError("calibration: it names no weight at all. Calibrate again.")
    problems = [
        Problem("calibration", name, f"{name}: not a weight of this model.")
        for name in sorted(set(calibration) - known)
    ]
    out: dict[str, float] = {}
    for group in sharing_groups(modules):
        given = [float(calibration.get(module, 0.0)) for module in group]
        if not all(math.isfinite(value) and value >= 0 for value in given):
            problems.append(
                Problem("calibration", group[0], f"{group[0]}: amax {given}; it must be finite and positive.")
            )
            continue
        if max(given) == 0 and ".experts." in group[0]:
            layer, projection = group[0].split(".experts.")[0], group[0].rsplit(".", 1)[1]
            names = {projection, "w3"} if projection == "w1" else {projection}
            given = [
                float(value)
                for name, value in calibration.items()
                if name.startswith(f"{layer}.experts.") and name.rsplit(".", 1)[1] in names
            ] or [0.0]
        if max(given) == 0:
            problems.append(Problem("calibration", group[0], f"{group[0]}: no amax."))
        out.update(dict.fromkeys(group, max(given)))
    if problems:
        lines = [str(finding) for finding in grouped(problems)]
        raise CheckpointError.listing("calibration (calibrate again, or leave it out)", lines)
    return out


def native_calibration(calibration: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return a calibration under DeepSeek's names, however it spells them: all that the loader reads.

    Raises:
        CheckpointError: two spellings of one weight have different values.
    """
    if calibration is None:
        return None
    out: dict[str, float] = {}
    for name, value in calibration.items():
        native = native_name(f"{name.removesuffix('.weight')}.weight").removesuffix(".weight")
        if native in out and out[native] != value:
            raise CheckpointError(f"calibration: {native} is named twice, with {out[native]} and {value}. Remove one.")
        out[native] = value
    return out


def quantization_config(
    formats: Mapping[str, Format], source: Mapping[str, Any] | None, *, producer: tuple[str, str]
) -> dict[str, Any] | None:
    """Return config.json's quantization_config for weights in these formats, None when nothing is quantized.

    Args:
        formats: weight -> format.
        source: what the source said; its FP8 fields are kept.
        producer: name and version.
    """
    kept = {key: copy.deepcopy(value) for key, value in (source or {}).items() if key not in _NVFP4_KEYS}
    found = set(formats.values())
    if found <= {Format.PLAIN}:
        return None
    if Format.FP8 not in found:
        kept = {}
    elif kept.get("quant_method") != "fp8":
        kept = dict(_FP8_CONFIG)
    if Format.NVFP4 not in found:
        return kept or dict(_FP8_CONFIG)
    quantized = sorted({_layer_of(module) for module, found in formats.items() if found is Format.NVFP4})
    nvfp4_backbone = [name for name in quantized if not name.startswith("mtp.")]
    only_experts = all(name.endswith(".ffn.experts") for name in nvfp4_backbone)
    if only_experts:
        ignore = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    else:
        ignore = ["embed", "head", "*.ffn.gate", "*.attn.compressor.*", "*.indexer.compressor.*", "*.weights_proj"]
        ignore += sorted({_layer_of(m) for m, found in formats.items() if found is not Format.NVFP4 and m[0] == "l"})
    if len(nvfp4_backbone) == len(quantized):
        ignore.append("mtp.*")
    tensor = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK}
    return {
        **({"quant_method": "modelopt"} if not kept else kept),
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4" if any(name.endswith(".ffn.experts") for name in nvfp4_backbone) else None,
        "kv_cache_quant_algo": None,
        "group_size": nvfp4.BLOCK,
        "producer": {"name": producer[0], "version": producer[1]},
        "quantized_layers": {name: {"quant_algo": "NVFP4", "group_size": nvfp4.BLOCK} for name in quantized},
        "ignore": ignore,
        "config_groups": {
            "group_0": {"weights": dict(tensor), "input_activations": dict(tensor), "targets": ["Linear"]}
        },
    }


def hf_quant_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return hf_quant_config.json, which repeats config.json's quantization_config in ModelOpt's own shape."""
    repeated = {key: copy.deepcopy(value) for key, value in quantization.items()}
    exclude, producer = repeated.pop("ignore"), repeated.pop("producer")
    repeated.pop("quant_method", None)
    return {"producer": producer, "quantization": {**repeated, "exclude_modules": exclude}}


def _layer_of(module: str) -> str:
    """Return the key of a weight in quantized_layers: all experts of a layer have one."""
    return module.split("experts.")[0] + "experts" if "experts." in module else module
