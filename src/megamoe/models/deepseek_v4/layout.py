# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors under DeepSeek's names, and the format each weight is stored in, from headers alone.

The format is decided for every weight by its own tensors: dtype of the codes and which scales lie beside them. No flag
of config.json takes part, because released checkpoints mix formats (NVFP4 experts beside MXFP4 draft experts).

    plain    X.weight BF16 or F32 [N, K]
    FP8      X.weight F8_E4M3 [N, K],    X.scale F8_E8M0 or F32 [ceil(N/128), ceil(K/128)]
    MXFP4    X.weight I8, U8 or F4 [N, K/2],    X.scale F8_E8M0 [N, K/32]
    NVFP4    X.weight U8, I8 or F4 [N, K/2],    X.weight_scale F8_E4M3 [N, K/16],    X.weight_scale_2 F32 [],
             X.input_scale F32 [] or absent

compressed-tensors spells them differently, and its two scalars are reciprocals of what multiplies:

    FP8      X.weight F8_E4M3 [N, K],    X.weight_scale F32 or BF16 [ceil(N/128), ceil(K/128)]
    MXFP4    X.weight_packed U8 [N, K/2],    X.weight_scale U8 or F8_E8M0 [N, K/32]
    NVFP4    X.weight_packed U8 [N, K/2],    X.weight_scale F8_E4M3 [N, K/16],    X.weight_global_scale F32 [1],
             X.input_global_scale F32 [1] or absent

E8M0 scales may be labelled U8 by writers without that dtype; their bytes are reinterpreted, never cast. A transformers
tensor that holds one projection of all experts is seen here as one tensor per expert, sharing its bytes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from megamoe.checkpoint.headers import TensorInfo
from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.inventory import COMPANIONS, DSparkDraft
from megamoe.models.deepseek_v4.names import fused_experts, native_name

FLOATS = ("BF16", "F32")
SCALES_TRANSPOSED, CODES_TURNED = "scales-transposed", "codes-orientation"
REDO = "Download or export the checkpoint again."
_PACKED = ("U8", "I8", "F4")
_E8M0 = ("F8_E8M0", "U8")
_BLOCK_SCALES = (*_E8M0, "F32", "BF16")

_INTEGER_PACKED = "Integer weights of compressed-tensors are not readable. Convert the original."
_HINTS = {
    ".weight_packed": "compressed-tensors packs no such weight here.",
    ".weight_global_scale": "It lies beside no packed weight.",
    ".input_global_scale": "It lies beside no packed weight.",
    ".weight_shape": _INTEGER_PACKED,
    ".weight_zero_point": _INTEGER_PACKED,
    ".bias_vl": "This belongs to the vision variant, which is not supported.",
}


class Format(enum.Enum):
    """How a weight is stored."""

    PLAIN = "plain"
    FP8 = "fp8"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a native tensor are: a whole stored tensor, or one expert's rows of a fused one.

    Attributes:
        name: name as stored.
        expert: None, or which slice of the leading dimension.
        part: which part of the rows of that slice.
        num_parts: parts those rows are divided into.
    """

    name: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


class StoredHeaders:
    """Native name -> stored tensor, with a list of everything that is wrong."""

    def __init__(
        self, infos: Mapping[str, TensorInfo], num_experts: int, natives: Mapping[str, str] | None = None
    ) -> None:
        """Give every stored tensor its native name; two with the same one are a problem.

        Args:
            infos: stored name -> header entry.
            num_experts: experts in a fused tensor.
            natives: stored name -> native name, where that has been worked out already.
        """
        self.infos = infos
        self.num_experts = num_experts
        self._problems: dict[Problem, None] = {}
        self._sources: dict[str, Source] = {}
        self._claimed: set[str] = set()
        for stored in sorted(infos):
            native = natives[stored] if natives is not None else native_name(stored)
            fused = fused_experts(native)
            if fused is None:
                self._add(native, Source(stored))
                continue
            prefix, projections, leaf = fused
            for part, projection in enumerate(projections):
                for expert in range(num_experts):
                    source = Source(stored, expert, part, len(projections))
                    self._add(f"{prefix}.{expert}.{projection}.{leaf}", source)

    def _add(self, native: str, source: Source) -> None:
        other = self._sources.setdefault(native, source)
        if other is not source:
            text = f"{source.name}: the same tensor as {other.name}, both are {native}."
            self.problem("tensor-twice", source.name, text, "Remove one.")

    def problem(
        self, rule: str, subject: str, text: str, remedy: str = "", *, got: str = "", allowed: str = ""
    ) -> None:
        """Take down one problem; see `Problem`."""
        self.take_down(Problem(rule, subject, text, remedy, got, allowed))

    def take_down(self, problem: Problem) -> None:
        """Take down one problem."""
        self._problems[problem] = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong so far, in the order found, without repetition."""
        return tuple(self._problems)

    def __contains__(self, name: object) -> bool:
        """Say whether a native tensor is stored."""
        return name in self._sources

    @property
    def names(self) -> tuple[str, ...]:
        """All native names, sorted."""
        return tuple(sorted(self._sources))

    def source(self, name: str) -> Source:
        """Return where the bytes of a native tensor are."""
        return self._sources[name]

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

    def stored_name(self, name: str) -> str:
        """Return the stored name of a native tensor, or the native one where none is stored."""
        source = self._sources.get(name)
        return name if source is None else source.name

    def info(self, name: str) -> TensorInfo:
        """Return the header entry behind a native tensor (of a fused tensor, the whole)."""
        return self.infos[self._sources[name].name]

    def dtype(self, name: str) -> str:
        """Return the safetensors dtype of a stored tensor."""
        return self.info(name).dtype

    def codes_name(self, module: str) -> str:
        """Return the native name of a weight's codes or values."""
        packed = f"{module}.weight_packed"
        return packed if packed in self and f"{module}.weight" not in self else f"{module}.weight"

    def scales_name(self, module: str, found: Format) -> str:
        """Return the native name of a quantized weight's block scales."""
        theirs = f"{module}.weight_scale"
        if found is Format.NVFP4:
            return theirs
        return theirs if theirs in self and f"{module}.scale" not in self else f"{module}.scale"

    def stack_kind(self, module: str, found: Format) -> str:
        """Return what must be the same for all experts of a layer; the two FP4 formats stack."""
        if found is Format.PLAIN:
            return self.dtype(f"{module}.weight")
        if found is Format.FP8:
            return f"FP8 with {'F32' if self.dtype(self.scales_name(module, found)) in FLOATS else 'E8M0'} scales"
        return "FP4"

    def expect(
        self,
        name: str,
        dtypes: tuple[str, ...],
        shape: tuple[int, ...],
        *,
        hint: str = "",
        if_turned: str = "tensor-transposed",
    ) -> bool:
        """Claim a tensor and check dtype and shape.

        Args:
            name: native name.
            dtypes: allowed safetensors dtypes.
            shape: expected shape; [1] is accepted for [].
            hint: sentence added when the shape is wrong.
            if_turned: rule that is broken when the shape is right but for the order of its two dimensions.

        Returns:
            True when it is there and as expected; otherwise a problem has been taken down.
        """
        self.claim(name)
        said = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in self:
            self.problem("tensor-missing", name, f"{name}: missing, expected {said}.", REDO, allowed=said)
            return False
        source = self._sources[name]
        info = self.infos[source.name]
        if source.expert is not None:
            shape = (self.num_experts, source.num_parts * shape[0], *shape[1:])
            said = f"{' or '.join(dtypes)} {list(shape)}"
        if info.dtype not in dtypes or (info.shape != shape and not (shape == () and info.shape == (1,))):
            rule = "tensor-dtype" if info.dtype not in dtypes else "tensor-shape"
            if info.shape != shape and len(shape) == 2 and info.shape == shape[::-1]:
                rule = if_turned
                stored_so = "[out, in / block]" if if_turned == SCALES_TRANSPOSED else "[out, in]"
                hint = f"It looks transposed. {hint or f'It must be stored {stored_so}.'}"
            elif info.shape == shape and if_turned == SCALES_TRANSPOSED:
                rule = "scale-dtype"
            text = f"{self.label(name)}: {info}, expected {said}."
            self.problem(rule, source.name, text, (hint or REDO).rstrip(), got=str(info), allowed=said)
            return False
        return True

    def refuse_unclaimed(self) -> None:
        """Take down a problem for every tensor nobody has claimed."""
        for name in self.unclaimed():
            hint = next((text for suffix, text in _HINTS.items() if name.endswith(suffix)), "")
            module, _, leaf = name.rpartition(".")
            codes = self.codes_name(module)
            if not hint and leaf != "weight" and codes in self:
                hint = f"{self.label(codes)} is {self.dtype(codes)}, which has no such part."
            hint = hint or "Remove it from the checkpoint, or use the config.json that belongs to the weights."
            text = f"{self.label(name)}: unknown tensor {self.info(name)}."
            self.problem("tensor-unknown", self.stored_name(name), text, hint, got=str(self.info(name)))

    def detect(self, module: str, shape: tuple[int, int]) -> Format | None:
        """Decide the format of one weight, claim its tensors and check them.

        Args:
            module: native name without ".weight".
            shape: logical [N, K].

        Returns:
            The format, or None when a problem has been taken down.
        """
        codes, num_problems = self.codes_name(module), len(self._problems)
        if codes not in self:
            said = f"{list(shape)} in any format"
            self.problem("tensor-missing", codes, f"{codes}: missing, expected {said}.", REDO, allowed=said)
            for leaf in COMPANIONS:
                self.claim(f"{module}.{leaf}")
            return None
        dtype = self.dtype(codes)
        is_packed = codes.endswith(".weight_packed")
        if dtype in FLOATS and not is_packed:
            found = Format.PLAIN
            self.expect(codes, FLOATS, shape)
        elif dtype == "F8_E4M3" and not is_packed:
            found = Format.FP8
            self._expect_fp8(module, shape)
        elif dtype in _PACKED:
            found = self._expect_fp4(module, shape)
        else:
            self.claim(codes)
            text = (
                f"{self.label(codes)}: dtype {dtype}; readable are BF16, F32, F8_E4M3 with block scales and packed FP4."
            )
            remedy = _INTEGER_PACKED if is_packed else "Convert it to one of these."
            self.problem("tensor-dtype", self.stored_name(codes), text, remedy, got=dtype)
            return None
        return found if len(self._problems) == num_problems else None

    def _expect_fp8(self, module: str, shape: tuple[int, int]) -> None:
        weight = f"{module}.weight"
        num_rows, num_columns = shape
        self.expect(weight, ("F8_E4M3",), shape)
        scales = self.scales_name(module, Format.FP8)
        hint = "" if scales.endswith(".scale") else "FP8 weights must have one scale per 128 x 128 block."
        dtypes = _BLOCK_SCALES if scales.endswith(".weight_scale") else (*_E8M0, "F32")
        blocks = (-(-num_rows // 128), -(-num_columns // 128))
        self.expect(scales, dtypes, blocks, hint=hint, if_turned=SCALES_TRANSPOSED)
        if self._sources[weight].num_parts > 1 and num_rows % 128:
            text = f"{self.label(weight)}: FP8 blocks of 128 rows straddle gate and up ({num_rows} rows each)."
            self.problem("tensor-shape", self.stored_name(weight), text, "Export the experts one by one.")

    def _expect_fp4(self, module: str, shape: tuple[int, int]) -> Format:
        codes = self.codes_name(module)
        is_packed = codes.endswith(".weight_packed")
        num_rows, num_columns = shape
        weight_scale = f"{module}.weight_scale"
        if is_packed:
            is_nvfp4 = f"{module}.weight_global_scale" in self or (
                weight_scale not in self or self.dtype(weight_scale) not in _E8M0
            )
        else:
            is_nvfp4 = weight_scale in self or f"{module}.weight_scale_2" in self
        block = 16 if is_nvfp4 else 32
        if num_columns % block:
            text = f"{self.label(codes)}: packed FP4, but K ({num_columns}) is not a multiple of {block}."
            self.problem("tensor-shape", self.stored_name(codes), text)
        hint = "Codes must be packed along K, two columns in a byte."
        if self.info(codes).shape == (num_rows // 2, num_columns) and self._sources[codes].expert is None:
            self.claim(codes)
            text = f"{self.label(codes)}: {self.info(codes)}, expected {' or '.join(_PACKED)} "
            text += f"{[num_rows, num_columns // 2]}."
            is_turned = (num_rows // 2, num_columns) == (num_columns // 2, num_rows)
            remedy = f"It looks transposed. {hint}" if is_turned else f"It looks packed along N. {hint}"
            got, allowed = str(self.info(codes)), str([num_rows, num_columns // 2])
            self.problem(CODES_TURNED, self.stored_name(codes), text, remedy, got=got, allowed=allowed)
        else:
            self.expect(codes, _PACKED, (num_rows, num_columns // 2), hint=hint, if_turned=CODES_TURNED)
        if not is_nvfp4:
            scales = self.scales_name(module, Format.MXFP4)
            self.expect(scales, _E8M0, (num_rows, num_columns // 32), if_turned=SCALES_TRANSPOSED)
            return Format.MXFP4
        self.expect(weight_scale, ("F8_E4M3",), (num_rows, num_columns // 16), if_turned=SCALES_TRANSPOSED)
        tensor_scale, input_scale = (
            ("weight_global_scale", "input_global_scale") if is_packed else ("weight_scale_2", "input_scale")
        )
        self.expect(f"{module}.{tensor_scale}", ("F32",), ())
        if f"{module}.{input_scale}" in self:
            self.expect(f"{module}.{input_scale}", ("F32",), ())
        return Format.NVFP4


def dspark_shape(stored: StoredHeaders, config: ModelConfig, num_stages: int) -> DSparkDraft:
    """Return the shape of a DSpark draft as its tensors say, and as config.json says where they are silent."""
    projection = _first_shape(stored, "main_proj.weight", num_stages)
    table = _first_shape(stored, "markov_head.markov_w1.weight", num_stages)
    num_targets, rest = divmod(projection[1], config.hidden_size) if len(projection) == 2 else (0, 0)
    said = config.dspark
    if rest or not num_targets:
        num_targets = len(said.target_layer_ids) if said else 1
    rank = table[1] if len(table) == 2 else said.markov_rank if said else 1
    return DSparkDraft(num_stages, num_targets, rank)


def _first_shape(stored: StoredHeaders, leaf: str, num_stages: int) -> tuple[int, ...]:
    names = (f"mtp.{stage}.{leaf}" for stage in range(num_stages))
    return next((stored.info(name).shape for name in names if name in stored), ())
