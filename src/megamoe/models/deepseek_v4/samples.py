# SPDX-License-Identifier: Apache-2.0
"""Look at a few bytes of a checkpoint's scales: enough to see most ways of storing them wrong, too few to take long.

Two kinds of bytes are read. Scalars (tensor and input scales): all of them, where neighbours can be read together in at
most MAX_READS reads, else an even choice. Block scales: up to SAMPLE_BYTES from the start, the middle and the end of
each of up to MAX_SAMPLED tensors, chosen by a hash of the name so that every run looks at the same ones. A rule that
holds here holds for what was read; `load` reads every byte.

What is plausible: a model's weights and the activations behind its norms are small. Weights above 224 and activations
above 2688 do not occur in a trained model, so an FP8 or E8M0 scale, a tensor scale or an input scale of 1 and more is
not a scale that multiplies.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping

from megamoe.checkpoint.headers import Headers, TensorInfo
from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.layout import REDO, Format, StoredHeaders

MAX_READS = 4096
MAX_SAMPLED = 1024  # tensors
SAMPLE_BYTES = 2048  # from each of three places
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
        tensors: block-scale tensors looked at.
        all_tensors: block-scale tensors there are.
        num_bytes: bytes read.
    """

    scalars: int
    all_scalars: int
    tensors: int
    all_tensors: int
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


def check_scales(
    headers: Headers, stored: StoredHeaders, formats: Mapping[str, Format]
) -> tuple[list[Problem], Sampled]:
    """Sample the scales of all quantized weights.

    Args:
        headers: of the checkpoint.
        stored: its tensors under native names.
        formats: weight -> format, of the weights whose headers are sound.

    Returns:
        What is wrong, and how much was looked at.
    """
    problems: list[Problem] = []
    with ByteReader(headers) as reader:
        wanted = _scalar_names(stored, formats)
        scalars = _read_scalars(reader, stored, wanted)
        problems += _check_scalars(stored, formats, scalars)
        blocks = [module for module, found in formats.items() if found is not Format.PLAIN]
        chosen = sorted(blocks, key=lambda module: zlib.crc32(module.encode()))[:MAX_SAMPLED]
        for module in sorted(chosen):
            problems += _check_block_scales(reader, stored, module, formats[module])
        sampled = Sampled(len(scalars), len(wanted), len(chosen), len(blocks), reader.num_bytes)
    return problems, sampled


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
    stored: StoredHeaders, formats: Mapping[str, Format], scalars: Mapping[str, float]
) -> Iterator[Problem]:
    multiplying: dict[str, float] = {}
    for name, value in scalars.items():
        leaf = name.rpartition(".")[2]
        if not 0.0 < value < float("inf"):
            text = f"{stored.label(name)}: {value}; a scale must be positive and finite."
            yield Problem("scalar-invalid", stored.stored_name(name), text, REDO, str(value), "positive and finite")
        else:
            multiplying[name] = 1.0 / value if leaf in _RECIPROCALS else value
    yield from _check_polarity(stored, multiplying, scalars)
    yield from _check_near_zero(stored, multiplying, scalars)
    yield from _check_pairs(stored, formats, multiplying, scalars)


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


def _sample(reader: ByteReader, stored: StoredHeaders, name: str, item: int) -> bytes:
    """Return bytes of a tensor from up to three places; of a fused tensor, of all experts."""
    info = stored.info(name)
    return b"".join(
        reader.read(info.shard, info.begin + offset, count) for offset, count in _pieces(info.num_bytes, item)
    )


def _check_block_scales(reader: ByteReader, stored: StoredHeaders, module: str, found: Format) -> Iterable[Problem]:
    name = stored.scales_name(module, found)
    if found is Format.NVFP4:
        sample = _sample(reader, stored, name, 1)
        bad = _bad_bytes(stored, name, sample, _BAD_E4M3, "NaN or negative in E4M3")
        is_empty = bool(sample) and not any(sample) and _holds_values(reader, stored, module)
        return [_cast(stored, name, "0")] if is_empty else bad
    dtype = stored.dtype(name)
    if dtype in ("F32", "BF16"):
        width = 4 if dtype == "F32" else 2
        sample = _sample(reader, stored, name, width)
        return _check_float_scales(stored, name, sample, width)
    sample = _sample(reader, stored, name, 1)
    bad = _bad_bytes(stored, name, sample, b"\xff", "NaN in E8M0")
    return bad or _check_e8m0(reader, stored, module, name, sample)


def _bad_bytes(stored: StoredHeaders, name: str, sample: bytes, bad: bytes, what: str) -> list[Problem]:
    remaining = sample.translate(None, bad)
    num_bad = len(sample) - len(remaining)
    if not num_bad:
        return []
    first = next(byte for byte in sample if byte in bad)
    text = f"{stored.label(name)}: byte 0x{first:02x}, {what} ({num_bad} of {len(sample)} bytes looked at)."
    remedy = f"The bytes are damaged or not scales. {REDO}"
    return [Problem("scale-nan", stored.stored_name(name), text, remedy, f"0x{first:02x}", "0x00 to 0x7e")]


def _check_float_scales(stored: StoredHeaders, name: str, sample: bytes, width: int) -> list[Problem]:
    words = [sample[start : start + width] for start in range(0, len(sample) - width + 1, width)]
    values = [float(struct.unpack("<f", word if width == 4 else b"\0\0" + word)[0]) for word in words]
    bad = [value for value in values if not 0.0 <= value < float("inf")]
    if bad:
        text = f"{stored.label(name)}: {bad[0]}, not finite or negative ({len(bad)} of {len(values)} looked at)."
        remedy = f"The bytes are damaged or not scales. {REDO}"
        return [Problem("scale-nan", stored.stored_name(name), text, remedy, str(bad[0]), "finite, not negative")]
    if values and (middle := statistics.median(values)) >= _PLAUSIBLE:
        return [_cast(stored, name, f"{middle:.6g}")]
    return []


def _check_e8m0(reader: ByteReader, stored: StoredHeaders, module: str, name: str, sample: bytes) -> list[Problem]:
    used = [byte for byte in sample if byte]
    if used and statistics.median(used) >= _E8M0_ONE:
        return [_cast(stored, name, f"2^{int(statistics.median(used)) - 127}")]
    if sample and max(sample) <= _E8M0_TINY and _holds_values(reader, stored, module):
        return [_cast(stored, name, f"2^{max(sample) - 127}")]
    return []


def _holds_values(reader: ByteReader, stored: StoredHeaders, module: str) -> bool:
    """Say whether the codes looked at are other than zero, of either sign."""
    return bool(_sample(reader, stored, stored.codes_name(module), 1).translate(None, b"\x00\x80\x08\x88"))


def _cast(stored: StoredHeaders, name: str, middle: str) -> Problem:
    text = f"{stored.label(name)}: the middle scale is {middle}, a size no weight needs. E8M0 bytes were cast."
    remedy = "Reinterpret E8M0 bytes (a view), never convert them as numbers. Convert the original again."
    return Problem("scale-cast", stored.stored_name(name), text, remedy, middle, "scales between 2^-119 and 1")
