# SPDX-License-Identifier: Apache-2.0
"""Look at a few bytes of every tensor: enough to see most ways of storing it wrong, too few to take long.

Scalars (tensor and input scales) are read completely, where neighbours can be read together in at most MAX_READS reads,
else an even choice of them. Of every block-scale tensor and every matrix, norm and table at most 4 KiB are read: all of
it where it is small, else SAMPLE_BYTES from the start, the middle and the end. Every run looks at the same bytes. A
rule that holds here holds for what was read; `load` reads every byte. What is all zero is found here for certain, and
what is zero wherever it was looked at is taken for it.

What is plausible: a model's weights and the activations behind its norms are small. Weights above 224 and activations
above 2688 do not occur in a trained model, so an FP8 or E8M0 scale, a tensor scale or an input scale of 1 and more is
not a scale that multiplies. Nor is a matrix, a norm, the embedding or the head of a trained model all zero: that is a
file whose bytes never came. Biases, sinks, positions, hyper-connections and tables of experts may be.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

from megamoe.checkpoint.headers import ITEM_BYTES, Headers, TensorInfo
from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.claims import Claims
from megamoe.models.deepseek_v4.inventory import Entry, Role
from megamoe.models.deepseek_v4.layout import REDO, Format, StoredHeaders

MAX_READS = 4096
SAMPLE_BYTES = 1364  # from each of three places: 4 KiB together
FAKE = "megamoe_fake"  # key of a header's metadata: names and shapes are true, values are holes
_NEIGHBOUR_BYTES = 1 << 16  # a gap up to this is read rather than skipped
_LARGEST_RUN_BYTES = 1 << 20

NEAR_ZERO = 1e-8  # an input scale below it stands for activations below 3e-5
_PLAUSIBLE = 1.0
_RECIPROCALS = ("weight_global_scale", "input_global_scale")
_BAD_E4M3 = bytes(range(0x7F, 0x100))  # NaN, and what is negative
_E8M0_ONE = 127
_E8M0_TINY = 8  # scales under 2^-119 under codes that are not zero


@dataclasses.dataclass(frozen=True)
class Sampled:
    """How much was looked at.

    Attributes:
        scalars: scalars read.
        all_scalars: scalars there are.
        scales: block-scale tensors looked at.
        values: matrices, norms and tables looked at.
        num_bytes: bytes read.
    """

    scalars: int
    all_scalars: int
    scales: int
    values: int
    num_bytes: int


class ByteReader:
    """Reads byte ranges of shards; what lies beyond the end of a truncated file comes back short."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers
        self._files: dict[str, int] = {}
        self.num_bytes = 0
        self.num_reads = 0

    def __enter__(self) -> ByteReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def read(self, shard: str, begin: int, count: int) -> bytes:
        """Return `count` bytes of a shard's data section, starting at `begin`."""
        if shard not in self._files:
            self._files[shard] = os.open(pathlib.Path(self._headers.directory, shard), os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):  # no reading ahead: 2 KiB here and there is all that is wanted
                os.posix_fadvise(self._files[shard], 0, 0, os.POSIX_FADV_RANDOM)
        content = os.pread(self._files[shard], count, self._headers.data_starts[shard] + begin)
        self.num_bytes += len(content)
        self.num_reads += 1
        return content


def check_samples(headers: Headers, stored: StoredHeaders, claims: Claims) -> tuple[list[Problem], Sampled]:
    """Look at the scales of all quantized weights, and at the values of everything.

    Args:
        headers: of the checkpoint.
        stored: its tensors under native names.
        claims: which of them belong to the model, and their formats.

    Returns:
        What is wrong, and how much was looked at.
    """
    problems: list[Problem] = []
    formats = claims.formats
    with ByteReader(headers) as reader:
        wanted = _scalar_names(stored, formats)
        scalars = _read_scalars(reader, stored, wanted)
        if is_fake(headers):
            problems += _check_scalars(stored, formats, scalars, frozenset())
            return problems, Sampled(len(scalars), len(wanted), 0, 0, reader.num_bytes)
        values = _Values(reader, stored)
        for entry in claims.entries:
            problems += values.check(entry, formats.get(entry.name))
        problems += _check_copies(reader, stored, claims.copies)
        problems += _check_scalars(stored, formats, scalars, values.zero)
        blocks = [module for module, found in formats.items() if found is not Format.PLAIN]
        for module in blocks:
            problems += _check_block_scales(reader, stored, module, formats[module], module in values.zero)
        sampled = Sampled(len(scalars), len(wanted), len(blocks), values.count, reader.num_bytes)
    return problems, sampled


def is_fake(headers: Headers) -> bool:
    """Say whether a shard is marked as having no weights (tools/fake_checkpoint.py)."""
    return any(FAKE in metadata for metadata in headers.metadata.values())


# Values.


_MAY_BE_ZERO = ("attn_sink", ".bias", ".ape", "_fn", "_base", "_scale")


class _Values:
    """Looks at the values of tensors.

    Attributes:
        zero: weights (native, without ".weight") that are zero wherever they were looked at.
        count: tensors looked at.
    """

    def __init__(self, reader: ByteReader, stored: StoredHeaders) -> None:
        self.reader = reader
        self.stored = stored
        self.zero: set[str] = set()
        self.count = 0

    def check(self, entry: Entry, found: Format | None) -> Iterable[Problem]:
        is_weight = entry.role in (Role.LINEAR, Role.EXPERT)
        name = self.stored.codes_name(entry.name) if is_weight else entry.name
        if (is_weight and found is None) or name not in self.stored:
            return []
        self.count += 1
        dtype = self.stored.dtype(name)
        sample = _sample(self.reader, self.stored, name, ITEM_BYTES[dtype])
        if entry.role is Role.TABLE:
            return _check_table(self.stored, name, sample, ITEM_BYTES[dtype])
        if not sample.translate(None, _ZEROS[dtype] if dtype in _ZEROS else _FP4_ZEROS):
            if not sample or name.endswith(_MAY_BE_ZERO):
                return []
            self.zero.add(entry.name)
            return [self.all_zero(name, len(sample))]
        return _check_finite(self.stored, name, dtype, sample)

    def all_zero(self, name: str, looked_at: int) -> Problem:
        _, _, size = _place(self.stored, name)
        where = "" if looked_at == size else f" wherever it was looked at ({looked_at:,} of {size:,} bytes)"
        text = f"{self.stored.label(name)}: all zero{where}; no trained model has such a tensor."
        remedy = f"The file was reserved and never filled, or zeros were written for what was not computed. {REDO}"
        return Problem("values-zero", self.stored.stored_name(name), text, remedy, "zeros", "values")


_FP4_ZEROS = b"\x00\x08\x80\x88"
_ZEROS = {"BF16": b"\x00\x80", "F32": b"\x00\x80", "F8_E4M3": b"\x00\x80"}  # of either sign


def _check_finite(stored: StoredHeaders, name: str, dtype: str, sample: bytes) -> list[Problem]:
    if dtype in ("BF16", "F32"):
        width = ITEM_BYTES[dtype]
        high = sample[width - 1 :: width]
        is_bad = (b"\x7f" in high or b"\xff" in high) and any(
            one & 0x7F == 0x7F and other & 0x80 for one, other in zip(high, sample[width - 2 :: width], strict=False)
        )
    else:
        is_bad = dtype == "F8_E4M3" and (b"\x7f" in sample or b"\xff" in sample)
    return [not_finite(stored, name)] if is_bad else []


def not_finite(stored: StoredHeaders, name: str) -> Problem:
    """Return the problem that a tensor holds what is no number."""
    text = f"{stored.label(name)}: holds NaN or infinity."
    return Problem("values-not-finite", stored.stored_name(name), text, f"The bytes are damaged. {REDO}")


def original_of(copy: str) -> str:
    """Return the native name of the embedding or head that a draft's tensor repeats."""
    return copy.split(".", 2)[2]


def differing_copy(stored: StoredHeaders, copy: str) -> Problem:
    """Return the problem that a draft's copy of the embedding or the head is not the same tensor."""
    text = f"{stored.label(copy)}: differs from {original_of(copy)}."
    return Problem("draft-copy", stored.stored_name(copy), text, "A draft shares embedding and head.")


def _check_copies(reader: ByteReader, stored: StoredHeaders, copies: Iterable[str]) -> Iterator[Problem]:
    for copy in copies:
        original = original_of(copy)
        if original not in stored:
            continue
        infos = [stored.info(name) for name in (copy, original)]
        are_alike = (infos[0].dtype, infos[0].shape) == (infos[1].dtype, infos[1].shape)
        if not are_alike or _sample(reader, stored, copy, 1) != _sample(reader, stored, original, 1):
            yield differing_copy(stored, copy)


def _check_table(stored: StoredHeaders, name: str, sample: bytes, width: int) -> list[Problem]:
    entries = struct.unpack(
        f"<{len(sample) // width}{'q' if width == 8 else 'i'}", sample[: len(sample) // width * width]
    )
    bad = [entry for entry in entries if not 0 <= entry < stored.num_experts]
    if not bad:
        return []
    text = (
        f"{stored.label(name)}: expert {bad[0]} ({len(bad)} of {len(entries)} entries looked at); experts are 0 to "
        f"{stored.num_experts - 1}."
    )
    remedy = "Use the config.json that belongs to the weights."
    return [Problem("expert-table", stored.stored_name(name), text, remedy)]


# Scalars.


def _scalar_names(stored: StoredHeaders, formats: Mapping[str, Format]) -> list[str]:
    leaves = ("weight_scale_2", "input_scale", *_RECIPROCALS)
    names = (f"{module}.{leaf}" for module, found in formats.items() if found is Format.NVFP4 for leaf in leaves)
    return [name for name in names if name in stored and stored.info(name).num_bytes == 4]


def _read_scalars(reader: ByteReader, stored: StoredHeaders, names: list[str]) -> dict[str, float]:
    """Return scalars by native name: neighbours in one read, and an even choice where that takes too many reads."""
    infos = sorted(((stored.info(name), name) for name in names), key=lambda pair: (pair[0].shard, pair[0].begin))
    runs: list[list[tuple[TensorInfo, str]]] = []
    for info, name in infos:
        first = runs[-1][0][0] if runs else None
        last = runs[-1][-1][0] if runs else None
        if (
            first is not None
            and last is not None
            and last.shard == info.shard
            and info.begin - last.end <= _NEIGHBOUR_BYTES
            and info.end - first.begin <= _LARGEST_RUN_BYTES
        ):
            runs[-1].append((info, name))
        else:
            runs.append([(info, name)])
    step = -(-len(runs) // MAX_READS)
    out: dict[str, float] = {}
    for run in runs[:: max(step, 1)]:
        begin = run[0][0].begin
        content = reader.read(run[0][0].shard, begin, run[-1][0].end - begin)
        for info, name in run:
            raw = content[info.begin - begin : info.end - begin]
            if len(raw) == 4:
                out[name] = float(struct.unpack("<f", raw)[0])
    return out


def _check_scalars(
    stored: StoredHeaders, formats: Mapping[str, Format], scalars: Mapping[str, float], zero: Collection[str]
) -> Iterator[Problem]:
    multiplying: dict[str, float] = {}
    for name, value in scalars.items():
        module, _, leaf = name.rpartition(".")
        if not 0.0 < value < float("inf"):
            yield bad_scalar(stored, name, value, module in zero)
        else:
            multiplying[name] = 1.0 / value if leaf in _RECIPROCALS else value
    yield from _check_polarity(stored, multiplying, scalars)
    yield from _check_near_zero(stored, multiplying, scalars)
    yield from _check_pairs(stored, formats, multiplying, scalars)


def bad_scalar(stored: StoredHeaders, name: str, value: float, is_zero: bool) -> Problem:
    """Return the problem that a scalar scale means nothing, with the cause where the codes are all zero."""
    text = f"{stored.label(name)}: {value}; a scale must be positive and finite."
    remedy = REDO
    if is_zero and not name.rpartition(".")[2].startswith("input"):
        text += " The codes are all zero: an amax of 0 was taken for a scale."
        remedy = "Export the weight again; if it is to be zero, store any positive scale."
    return Problem("scalar-invalid", stored.stored_name(name), text, remedy, str(value), "positive and finite")


def _check_polarity(
    stored: StoredHeaders, multiplying: Mapping[str, float], scalars: Mapping[str, float]
) -> Iterator[Problem]:
    for name, value in multiplying.items():
        if value < _PLAUSIBLE:
            continue
        module, _, leaf = name.rpartition(".")
        is_input = leaf.startswith("input")
        rule = "input-scale-reciprocal" if is_input else "tensor-scale-reciprocal"
        what = "activations" if is_input else "weights"
        limit = "above 1" if leaf in _RECIPROCALS else "below 1"
        text = (
            f"{stored.label(name)}: {scalars[name]:.6g} stands for {what} up to {2688 * value:.3g}; a {leaf} is "
            f"{limit}. It looks like the reciprocal."
        )
        remedy = "Store amax / 2688 under input_scale and weight_scale_2, 2688 / amax under *_global_scale."
        yield Problem(rule, stored.stored_name(name), text, remedy, f"{scalars[name]:.6g}", limit)


def _check_near_zero(
    stored: StoredHeaders, multiplying: Mapping[str, float], scalars: Mapping[str, float]
) -> Iterator[Problem]:
    for name, value in multiplying.items():
        if value < NEAR_ZERO and ".input" in name:
            text = (
                f"{stored.label(name)}: {scalars[name]:.6g} stands for activations below {2688 * value:.2g}; "
                "calibration has not reached this weight."
            )
            remedy = "Use the largest input scale of the same projection over the layer's calibrated experts."
            yield Problem(
                "input-scale-near-zero",
                stored.stored_name(name),
                text,
                remedy,
                f"{scalars[name]:.6g}",
                f">= {NEAR_ZERO}",
            )


def _check_pairs(
    stored: StoredHeaders,
    formats: Mapping[str, Format],
    multiplying: Mapping[str, float],
    scalars: Mapping[str, float],
) -> Iterator[Problem]:
    for module in formats:
        if not module.endswith(".w1"):
            continue
        for leaf in ("weight_scale_2", "weight_global_scale"):
            gate, up = f"{module}.{leaf}", f"{module.removesuffix('w1')}w3.{leaf}"
            if gate in multiplying and up in multiplying and scalars[gate] != scalars[up]:
                text = (
                    f"{stored.label(gate)}: {scalars[gate]:.9g}, but {stored.label(up)} is {scalars[up]:.9g}. Whoever "
                    "runs gate and up as one product uses one of them for both."
                )
                remedy = "Quantize gate and up with one tensor scale."
                yield Problem(
                    "gate-up-scales-differ",
                    stored.stored_name(gate),
                    text,
                    remedy,
                    f"{scalars[gate]:.9g} and {scalars[up]:.9g}",
                    "equal",
                )


# Block scales.


def _pieces(num_bytes: int, item: int) -> list[tuple[int, int]]:
    """Return up to three (offset, count) that lie in a tensor of this many bytes, all of it where it is small."""
    count = SAMPLE_BYTES - SAMPLE_BYTES % item
    if num_bytes <= 3 * count:
        return [(0, num_bytes)]
    middle = num_bytes // 2
    return [(0, count), (middle - middle % item, count), (num_bytes - count, count)]


def _place(stored: StoredHeaders, name: str) -> tuple[str, int, int]:
    """Return shard, first byte and size of a tensor; of one expert's part, where it is fused."""
    source, info = stored.source(name), stored.info(name)
    if source.expert is None:
        return info.shard, info.begin, info.num_bytes
    size = info.num_bytes // (stored.num_experts * source.num_parts)
    return info.shard, info.begin + (source.expert * source.num_parts + source.part) * size, size


def _sample(reader: ByteReader, stored: StoredHeaders, name: str, item: int) -> bytes:
    """Return bytes of a tensor from up to three places."""
    shard, begin, size = _place(stored, name)
    return b"".join(reader.read(shard, begin + offset, count) for offset, count in _pieces(size, item))


def _check_block_scales(
    reader: ByteReader, stored: StoredHeaders, module: str, found: Format, is_zero: bool
) -> Iterable[Problem]:
    name = stored.scales_name(module, found)
    dtype = stored.dtype(name)
    width = ITEM_BYTES[dtype]
    sample = _sample(reader, stored, name, width)
    if found is not Format.NVFP4 and width == 1:
        bad = _bad_bytes(stored, name, sample, b"\xff", "NaN in E8M0", is_zero)
        return bad or _check_e8m0(stored, name, sample, is_zero)
    if sample and not any(sample):
        return [] if is_zero else [_zero_scales(stored, name)]
    if found is Format.NVFP4:
        return _bad_bytes(stored, name, sample, _BAD_E4M3, "NaN or negative in E4M3", is_zero)
    return _check_float_scales(stored, name, sample, width, is_zero)


def _bad_bytes(stored: StoredHeaders, name: str, sample: bytes, bad: bytes, what: str, is_zero: bool) -> list[Problem]:
    num_bad = len(sample) - len(sample.translate(None, bad))
    if not num_bad:
        return []
    first = next(byte for byte in sample if byte in bad)
    said = f"byte 0x{first:02x}, {what} ({num_bad} of {len(sample)} bytes looked at)"
    return [bad_scales(stored, name, said, is_zero, got=f"0x{first:02x}", allowed="0x00 to 0x7e")]


def bad_scales(
    stored: StoredHeaders, name: str, said: str, is_zero: bool, *, got: str = "", allowed: str = ""
) -> Problem:
    """Return the problem that block scales are no numbers, with the cause where the codes are all zero."""
    text = f"{stored.label(name)}: {said}"
    if is_zero:
        text += ", over codes that are all zero: ModelOpt and torchao divide by an amax of 0 there."
        remedy = "Export the weight again; if it is to be zero, store scales of zero."
    else:
        text += "."
        remedy = f"The bytes are damaged or not scales. {REDO}"
    return Problem("scale-nan", stored.stored_name(name), text, remedy, got, allowed)


def _check_float_scales(stored: StoredHeaders, name: str, sample: bytes, width: int, is_zero: bool) -> list[Problem]:
    words = [sample[start : start + width] for start in range(0, len(sample) - width + 1, width)]
    values = [float(struct.unpack("<f", word if width == 4 else b"\0\0" + word)[0]) for word in words]
    bad = [value for value in values if not 0.0 <= value < float("inf")]
    if bad:
        said = f"{bad[0]}, not finite or negative ({len(bad)} of {len(values)} looked at)"
        return [bad_scales(stored, name, said, is_zero, got=str(bad[0]), allowed="finite, not negative")]
    if values and (middle := statistics.median(values)) >= _PLAUSIBLE:
        return [_cast(stored, name, f"{middle:.6g}")]
    return []


_BELOW_ONE = bytes(range(_E8M0_ONE))
_TINY = bytes(range(_E8M0_TINY + 1))


def _check_e8m0(stored: StoredHeaders, name: str, sample: bytes, is_zero: bool) -> list[Problem]:
    num_used = len(sample) - sample.count(0)
    if 2 * len(sample.translate(None, _BELOW_ONE)) >= num_used > 0:  # the median may be one and more
        middle = statistics.median(byte for byte in sample if byte)
        if middle >= _E8M0_ONE:
            return [_cast(stored, name, f"2^{int(middle) - 127}")]
    if sample and not is_zero and not sample.translate(None, _TINY):
        return [_cast(stored, name, f"2^{max(sample) - 127}")]
    return []


def _zero_scales(stored: StoredHeaders, name: str) -> Problem:
    text = f"{stored.label(name)}: scales are zero wherever they were looked at, and codes are not."
    remedy = f"Scales were not computed, or their bytes never came. {REDO}"
    return Problem("scale-zero", stored.stored_name(name), text, remedy, "0", "scales above 0 over codes that are not")


def _cast(stored: StoredHeaders, name: str, middle: str) -> Problem:
    text = f"{stored.label(name)}: the middle scale is {middle}, a size no weight needs. E8M0 bytes were cast."
    remedy = "Reinterpret E8M0 bytes (a view), never convert them as numbers. Convert the original again."
    return Problem("scale-cast", stored.stored_name(name), text, remedy, middle, "scales between 2^-119 and 1")
