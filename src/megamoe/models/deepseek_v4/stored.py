# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors under DeepSeek's names, and the format each weight is stored in.

The format is decided for every weight by its own tensors: dtype of the codes and which scales lie beside them. No flag
of config.json takes part, because released checkpoints mix formats (NVFP4 experts beside MXFP4 draft experts).

    plain    X.weight BF16 or F32 [N, K]
    FP8      X.weight F8_E4M3 [N, K],    X.scale F8_E8M0 or F32 [ceil(N/128), ceil(K/128)]
    MXFP4    X.weight I8, U8 or F4 [N, K/2],    X.scale F8_E8M0 [N, K/32]
    NVFP4    X.weight U8, I8 or F4 [N, K/2],    X.weight_scale F8_E4M3 [N, K/16],    X.weight_scale_2 F32 [],
             X.input_scale F32 [] or absent

E8M0 scales may be labelled U8 by writers without that dtype; their bytes are reinterpreted, never cast. A transformers
tensor that holds one projection of all experts is seen here as one tensor per expert, sharing its bytes.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.formats.e8m0 import e8m0_from_bytes
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.names import fused_experts, native_name

FLOATS = ("BF16", "F32")
_PACKED = ("U8", "I8", "F4")
_E8M0 = ("F8_E8M0", "U8")
_REDO = "Download or export the checkpoint again."

_COMPRESSED_TENSORS = (
    "This is the compressed-tensors layout, whose tensor scales are reciprocals. Convert the original."
)
_HINTS = {
    ".weight_packed": _COMPRESSED_TENSORS,
    ".weight_global_scale": _COMPRESSED_TENSORS,
    ".input_global_scale": _COMPRESSED_TENSORS,
    ".bias_vl": "This belongs to the vision variant, which is not supported.",
}


class Format(enum.Enum):
    """How a weight is stored."""

    PLAIN = "plain"
    FP8 = "fp8"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the bytes of a native tensor are: a whole stored tensor, or one expert's rows of a fused one."""

    name: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


class StoredTensors:
    """Native name -> stored tensor, with a list of everything that is wrong."""

    def __init__(self, reader: CheckpointReader, num_experts: int) -> None:
        """Give every stored tensor its native name; two with the same one are a problem.

        Args:
            reader: open checkpoint.
            num_experts: experts in a fused tensor.
        """
        self.reader = reader
        self.num_experts = num_experts
        self._problems: dict[str, None] = {}
        self._sources: dict[str, _Source] = {}
        self._claimed: set[str] = set()
        for stored in reader.names:
            native = native_name(stored)
            fused = fused_experts(native)
            if fused is None:
                self._add(native, _Source(stored))
                continue
            prefix, projections, leaf = fused
            for part, projection in enumerate(projections):
                for expert in range(num_experts):
                    source = _Source(stored, expert, part, len(projections))
                    self._add(f"{prefix}.{expert}.{projection}.{leaf}", source)

    def _add(self, native: str, source: _Source) -> None:
        other = self._sources.setdefault(native, source)
        if other is not source:
            self.problem(f"{source.name}: the same tensor as {other.name}, both are {native}. Remove one.")

    def problem(self, text: str) -> None:
        """Take down one problem."""
        self._problems[text] = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything wrong so far: one line each, in the order found, without repetition."""
        return tuple(self._problems)

    def __contains__(self, name: object) -> bool:
        """Say whether a native tensor is stored."""
        return name in self._sources

    @property
    def names(self) -> tuple[str, ...]:
        """All native names, sorted."""
        return tuple(sorted(self._sources))

    def claim(self, name: str) -> None:
        """Say that a tensor is accounted for."""
        self._claimed.add(name)

    def unclaimed(self) -> tuple[str, ...]:
        """Return the native names nobody has claimed."""
        return tuple(sorted(set(self._sources) - self._claimed))

    def label(self, name: str) -> str:
        """Return how messages call a tensor: as stored, with the native name where it differs."""
        source = self._sources.get(name)
        if source is None or source.name == name:
            return name
        return source.name if source.expert is not None else f"{source.name} ({name})"

    def dtype(self, name: str) -> str:
        """Return the safetensors dtype of a stored tensor."""
        return self.reader.info(self._sources[name].name).dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor over the mapped file; only part of it for one expert of a fused tensor."""
        source = self._sources[name]
        tensor = self.reader.tensor(source.name)
        if source.expert is None:
            return tensor
        num_rows = tensor.shape[1] // source.num_parts
        return tensor[source.expert, source.part * num_rows : (source.part + 1) * num_rows]

    def expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], *, hint: str = "") -> bool:
        """Claim a tensor and check dtype and shape.

        Args:
            name: native name.
            dtypes: allowed safetensors dtypes.
            shape: expected shape; [1] is accepted for [].
            hint: sentence added when the shape is wrong.

        Returns:
            True when it is there and as expected; otherwise a problem has been taken down.
        """
        self.claim(name)
        said = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in self:
            self.problem(f"{name}: missing, expected {said}. {_REDO}")
            return False
        source = self._sources[name]
        info = self.reader.info(source.name)
        if source.expert is not None:
            shape = (self.num_experts, source.num_parts * shape[0], *shape[1:])
            said = f"{' or '.join(dtypes)} {list(shape)}"
        if info.dtype not in dtypes or (info.shape != shape and not (shape == () and info.shape == (1,))):
            if info.shape != shape and len(shape) == 2 and info.shape == shape[::-1]:
                hint = f"It looks transposed. {hint}"
            self.problem(f"{self.label(name)}: {info}, expected {said}. {hint or _REDO}".rstrip())
            return False
        return True

    def refuse_unclaimed(self) -> None:
        """Take down a problem for every tensor nobody has claimed."""
        for name in self.unclaimed():
            source = self._sources[name]
            hint = next((text for suffix, text in _HINTS.items() if name.endswith(suffix)), "")
            module, _, leaf = name.rpartition(".")
            if not hint and leaf != "weight" and f"{module}.weight" in self:
                hint = f"{self.label(f'{module}.weight')} is {self.dtype(f'{module}.weight')}, which has no such part."
            hint = hint or "Remove it from the checkpoint, or use the config.json that belongs to the weights."
            self.problem(f"{self.label(name)}: unknown tensor {self.reader.info(source.name)}. {hint}")

    def detect(self, module: str, shape: tuple[int, int]) -> Format | None:
        """Decide the format of one weight, claim its tensors and check them.

        Args:
            module: native name without ".weight".
            shape: logical [N, K].

        Returns:
            The format, or None when a problem has been taken down.
        """
        weight, num_problems = f"{module}.weight", len(self._problems)
        num_rows, num_columns = shape
        if weight not in self:
            self.problem(f"{weight}: missing, expected {list(shape)} in any format. {_REDO}")
            for leaf in ("scale", "weight_scale", "weight_scale_2", "input_scale"):
                self.claim(f"{module}.{leaf}")
            return None
        dtype = self.dtype(weight)
        if dtype in FLOATS:
            found = Format.PLAIN
            self.expect(weight, FLOATS, shape)
        elif dtype == "F8_E4M3":
            found = Format.FP8
            self.expect(weight, (dtype,), shape)
            self.expect(f"{module}.scale", (*_E8M0, "F32"), (-(-num_rows // 128), -(-num_columns // 128)))
            if self._sources[weight].num_parts > 1 and num_rows % 128:
                self.problem(
                    f"{self.label(weight)}: FP8 blocks of 128 rows straddle gate and up ({num_rows} rows each). "
                    "Export the experts one by one."
                )
        elif dtype in _PACKED:
            packed = (num_rows, num_columns // 2)
            is_nvfp4 = f"{module}.weight_scale" in self or f"{module}.weight_scale_2" in self
            found = Format.NVFP4 if is_nvfp4 else Format.MXFP4
            block = 16 if is_nvfp4 else 32
            if num_columns % block:
                self.problem(f"{self.label(weight)}: packed FP4, but K ({num_columns}) is not a multiple of {block}.")
            self.expect(weight, _PACKED, packed, hint="Codes must be packed along K, two columns in a byte.")
            if is_nvfp4:
                self.expect(f"{module}.weight_scale", ("F8_E4M3",), (num_rows, num_columns // 16))
                self.expect(f"{module}.weight_scale_2", ("F32",), ())
                if f"{module}.input_scale" in self:
                    self.expect(f"{module}.input_scale", ("F32",), ())
            else:
                self.expect(f"{module}.scale", _E8M0, (num_rows, num_columns // 32))
        else:
            self.claim(weight)
            self.problem(
                f"{self.label(weight)}: dtype {dtype}; readable are BF16, F32, F8_E4M3 with block scales and packed "
                "FP4. Convert it to one of these."
            )
            return None
        return found if len(self._problems) == num_problems else None

    def check_scales(self, module: str, found: Format) -> None:
        """Take down a problem for every scale of one weight that means nothing."""
        if found is Format.FP8 or found is Format.MXFP4:
            name = f"{module}.scale"
            scales = self.read(name)
            if scales.dtype == torch.float32:
                bad, what = ~(scales >= 0) | scales.isinf(), "not finite or negative"
            else:
                bad, what = scales.view(torch.uint8) == 0xFF, "byte 255, which is NaN in E8M0"
            self._check_none(name, bad, scales, what)
        elif found is Format.NVFP4:
            name = f"{module}.weight_scale"
            data = self.read(name).view(torch.uint8)
            self._check_none(name, data >= 0x7F, data, "a byte that is NaN or negative in E4M3")
            for name in (f"{module}.weight_scale_2", f"{module}.input_scale"):
                if name in self:
                    value = self.scalar(name)
                    if not 0.0 < value < float("inf"):
                        self.problem(f"{self.label(name)}: {value}; a scale must be positive and finite. {_REDO}")

    def _check_none(self, name: str, bad: torch.Tensor, data: torch.Tensor, what: str) -> None:
        if bool(bad.any()):
            first = [int(index) for index in bad.nonzero()[0]]
            self.problem(
                f"{self.label(name)}: {what}, at {first} ({int(bad.sum())} of {data.numel()} scales). "
                f"The bytes are damaged or not scales. {_REDO}"
            )

    def scalar(self, name: str) -> float:
        """Return a stored scalar."""
        return float(self.read(name).reshape(()))

    def finite(self, name: str) -> bool:
        """Say whether a BF16, F32 or F8_E4M3 tensor holds only finite values; takes down a problem if not."""
        values = self.read(name)
        if values.numel() == 0:
            return True
        if values.dtype == torch.float8_e4m3fn:
            ok = not bool((values.view(torch.uint8) & 0x7F == 0x7F).any())
        else:
            low, high = torch.aminmax(values)
            ok = bool(low > -torch.inf) and bool(high < torch.inf)
        if not ok:
            self.problem(f"{self.label(name)}: holds NaN or infinity. The bytes are damaged. {_REDO}")
        return ok

    def fp8(self, module: str) -> Fp8BlockTensor:
        """Return an FP8 weight over the mapped file."""
        return Fp8BlockTensor(self.read(f"{module}.weight"), self._block_scales(module))

    def mxfp4(self, module: str) -> MxFp4Tensor:
        """Return an MXFP4 weight over the mapped file."""
        return MxFp4Tensor(self.read(f"{module}.weight").view(torch.uint8), self._block_scales(module))

    def nvfp4(self, module: str) -> NvFp4Tensor:
        """Return an NVFP4 weight over the mapped file."""
        return NvFp4Tensor(
            self.read(f"{module}.weight").view(torch.uint8),
            self.read(f"{module}.weight_scale"),
            self.read(f"{module}.weight_scale_2").reshape(()),
        )

    def _block_scales(self, module: str) -> torch.Tensor:
        scales = self.read(f"{module}.scale")
        return e8m0_from_bytes(scales) if scales.dtype == torch.uint8 else scales
