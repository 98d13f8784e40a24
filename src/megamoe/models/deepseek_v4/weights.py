# SPDX-License-Identifier: Apache-2.0
"""The weights of a DeepSeek-V4, loaded from a checkpoint in any of its layouts.

Loading has three steps, and each refuses everything it finds in one error: names, dtypes and shapes from the headers
alone (before a large tensor is touched); scales; values. Nothing is dropped by a name filter: a tensor is used, listed
in `ModelWeights.unused_draft`, or refused as unknown.

Numerics   containers keep the stored codes and scales. MXFP4 becomes NVFP4 with codes copied, block by block equal, or
           is refused; w1 and w3 of an expert get one tensor scale in common when both are MXFP4, and otherwise keep
           their own. With dequantize=True every weight is a plain tensor holding the stored values.
Layout     on a device whose kernels take NVFP4 weights in another order, each weight is brought into it as soon as it
           is there, an expert at a time, and its row-major copy let go: the peak is the model and one weight or stack.
Stacks     weights of one layer that multiply the same input lie under each other where their formats allow it
           (stacked.py), and the parts are views of the stack.
FP32       hyper-connection parameters, attn_sink, ape and gate.bias are FP32 whatever they are stored in.
Draft      which draft there is, the tensors say. Classic MTP stages and DSpark stages (0731, 0813 releases) are loaded.
           DSpark stages whose dspark_* keys config.json lacks cannot be run and are listed as unused, like the norms
           of a stage that lost all its linears.
           num_nextn_predict_layers is not believed: re-saved checkpoints keep it after dropping the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megamoe.checkpoint.headers import ITEM_BYTES
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.mxfp4 import mxfp4_to_nvfp4, shared_top_exponent
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.claims import Claims, claim_tensors
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.examine import Examined
from megamoe.models.deepseek_v4.inventory import Role
from megamoe.models.deepseek_v4.layout import Format, StoredHeaders, dspark_shape
from megamoe.models.deepseek_v4.names import native_name
from megamoe.models.deepseek_v4.observed import Observed, check_draft
from megamoe.models.deepseek_v4.rules import RULES, Level, refusal
from megamoe.models.deepseek_v4.samples import differing_copy, original_of
from megamoe.models.deepseek_v4.stacked import LinearWeight, rows_of, stack_rows
from megamoe.models.deepseek_v4.stored import StoredTensors


@dataclasses.dataclass(frozen=True, eq=False)
class CompressorWeights:
    """A compressor: coff is 2 where windows overlap (CSA and the indexer), else 1.

    Attributes:
        wkv: [coff * C, D].
        wgate: [coff * C, D].
        ape: [ratio, coff * C] fp32.
        norm: [C].
    """

    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    norm: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class IndexerWeights:
    """An indexer.

    Attributes:
        wq_b: [index heads * index channels, q_lora].
        weights_proj: [index heads, D].
        compressor: makes the index keys.
    """

    wq_b: LinearWeight
    weights_proj: torch.Tensor
    compressor: CompressorWeights


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Attention of one layer.

    Attributes:
        wq_a: [q_lora, D].
        q_norm: [q_lora].
        wq_b: [H * C, q_lora].
        wkv: [C, D].
        kv_norm: [C].
        wo_a: [G, o_lora, H * C / G].
        wo_b: [D, G * o_lora].
        sink: [H] fp32.
        compressor: in CSA and HCA layers.
        indexer: in CSA layers.
        wq_a_wkv: wq_a over wkv, or None where their formats do not stack.
        wq_b_both: wq_b over the indexer's wq_b in CSA layers, or None likewise.
        compressed: in CSA and HCA layers, all that gives fp32 of the layer's input: wkv over wgate of the compressor,
            the same of the index compressor, weights_proj.
    """

    wq_a: LinearWeight
    q_norm: torch.Tensor
    wq_b: LinearWeight
    wkv: LinearWeight
    kv_norm: torch.Tensor
    wo_a: LinearWeight
    wo_b: LinearWeight
    sink: torch.Tensor
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None
    wq_a_wkv: LinearWeight | None = None
    wq_b_both: LinearWeight | None = None
    compressed: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class MoeWeights:
    """Mixture of experts of one layer; w1, w3 and w2 are of the same type.

    Attributes:
        gate: [E, D].
        bias: [E] fp32, or None in hash-routed layers.
        expert_table: [V, A] int64 in hash-routed layers, else None.
        w1: [E, F, D], gate.
        w3: [E, F, D], up.
        w2: [E, D, F], down.
        shared_w1: [F, D].
        shared_w3: [F, D].
        shared_w2: [D, F].
    """

    gate: torch.Tensor
    bias: torch.Tensor | None
    expert_table: torch.Tensor | None
    w1: LinearWeight
    w3: LinearWeight
    w2: LinearWeight
    shared_w1: LinearWeight
    shared_w3: LinearWeight
    shared_w2: LinearWeight


@dataclasses.dataclass(frozen=True, eq=False)
class HyperConnectionWeights:
    """One set of hyper-connection parameters, all fp32: M = (2 + X) * X in a block, X at the head.

    Attributes:
        fn: [M, X * D].
        base: [M].
        scale: [3] in a block, [1] at the head.
    """

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class BlockWeights:
    """One layer.

    Attributes:
        attn_norm: [D].
        ffn_norm: [D].
        hc_attn: streams around attention.
        hc_ffn: streams around the experts.
        attention: attention.
        moe: experts.
    """

    attn_norm: torch.Tensor
    ffn_norm: torch.Tensor
    hc_attn: HyperConnectionWeights
    hc_ffn: HyperConnectionWeights
    attention: AttentionWeights
    moe: MoeWeights


@dataclasses.dataclass(frozen=True, eq=False)
class MtpWeights:
    """One classic multi-token-prediction stage.

    Attributes:
        block: a sliding-window layer.
        enorm: [D], norm of the embedding.
        hnorm: [D], norm of the streams.
        norm: [D], before the head.
        e_proj: [D, D].
        h_proj: [D, D].
        hc_head: collapses the streams.
    """

    block: BlockWeights
    enorm: torch.Tensor
    hnorm: torch.Tensor
    norm: torch.Tensor
    e_proj: LinearWeight
    h_proj: LinearWeight
    hc_head: HyperConnectionWeights


@dataclasses.dataclass(frozen=True, eq=False)
class DSparkWeights:
    """A DSpark draft: N target layers, rank R.

    Attributes:
        stages: sliding-window layers, run one after the other.
        main_proj: [D, N * D], of the target layers' outputs side by side.
        main_norm: [D], after main_proj.
        norm: [D], before the head.
        hc_head: collapses the streams of the last stage.
        markov_w1: [V, R], by the token before.
        markov_w2: [V, R], by the token drafted.
        confidence: [1, D + R].
    """

    stages: tuple[BlockWeights, ...]
    main_proj: LinearWeight
    main_norm: torch.Tensor
    norm: torch.Tensor
    hc_head: HyperConnectionWeights
    markov_w1: torch.Tensor
    markov_w2: torch.Tensor
    confidence: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ModelWeights:
    """All weights.

    Attributes:
        embed: [V, D].
        head: [V, D].
        norm: [D].
        hc_head: collapses the streams.
        blocks: one per backbone layer.
        mtp: classic draft stages; empty when the checkpoint has none.
        dspark: the DSpark draft, or None.
        unused_draft: native names of draft tensors that are recognized and not used: DSpark stages without dspark_*
            keys; what is left of a stage whose linears were all stripped; a draft's copies of the embedding and the
            head (proved equal to the originals).
        input_scales: calibrated activation scales (amax / 2688, multiplies) by weight, as stored. Experts that
            calibration never reached may carry values near zero.
        formats: native name → how the checkpoint stores a weight, for every weight that may be quantized.
        num_relaid: NVFP4 matrices that were brought into the order a kernel takes, once; 0 where it is the stored one.
    """

    embed: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    hc_head: HyperConnectionWeights
    blocks: tuple[BlockWeights, ...]
    mtp: tuple[MtpWeights, ...]
    dspark: DSparkWeights | None
    unused_draft: tuple[str, ...]
    input_scales: Mapping[str, float]
    formats: Mapping[str, Format]
    num_relaid: int


def load_weights(
    reader: CheckpointReader,
    config: ModelConfig,
    *,
    dequantize: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Load all weights.

    Args:
        reader: open checkpoint; may be closed afterwards, nothing refers to its files.
        config: from the same checkpoint.
        dequantize: True: every weight becomes a plain tensor of `dtype` with the stored values (rounded once when
            `dtype` is narrower). False: quantized weights stay in their containers and plain ones in their stored
            dtype, and `dtype` says nothing.
        dtype: fp32 or bf16.
        device: where the weights go.

    Returns:
        The weights, contiguous, block scales row-major.

    Raises:
        CheckpointError: a tensor is missing, unknown, stored twice, misshapen, of the wrong dtype or damaged, or an
            MXFP4 weight has no equal in NVFP4. All offenders of the step that failed are listed.
        ValueError: dtype is not as above.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"load_weights: dtype must be torch.float32 or torch.bfloat16; got {dtype}.")
    return WeightLoader(reader, config, dequantize=dequantize, dtype=dtype, device=device).load()


class WeightLoader:
    """`load_weights` in two steps, so that what the headers say can be looked at before the weights are loaded.

    Attributes:
        formats: native name → how a weight is stored, for every weight that may be quantized and would be loaded.
        num_mtp: classic draft stages that would be loaded.
        num_dspark: DSpark stages that would be loaded.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: ModelConfig,
        *,
        dequantize: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        examined: Examined | None = None,
    ) -> None:
        """Check names, dtypes and shapes; arguments and errors are those of `load_weights`.

        With `examined`, what the examination of the checkpoint found out is used, and it must not have been refused.
        """
        natives = None if examined is None else examined.natives
        stored = StoredTensors(reader, config.n_routed_experts, natives)
        claims = claim_stored(stored, config) if examined is None else examined.claims
        assert claims is not None
        self._loader = _Loader(stored, claims, config, dtype if dequantize else None, device)
        self.num_mtp, self.num_dspark = claims.num_mtp, claims.num_dspark
        self._loader.check_stacks()
        self._loader.stop_if_refused()
        self.formats: Mapping[str, Format] = types.MappingProxyType(dict(claims.formats))

    def load(self, layouts: Mapping[str, CodeLayout] | None = None) -> ModelWeights:
        """Check scales, then load.

        Args:
            layouts: "linear", "grouped" or "experts" → order of such NVFP4 weights; row-major where nothing is said.
        """
        loader = self._loader
        loader.layouts = layouts or {}
        check_copies(loader.stored, self._loader.claims.copies)
        loader.check_scales()
        loader.stop_if_refused()
        weights = loader.build(self.num_mtp, self.num_dspark)
        loader.stop_if_refused()
        if torch.device(loader.device).type == "cuda":  # fragments and stacks were made there
            # Kernels may read a weight before the launch ahead of theirs has ended; from here on it is there.
            torch.cuda.synchronize(loader.device)
        return weights


def bytes_when_loaded(stored: StoredHeaders, claims: Claims, dtype: torch.dtype | None) -> int:
    """Return the bytes that loaded weights take.

    Args:
        stored: a checkpoint's tensors.
        claims: which of them are loaded.
        dtype: what weights are dequantized to, None where they stay in their containers.
    """
    total = 0
    for entry in claims.loaded:
        count = math.prod(entry.shape)
        found = claims.formats.get(entry.name)
        if entry.role is Role.TABLE:
            total += 8 * count
        elif entry.role is Role.FLOAT32:
            total += 4 * count
        elif dtype is not None:
            total += dtype.itemsize * count
        elif found is None or found is Format.PLAIN:
            name = entry.name if found is None else stored.codes_name(entry.name)
            total += ITEM_BYTES[stored.dtype(name)] * count
        elif found is Format.FP8:
            total += count + 4 * -(-count // 128**2)
        else:  # MXFP4 becomes NVFP4
            total += count // 2 + count // 16 + 4
    return total


def claim_stored(stored: StoredTensors, config: ModelConfig) -> Claims:
    """Claim all tensors of a checkpoint that nobody has examined; what is wrong is taken down in `stored`."""
    infos = stored.infos
    draft = Observed(infos, {name: native_name(name) for name in infos}, ()).draft()
    shape = dspark_shape(stored, config, draft.num_dspark) if draft.num_dspark else None
    for problem in check_draft(draft, shape, config):
        if RULES[problem.rule].level is Level.REFUSED:
            stored.take_down(problem)
    return claim_tensors(stored, config, draft)


def check_copies(stored: StoredTensors, names: Iterable[str]) -> None:
    """Take down every copy of the embedding or the head in a draft that is not the same tensor."""
    for name in names:
        if original_of(name) not in stored:
            continue
        copy, first = stored.read(name), stored.read(original_of(name))
        if copy.dtype != first.dtype or not torch.equal(copy, first):
            stored.take_down(differing_copy(stored, name))


class Assembler:
    """Puts a model's weights together; where a weight comes from is a subclass's business.

    Attributes:
        config: of the model.
    """

    config: ModelConfig

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that is never quantized, in `dtype` if that is given."""
        raise NotImplementedError

    def table(self, name: str) -> torch.Tensor:
        """Return a table of integers as int64."""
        raise NotImplementedError

    def linear(self, module: str) -> LinearWeight:
        """Return a linear's weight [N, K]."""
        raise NotImplementedError

    def grouped(self, module: str) -> LinearWeight:
        """Return a weight [G * N, K] as [G, N, K]."""
        raise NotImplementedError

    def experts(self, prefix: str) -> tuple[LinearWeight, LinearWeight, LinearWeight]:
        """Return w1, w3, w2 of all experts, stacked."""
        raise NotImplementedError

    def mtp(self, prefix: str) -> MtpWeights:
        return MtpWeights(
            block=self.block(prefix, LayerKind.SWA, False),
            enorm=self.plain(f"{prefix}.enorm.weight"),
            hnorm=self.plain(f"{prefix}.hnorm.weight"),
            norm=self.plain(f"{prefix}.norm.weight"),
            e_proj=self.linear(f"{prefix}.e_proj"),
            h_proj=self.linear(f"{prefix}.h_proj"),
            hc_head=self.hyper_connection(f"{prefix}.hc_head"),
        )

    def dspark(self, num_stages: int) -> DSparkWeights:
        last = f"mtp.{num_stages - 1}"
        return DSparkWeights(
            stages=tuple(self.block(f"mtp.{stage}", LayerKind.SWA, False) for stage in range(num_stages)),
            main_proj=self.linear("mtp.0.main_proj"),
            main_norm=self.plain("mtp.0.main_norm.weight"),
            norm=self.plain(f"{last}.norm.weight"),
            hc_head=self.hyper_connection(f"{last}.hc_head"),
            markov_w1=self.plain(f"{last}.markov_head.markov_w1.weight"),
            markov_w2=self.plain(f"{last}.markov_head.markov_w2.weight"),
            confidence=self.plain(f"{last}.confidence_head.proj.weight"),
        )

    def block(self, prefix: str, kind: LayerKind, hash_routed: bool) -> BlockWeights:
        return BlockWeights(
            attn_norm=self.plain(f"{prefix}.attn_norm.weight"),
            ffn_norm=self.plain(f"{prefix}.ffn_norm.weight"),
            hc_attn=self.hyper_connection(f"{prefix}.hc_attn"),
            hc_ffn=self.hyper_connection(f"{prefix}.hc_ffn"),
            attention=self.attention(f"{prefix}.attn", kind),
            moe=self.moe(f"{prefix}.ffn", hash_routed),
        )

    def attention(self, prefix: str, kind: LayerKind) -> AttentionWeights:
        indexer = None
        if kind is LayerKind.CSA:
            indexer = IndexerWeights(
                wq_b=self.linear(f"{prefix}.indexer.wq_b"),
                weights_proj=self.plain(f"{prefix}.indexer.weights_proj.weight"),
                compressor=self.compressor(f"{prefix}.indexer.compressor"),
            )
        weights = AttentionWeights(
            wq_a=self.linear(f"{prefix}.wq_a"),
            q_norm=self.plain(f"{prefix}.q_norm.weight"),
            wq_b=self.linear(f"{prefix}.wq_b"),
            wkv=self.linear(f"{prefix}.wkv"),
            kv_norm=self.plain(f"{prefix}.kv_norm.weight"),
            wo_a=self.grouped(f"{prefix}.wo_a"),
            wo_b=self.linear(f"{prefix}.wo_b"),
            sink=self.plain(f"{prefix}.attn_sink", torch.float32),
            compressor=None if kind is LayerKind.SWA else self.compressor(f"{prefix}.compressor"),
            indexer=indexer,
        )
        return stacked_attention(weights)

    def compressor(self, prefix: str) -> CompressorWeights:
        return CompressorWeights(
            wkv=self.plain(f"{prefix}.wkv.weight"),
            wgate=self.plain(f"{prefix}.wgate.weight"),
            ape=self.plain(f"{prefix}.ape", torch.float32),
            norm=self.plain(f"{prefix}.norm.weight"),
        )

    def hyper_connection(self, prefix: str) -> HyperConnectionWeights:
        fn, base, scale = (self.plain(f"{prefix}_{part}", torch.float32) for part in ("fn", "base", "scale"))
        return HyperConnectionWeights(fn, base, scale)

    def moe(self, prefix: str, hash_routed: bool) -> MoeWeights:
        w1, w3, w2 = self.experts(f"{prefix}.experts")
        return MoeWeights(
            gate=self.plain(f"{prefix}.gate.weight"),
            bias=None if hash_routed else self.plain(f"{prefix}.gate.bias", torch.float32),
            expert_table=self.table(f"{prefix}.gate.tid2eid") if hash_routed else None,
            w1=w1,
            w3=w3,
            w2=w2,
            shared_w1=self.linear(f"{prefix}.shared_experts.w1"),
            shared_w3=self.linear(f"{prefix}.shared_experts.w3"),
            shared_w2=self.linear(f"{prefix}.shared_experts.w2"),
        )


class _Loader(Assembler):
    """Checks, then builds; `dtype` is None where containers are kept."""

    def __init__(
        self,
        stored: StoredTensors,
        claims: Claims,
        config: ModelConfig,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        self.stored = stored
        self.claims = claims
        self.config = config
        self.dtype = dtype
        self.device = device
        self.formats = claims.formats
        self.input_scales: dict[str, float] = {}
        self.layouts: Mapping[str, CodeLayout] = {}
        self.num_relaid = 0

    def stop_if_refused(self) -> None:
        if self.stored.problems:
            raise refusal(f"checkpoint {self.stored.reader.directory}", self.stored.problems)

    # Step 1: headers.

    def check_stacks(self) -> None:
        stacks: dict[str, list[str]] = {}
        for entry in self.claims.loaded:
            if entry.role is Role.EXPERT:
                stacks.setdefault(entry.name.rsplit(".", 2)[0], []).append(entry.name)
        for prefix, modules in stacks.items():
            self.check_stack(prefix, [module for module in modules if module in self.formats])
        num_rows = self.config.o_lora_rank
        for module, found in self.formats.items():
            is_grouped = module.endswith(".wo_a") and found is Format.FP8 and self.dtype is None
            if is_grouped and not fits_fp8_groups(num_rows):
                text = f"{module}: FP8 blocks of {fp8.BLOCK} rows lie across groups of {num_rows} (o_lora_rank)."
                self.stored.problem("not-exact", module, text, "Load with recipe 'exact', or convert it to bf16.")

    def check_stack(self, prefix: str, modules: list[str]) -> None:
        """Refuse experts of one layer whose formats cannot be stacked; FP4 formats can."""
        if self.dtype is not None:
            return
        kinds: dict[str, str] = {}
        for module in modules:
            kinds.setdefault(self.stored.stack_kind(module, self.formats[module]), module)
        if len(kinds) > 1:
            said = ", ".join(f"{module} is {kind}" for kind, module in kinds.items())
            text = f"{prefix}: experts of one layer must share a format: {said}."
            self.stored.problem("experts-mixed", prefix, text, "Convert them alike.")

    # Step 2: scales and tables.

    def check_scales(self) -> None:
        for entry in self.claims.loaded:
            if entry.name in self.formats:
                self.stored.check_scales(entry.name, self.formats[entry.name])
                input_scale = self.stored.input_scale(entry.name)
                if input_scale is not None:
                    self.input_scales[entry.name] = input_scale
            elif entry.role is Role.TABLE:
                self.check_table(entry.name)

    def check_table(self, name: str) -> None:
        table = self.stored.read(name)
        bad = (table < 0) | (table >= self.config.n_routed_experts)
        if bool(bad.any()):
            token, slot = (int(index) for index in bad.nonzero()[0])
            text = (
                f"{self.stored.label(name)}: expert {int(table[token, slot])} at [{token}, {slot}] "
                f"({int(bad.sum())} such entries); experts are 0 to {self.config.n_routed_experts - 1}."
            )
            remedy = "Use the config.json that belongs to the weights."
            self.stored.problem("expert-table", self.stored.stored_name(name), text, remedy)

    # Step 3: values.

    def build(self, num_mtp: int, num_dspark: int) -> ModelWeights:
        return ModelWeights(
            embed=self.plain("embed.weight"),
            head=self.plain("head.weight"),
            norm=self.plain("norm.weight"),
            hc_head=self.hyper_connection("hc_head"),
            blocks=tuple(
                self.block(f"layers.{layer}", kind, hash_routed)
                for layer, (kind, hash_routed) in enumerate(
                    zip(self.config.layer_kinds, self.config.hash_routed, strict=True)
                )
            ),
            mtp=tuple(self.mtp(f"mtp.{stage}") for stage in range(num_mtp)),
            dspark=self.dspark(num_dspark) if num_dspark else None,
            unused_draft=self.claims.unused,
            input_scales=types.MappingProxyType(self.input_scales),
            formats=types.MappingProxyType(dict(self.formats)),
            num_relaid=self.num_relaid,
        )

    def own(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a contiguous copy that no longer refers to the file, on the device."""
        copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=self.device)
        copy.copy_(tensor)
        return copy

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a plain tensor in `dtype`, else in the asked dtype when dequantizing, else as stored."""
        self.stored.finite(name)
        return self.own(self.stored.read(name), dtype or self.dtype)

    def table(self, name: str) -> torch.Tensor:
        return self.own(self.stored.read(name), torch.int64)

    def linear(self, module: str) -> LinearWeight:
        if self.dtype is not None:
            return self.own(self.values(module, self.dtype))
        found = self.formats[module]
        if found is Format.FP8:
            self.stored.finite(f"{module}.weight")
            weight = self.stored.fp8(module)
            return Fp8BlockTensor(self.own(weight.codes), self.own(weight.scales))
        if found is Format.PLAIN:
            return self.plain(f"{module}.weight")
        return self.own_nvfp4(self.fp4(module), "linear")

    def values(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the stored values of a weight as a plain tensor."""
        found = self.formats[module]
        if found is Format.NVFP4:
            return nvfp4.dequantize(self.stored.nvfp4(module), dtype)
        if found is Format.MXFP4:
            return mxfp4.dequantize(self.stored.mxfp4(module), dtype)
        if not self.stored.finite(f"{module}.weight"):
            return torch.zeros(self.stored.read(f"{module}.weight").shape)  # refused when the step ends
        if found is Format.FP8:
            return fp8.dequantize(self.stored.fp8(module), dtype)
        return self.stored.read(f"{module}.weight").to(dtype)

    def grouped(self, module: str) -> LinearWeight:
        """Return [G * N, K] as [G, N, K]."""
        num_groups, found = self.config.o_groups, self.formats[module]
        if self.dtype is None and found in (Format.NVFP4, Format.MXFP4):
            weight = self.fp4(module)
            codes, scales = weight.codes, weight.scales
            groups = NvFp4Tensor(
                codes.view(num_groups, -1, codes.shape[-1]),
                scales.view(num_groups, -1, scales.shape[-1]),
                weight.tensor_scale.repeat(num_groups),
            )
            return self.own_nvfp4(groups, "grouped")
        if self.dtype is None and found is Format.FP8:
            self.stored.finite(f"{module}.weight")
            whole = self.stored.fp8(module)
            return fp8_groups(Fp8BlockTensor(self.own(whole.codes), self.own(whole.scales)), num_groups)
        values = self.values(module, self.dtype or self.stored.read(f"{module}.weight").dtype)
        return self.own(values).view(num_groups, -1, values.shape[-1])

    def fp4(self, module: str, partner: str | None = None) -> NvFp4Tensor:
        """Return an FP4 weight as NVFP4; MXFP4 keeps its codes and shares the tensor scale of an MXFP4 partner."""
        if self.formats[module] is Format.NVFP4:
            return self.stored.nvfp4(module)
        weight = self.stored.mxfp4(module)
        is_pair = partner is not None and self.formats[partner] is Format.MXFP4
        top = shared_top_exponent(weight, self.stored.mxfp4(partner)) if partner and is_pair else None
        converted, exact = mxfp4_to_nvfp4(weight, top_exponent=top)
        if not bool(exact.all()):
            first = [int(index) for index in (~exact).nonzero()[0]]
            name = self.stored.codes_name(module)
            text = (
                f"{self.stored.label(name)}: MXFP4 block {first} has no equal in NVFP4 "
                f"({int((~exact).sum())} of {exact.numel()} blocks): scales"
                f"{f' of it and of {partner}' if is_pair else ''} span more than 2^17."
            )
            remedy = "Load with dequantize=True (recipe 'exact')."
            self.stored.problem("not-exact", self.stored.stored_name(name), text, remedy)
        return converted

    def own_nvfp4(self, weight: NvFp4Tensor, kind: str) -> NvFp4Tensor:
        """Return a copy on the device, in the order in which kernels take such weights there."""
        if self.is_relaid(kind):
            return self.relay(weight)
        return NvFp4Tensor(self.own(weight.codes), self.own(weight.scales), self.own(weight.tensor_scale))

    def is_relaid(self, kind: str) -> bool:
        return self.layouts.get(kind) is CodeLayout.FRAGMENT_16X64

    def relay(self, weight: NvFp4Tensor) -> NvFp4Tensor:
        """Return a weight on the device in fragment order; the conversion runs there."""
        self.num_relaid += weight.tensor_scale.numel()
        owned = NvFp4Tensor(self.own(weight.codes), self.own(weight.scales), self.own(weight.tensor_scale))
        return owned.fragments()

    def experts(self, prefix: str) -> tuple[LinearWeight, LinearWeight, LinearWeight]:
        """Return w1, w3, w2 of all experts, stacked."""
        w1, w3, w2 = (
            self.stack(
                [f"{prefix}.{expert}.{name}" for expert in range(self.config.n_routed_experts)],
                {"w1": "w3", "w3": "w1"}.get(name),
            )
            for name in ("w1", "w3", "w2")
        )
        return w1, w3, w2

    def stack(self, modules: list[str], partner: str | None) -> LinearWeight:
        formats = {self.formats[module] for module in modules}
        if self.dtype is not None or formats == {Format.PLAIN}:
            dtype = self.dtype or self.stored.read(f"{modules[0]}.weight").dtype
            return self.stacked((self.values(module, dtype) for module in modules), len(modules))
        if formats == {Format.FP8}:
            for module in modules:
                self.stored.finite(f"{module}.weight")
            blocks = [self.stored.fp8(module) for module in modules]
            return Fp8BlockTensor(
                self.stacked((block.codes for block in blocks), len(blocks)),
                self.stacked((block.scales for block in blocks), len(blocks)),
            )
        parts = (self.fp4(module, partner and f"{module.rsplit('.', 1)[0]}.{partner}") for module in modules)
        return self.stacked_nvfp4(parts, len(modules))

    def stacked_nvfp4(self, parts: Iterable[NvFp4Tensor], count: int) -> NvFp4Tensor:
        """Return NVFP4 weights of one shape stacked on the device, holding one at a time besides the stack."""
        stack: NvFp4Tensor | None = None
        for index, part in enumerate(parts):
            if self.is_relaid("experts"):
                part = self.relay(part)
            if stack is None:
                empty = [torch.empty((count, *one.shape), dtype=one.dtype, device=self.device) for one in _parts(part)]
                stack = dataclasses.replace(part, codes=empty[0], scales=empty[1], tensor_scale=empty[2])
            for whole, one in zip(_parts(stack), _parts(part), strict=True):
                whole[index].copy_(one)
        assert stack is not None
        return stack

    def stacked(self, parts: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        """Return tensors of one shape and dtype stacked on the device, holding one at a time besides the stack."""
        stack: torch.Tensor | None = None
        for index, part in enumerate(parts):
            if stack is None:
                stack = torch.empty((count, *part.shape), dtype=part.dtype, device=self.device)
            stack[index].copy_(part)
        assert stack is not None
        return stack


def fits_fp8_groups(num_rows: int) -> bool:
    """Return whether groups of N rows can have FP8 blocks of their own: no block lies across two of another size."""
    return num_rows % fp8.BLOCK == 0 or fp8.BLOCK % num_rows == 0


def fp8_groups(weight: Fp8BlockTensor, num_groups: int) -> Fp8BlockTensor:
    """Return [G * N, K] as [G, N, K], sharing codes; groups that share a block get its scale each."""
    num_rows = weight.shape[0] // num_groups
    blocks = torch.arange(0, weight.shape[0], min(num_rows, fp8.BLOCK), device=weight.device) // fp8.BLOCK
    scales = weight.scales.view(torch.uint8 if weight.scales.element_size() == 1 else weight.scales.dtype)
    shape = num_groups, -1, scales.shape[-1]
    return Fp8BlockTensor(
        weight.codes.view(num_groups, num_rows, -1), scales[blocks].view(shape).view(weight.scales.dtype)
    )


def stacked_attention(weights: AttentionWeights) -> AttentionWeights:
    """Return an attention layer's weights with those of one input stacked; the parts become views of the stacks."""
    replaced: dict[str, Any] = {}
    compressor, indexer = weights.compressor, weights.indexer
    if (stack := stack_rows([weights.wq_a, weights.wkv])) is not None:
        wq_a, wkv = rows_of(stack, [weights.wq_a.shape[0], weights.wkv.shape[0]])
        replaced |= {"wq_a_wkv": stack, "wq_a": wq_a, "wkv": wkv}
    if indexer is not None and (stack := stack_rows([weights.wq_b, indexer.wq_b])) is not None:
        wq_b, index_wq_b = rows_of(stack, [weights.wq_b.shape[0], indexer.wq_b.shape[0]])
        replaced |= {"wq_b_both": stack, "wq_b": wq_b}
        indexer = dataclasses.replace(indexer, wq_b=index_wq_b)
    if compressor is not None:
        parts = [compressor.wkv, compressor.wgate]
        if indexer is not None:
            parts += [indexer.compressor.wkv, indexer.compressor.wgate, indexer.weights_proj]
        if len({part.dtype for part in parts}) > 1:  # the values stay: fp32 holds every bf16
            parts = [part.float() for part in parts]
        whole = torch.cat(parts)
        wkv, wgate, *others = whole.split([part.shape[0] for part in parts])
        replaced |= {"compressed": whole, "compressor": dataclasses.replace(compressor, wkv=wkv, wgate=wgate)}
        if indexer is not None:
            index_wkv, index_wgate, weights_proj = others
            index_compressor = dataclasses.replace(indexer.compressor, wkv=index_wkv, wgate=index_wgate)
            indexer = dataclasses.replace(indexer, compressor=index_compressor, weights_proj=weights_proj)
    return dataclasses.replace(weights, indexer=indexer, **replaced)


def _parts(weight: NvFp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weight.codes, weight.scales, weight.tensor_scale
