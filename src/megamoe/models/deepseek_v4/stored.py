# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint under DeepSeek's names, in the containers of megamoe.formats.

Which tensors belong to a weight and in which format it is stored is worked out in layout.py from headers; here their
bytes are read. This is the edge where scales are brought to one convention: a scale multiplies. The reciprocals that
compressed-tensors stores are turned over here, once, in fp32, and nothing behind this file sees them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.formats.e8m0 import e8m0_from_bytes
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.layout import Format, StoredHeaders
from megamoe.models.deepseek_v4.samples import bad_scalar, bad_scales, not_finite

__all__ = ["Format", "StoredTensors"]

_SMALLEST_RECIPROCAL = 2.0**-127  # one over it, and over what lies under it, is infinite in fp32


class StoredTensors(StoredHeaders):
    """Native name -> stored tensor, read from the mapped files, with a list of everything that is wrong."""

    def __init__(self, reader: CheckpointReader, num_experts: int, natives: Mapping[str, str] | None = None) -> None:
        """Give every stored tensor its native name; two with the same one are a problem.

        Args:
            reader: open checkpoint.
            num_experts: experts in a fused tensor.
            natives: stored name -> native name, where that has been worked out already.
        """
        super().__init__(reader.headers.infos, num_experts, natives)
        self.reader = reader

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor over the mapped file; only part of it for one expert of a fused tensor."""
        source = self.source(name)
        tensor = self.reader.tensor(source.name)
        if source.expert is None:
            return tensor
        num_rows = tensor.shape[1] // source.num_parts
        return tensor[source.expert, source.part * num_rows : (source.part + 1) * num_rows]

    def check_scales(self, module: str, found: Format) -> None:
        """Take down a problem for every scale of one weight that means nothing."""
        if found is Format.FP8 or found is Format.MXFP4:
            name = self.scales_name(module, found)
            scales = self.read(name)
            if scales.dtype in (torch.float32, torch.bfloat16):
                bad, what = ~(scales >= 0) | scales.isinf(), "not finite or negative"
            else:
                bad, what = scales.view(torch.uint8) == 0xFF, "byte 255, which is NaN in E8M0"
            self._check_none(module, name, bad, scales, what)
        elif found is Format.NVFP4:
            name = f"{module}.weight_scale"
            data = self.read(name).view(torch.uint8)
            self._check_none(module, name, data >= 0x7F, data, "a byte that is NaN or negative in E4M3")
            for leaf in ("weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale"):
                name = f"{module}.{leaf}"
                if name in self:
                    value = float(self._scalar(name))
                    smallest = _SMALLEST_RECIPROCAL if leaf.endswith("global_scale") else 0.0
                    if not smallest < value < float("inf"):
                        self.take_down(bad_scalar(self, name, value, self._codes_are_zero(module)))

    def _check_none(self, module: str, name: str, bad: torch.Tensor, data: torch.Tensor, what: str) -> None:
        if bool(bad.any()):
            first = [int(index) for index in bad.nonzero()[0]]
            said = f"{what}, at {first} ({int(bad.sum())} of {data.numel()} scales)"
            self.take_down(bad_scales(self, name, said, self._codes_are_zero(module)))

    def _codes_are_zero(self, module: str) -> bool:
        codes = self.read(self.codes_name(module))
        sign = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x77  # zero is zero of either sign
        return not bool((codes.view(torch.uint8) & sign).any())

    def _scalar(self, name: str) -> torch.Tensor:
        return self.read(name).reshape(())

    def _scale(self, module: str, ours: str, reciprocal: str) -> torch.Tensor | None:
        """Return a scalar scale that multiplies, from either convention; None where neither is stored."""
        if f"{module}.{ours}" in self:
            return self._scalar(f"{module}.{ours}")
        if f"{module}.{reciprocal}" in self:
            return self._scalar(f"{module}.{reciprocal}").reciprocal()
        return None

    def input_scale(self, module: str) -> float | None:
        """Return the calibrated activation scale of a weight (amax / 2688, multiplies), or None without one."""
        scale = self._scale(module, "input_scale", "input_global_scale")
        return None if scale is None else float(scale)

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
            self.take_down(not_finite(self, name))
        return ok

    def fp8(self, module: str) -> Fp8BlockTensor:
        """Return an FP8 weight over the mapped file."""
        return Fp8BlockTensor(self.read(f"{module}.weight"), self._block_scales(module, Format.FP8))

    def mxfp4(self, module: str) -> MxFp4Tensor:
        """Return an MXFP4 weight over the mapped file."""
        codes = self.read(self.codes_name(module)).view(torch.uint8)
        return MxFp4Tensor(codes, self._block_scales(module, Format.MXFP4))

    def nvfp4(self, module: str) -> NvFp4Tensor:
        """Return an NVFP4 weight over the mapped file."""
        tensor_scale = self._scale(module, "weight_scale_2", "weight_global_scale")
        assert tensor_scale is not None
        codes = self.read(self.codes_name(module)).view(torch.uint8)
        return NvFp4Tensor(codes, self.read(f"{module}.weight_scale"), tensor_scale)

    def _block_scales(self, module: str, found: Format) -> torch.Tensor:
        scales = self.read(self.scales_name(module, found))
        if scales.dtype == torch.uint8:
            return e8m0_from_bytes(scales)
        return scales.float() if scales.dtype == torch.bfloat16 else scales
