# SPDX-License-Identifier: Apache-2.0
"""Dummy weights: a model of any configuration with valid random weights, made on the device and read from nowhere.

They have the shapes, formats and orders of real ones, so that time and memory of a model are measured without its
checkpoint. What they say means nothing.

Formats    as config.json declares them (declared.py); MXFP4 is loaded as NVFP4, and so it is made as NVFP4 here
Layout     random codes are random in any order: NVFP4 weights are made in the order that kernels take
Values     a linear's weights are about K^-1/2 in size, norms about 1, so that activations keep a normal size in any
           number of layers. Codes are uniform without NaN; block scales cover two powers of two
Seed       a tensor depends on its name, the seed and the kind of device, and not on the other layers
Draft      none is made
Source     docs/serving.md, section "Without weights"
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import types
import zlib
from collections.abc import Mapping

import torch

from megamoe.checkpoint.problem import CheckpointError
from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.models import find_checkpoint
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig, load_raw_config, parse_config
from megamoe.models.deepseek_v4.declared import declared_formats
from megamoe.models.deepseek_v4.inventory import Entry, Role, inventory
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.releases import RELEASED_CONFIGS
from megamoe.models.deepseek_v4.stacked import LinearWeight
from megamoe.models.deepseek_v4.weights import Assembler, ModelWeights, fits_fp8_groups, fp8_groups

E2M1_RMS = math.sqrt((0.25 + 1.0 + 2.25 + 4.0 + 9.0 + 16.0 + 36.0) / 8.0)
"""Of uniform codes."""

LOWEST_SCALE, NUM_SCALES = 0x38, 16  # E4M3 codes of block scales: 1 to 3.75
LOWEST_FP8, FP8_BITS = 0x30, 0x9F  # E4M3 codes of FP8 weights: a sign and magnitudes of 0.5 to 7.5
EXPERT_SIZES = 0.8, 1.2  # tensor scales differ by so much


@dataclasses.dataclass(frozen=True)
class DummyModel:
    """What dummy weights are made for.

    Attributes:
        config: without a draft; with as many layers as asked for.
        formats: native name → how a weight is held, for every weight that may be quantized.
        directory: of config.json; for a release's name that name, which is no directory.
        notes: what was left out, one line each.
    """

    config: ModelConfig
    formats: Mapping[str, Format]
    directory: pathlib.Path
    notes: tuple[str, ...]


def dummy_directory(model: str) -> pathlib.Path:
    """Return where a model's files lie, if it has any; errors are those of `dummy_model`."""
    return pathlib.Path(model) if model in RELEASED_CONFIGS else find_checkpoint(model, "load")


def dummy_model(model: str, num_layers: int | None) -> DummyModel:
    """Return what to make.

    Args:
        model: "tiny", "flash" or "pro", or a directory with config.json.
        num_layers: how many of the model's layers, the first ones; None for all.

    Raises:
        CheckpointError: there is no such model, or config.json is refused.
        ValueError: the model has fewer layers, or none were asked for.
    """
    directory = dummy_directory(model)
    raw = RELEASED_CONFIGS[model] if model in RELEASED_CONFIGS else load_raw_config(directory)
    config = parse_config(raw, where=model if model in RELEASED_CONFIGS else str(directory / "config.json"))
    cut, notes = cut_layers(config, num_layers)
    modules = [entry.name for entry in inventory(cut) if entry.role in (Role.LINEAR, Role.EXPERT)]
    formats = declared_formats(raw, modules)
    held = {name: Format.NVFP4 if found is Format.MXFP4 else found for name, found in formats.items()}
    grouped = [name for name, found in held.items() if name.endswith(".wo_a") and found is Format.FP8]
    if grouped and not fits_fp8_groups(config.o_lora_rank):
        raise CheckpointError(
            f"load: {grouped[0]}: FP8 blocks of {fp8.BLOCK} rows lie across groups of {config.o_lora_rank} "
            "(o_lora_rank). Declare it bf16 or NVFP4 in config.json."
        )
    return DummyModel(cut, types.MappingProxyType(held), directory, ("the weights are random numbers", *notes))


def cut_layers(config: ModelConfig, num_layers: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return a configuration with the first layers only and without a draft, and what was left out.

    Raises:
        ValueError: the model has fewer layers, or none were asked for.
    """
    has = config.num_hidden_layers
    count = has if num_layers is None else num_layers
    if not 1 <= count <= has:
        raise ValueError(f"load: num_layers must be 1 to {has}, the layers that the model has; got {count}.")
    notes = []
    if config.dspark is not None or config.num_nextn_predict_layers:
        notes.append("no draft is made")
    if count < has:
        left = config.layer_kinds[count:]
        kinds = ", ".join(f"{left.count(kind)} {kind.name}" for kind in LayerKind if kind in left)
        notes.append(f"{count} of {has} layers: {count} to {has - 1} are left out ({kinds})")
    cut = dataclasses.replace(
        config,
        num_hidden_layers=count,
        layer_kinds=config.layer_kinds[:count],
        ratios=config.ratios[:count],
        hash_routed=config.hash_routed[:count],
        num_nextn_predict_layers=0,
        dspark=None,
    )
    return cut, tuple(notes)


def dummy_bytes(model: DummyModel, dtype: torch.dtype | None) -> int:
    """Return the bytes that the weights will take; `dtype` is what they are dequantized to, None for containers."""
    total = 0
    for entry in inventory(model.config):
        count = math.prod(entry.shape)
        found = model.formats.get(entry.name, Format.PLAIN)
        if entry.role is Role.TABLE:
            total += 8 * count
        elif entry.role is Role.FLOAT32:
            total += 4 * count
        elif dtype is not None:
            total += dtype.itemsize * count
        elif found is Format.PLAIN:
            total += 2 * count
        elif found is Format.FP8:
            total += count + -(-count // fp8.BLOCK**2)
        else:
            total += count // 2 + count // 16 + 4
    return total


class DummyWeights(Assembler):
    """Makes the weights of a model.

    Attributes:
        config: of the model.
    """

    def __init__(
        self,
        model: DummyModel,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        layouts: Mapping[str, CodeLayout],
        seed: int = 0,
    ) -> None:
        """Look at shapes; nothing is made yet.

        Args:
            model: what to make.
            dtype: what weights are dequantized to, None for containers.
            device: where they are made.
            layouts: "linear", "grouped" or "experts" → order of such NVFP4 weights; row-major where nothing is said.
            seed: of all.
        """
        self.config = model.config
        self._formats = model.formats
        self._entries: dict[str, Entry] = {entry.name: entry for entry in inventory(model.config)}
        self._dtype = dtype
        self._device = device
        self._layouts = layouts
        self._seed = seed
        self._generator = torch.Generator(device)

    def make(self) -> ModelWeights:
        """Make them all."""
        blocks = zip(self.config.layer_kinds, self.config.hash_routed, strict=True)
        weights = ModelWeights(
            embed=self.plain("embed.weight"),
            head=self.plain("head.weight"),
            norm=self.plain("norm.weight"),
            hc_head=self.hyper_connection("hc_head"),
            blocks=tuple(self.block(f"layers.{layer}", *block) for layer, block in enumerate(blocks)),
            mtp=(),
            dspark=None,
            unused_draft=(),
            input_scales=types.MappingProxyType({}),
            formats=self._formats,
            num_relaid=0,
        )
        if self._device.type == "cuda":
            # Kernels may read a weight before the launch ahead of theirs has ended; from here on it is there.
            torch.cuda.synchronize(self._device)
        return weights

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that is never quantized."""
        generator = self._seeded(name)
        values = torch.randn(self._entries[name].shape, generator=generator, device=self._device)
        mean, size = _distribution(name, self._entries[name].shape)
        return values.mul_(size).add_(mean).to(dtype or self._dtype or torch.bfloat16)

    def table(self, name: str) -> torch.Tensor:
        """Return which experts a token id chooses: different ones."""
        num_tokens, active = self._entries[name].shape
        experts = self.config.n_routed_experts
        bounds = ((0, experts), (1, max(2, experts // active + 1)))
        first, step = (
            torch.randint(*bound, (num_tokens, 1), generator=self._seeded(f"{name} {part}"), device=self._device)
            for part, bound in enumerate(bounds)
        )
        return (first + step * torch.arange(active, device=self._device)) % experts

    def linear(self, module: str) -> LinearWeight:
        """Return a weight [N, K]."""
        return self._dequantized(self._weight(module, self._entries[module].shape, "linear"))

    def grouped(self, module: str) -> LinearWeight:
        """Return a weight [G, N, K]."""
        num_groups, (num_rows, width) = self.config.o_groups, self._entries[module].shape
        if self._formats[module] is Format.FP8:
            whole = self._weight(module, (num_rows, width), "grouped")
            assert isinstance(whole, Fp8BlockTensor)
            return self._dequantized(fp8_groups(whole, num_groups))
        return self._dequantized(self._weight(module, (num_groups, num_rows // num_groups, width), "grouped"))

    def experts(self, prefix: str) -> tuple[LinearWeight, LinearWeight, LinearWeight]:
        """Return w1, w3, w2 of all experts."""
        count = self.config.n_routed_experts
        shapes = {name: (count, *self._entries[f"{prefix}.0.{name}"].shape) for name in ("w1", "w3", "w2")}
        w1, w3, w2 = (
            self._dequantized(self._weight(f"{prefix}.0.{name}", shape, "experts")) for name, shape in shapes.items()
        )
        return w1, w3, w2

    def _seeded(self, name: str) -> torch.Generator:
        return self._generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))

    def _bytes(self, name: str, *shape: int) -> torch.Tensor:
        """Return random bytes."""
        count = math.prod(shape)
        words = torch.empty(-(-count // 8), dtype=torch.int64, device=self._device)
        words.random_(-(2**63), None, generator=self._seeded(name))
        return words.view(torch.uint8)[:count].view(shape)

    def _weight(self, name: str, shape: tuple[int, ...], kind: str) -> LinearWeight:
        """Return a weight [..., N, K] in the format of a module."""
        *leading, num_rows, width = shape
        found = self._formats[name]
        if found is Format.PLAIN:
            values = torch.randn(shape, generator=self._seeded(name), device=self._device)
            return values.mul_(width**-0.5).to(self._dtype or torch.bfloat16)
        if found is Format.FP8:
            codes = self._bytes(name, *shape).bitwise_and_(FP8_BITS).add_(LOWEST_FP8).view(torch.float8_e4m3fn)
            blocks = -(-num_rows // fp8.BLOCK), -(-width // fp8.BLOCK)
            largest = 127 + round(math.log2(width**-0.5 / _rms(LOWEST_FP8, 32)))
            moves = self._bytes(f"{name} scales", *leading, *blocks).bitwise_and_(1)
            return Fp8BlockTensor(codes, (largest - moves).view(torch.float8_e8m0fnu))
        scales = self._bytes(f"{name} scales", *leading, num_rows, width // 16)
        scales = scales.bitwise_and_(NUM_SCALES - 1).add_(LOWEST_SCALE).view(torch.float8_e4m3fn)
        low, high = EXPERT_SIZES
        sizes = torch.rand(leading, generator=self._seeded(f"{name} sizes"), device=self._device) * (high - low) + low
        is_relaid = self._layouts.get(kind) is CodeLayout.FRAGMENT_16X64
        return NvFp4Tensor(
            self._bytes(name, *leading, num_rows, width // 2),
            scales,
            sizes * (width**-0.5 / E2M1_RMS / _rms(LOWEST_SCALE, NUM_SCALES)),
            scale_layout=ScaleLayout.FRAGMENT_16X64 if is_relaid else ScaleLayout.ROW_MAJOR,
            code_layout=CodeLayout.FRAGMENT_16X64 if is_relaid else CodeLayout.ROW_MAJOR,
        )

    def _dequantized(self, weight: LinearWeight) -> LinearWeight:
        if self._dtype is None or isinstance(weight, torch.Tensor):
            return weight
        if isinstance(weight, Fp8BlockTensor):
            return fp8.dequantize(weight, self._dtype)
        return nvfp4.dequantize(weight, self._dtype)


def _rms(lowest: int, count: int) -> float:
    """Return the size of E4M3 codes from one on."""
    codes = torch.arange(lowest, lowest + count, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return float(codes.float().square().mean().sqrt())


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor that is never quantized."""
    if name.endswith("norm.weight") or (name.startswith("hc_") or ".hc_" in name) and name.endswith("_scale"):
        return 1.0, 0.1
    if name == "embed.weight" or name.endswith("attn_sink"):
        return 0.0, 1.0
    if name.endswith("gate.bias"):  # what tells experts apart is the token
        return 0.0, 0.01
    if name.endswith("_base") or name.endswith(".ape"):
        return 0.0, 0.1
    return 0.0, shape[-1] ** -0.5
