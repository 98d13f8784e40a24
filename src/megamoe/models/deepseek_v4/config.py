# SPDX-License-Identifier: Apache-2.0
"""What config.json of a DeepSeek-V4 checkpoint means.

Two spellings are read. DeepSeek's own files give `compress_ratios` (0 sliding window only, 4 CSA, 128 HCA),
`num_hash_layers`, `qk_rope_head_dim` and `rope_scaling`; transformers re-saves them as `layer_types` with
`compress_rates`, `mlp_layer_types`, `partial_rotary_factor` and `rope_parameters`. Where a file has both they must say
the same. Nothing that changes the computation is guessed: a missing field, an unknown value or a contradiction is
refused, and all of them are listed in one error. transformers' fallback for absent `layer_types` matches no released
model and is therefore not used.

Formats of tensors are read from the tensors themselves (layout.py), never from `quantization_config` or `expert_dtype`;
what these declare is held against the tensors in declared.py.

Source     the config.json files of DeepSeek-V4-Flash and -Pro; transformers 5.24 `DeepseekV4Config`
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from megamoe.checkpoint.problem import CheckpointError
from megamoe.ops.yarn_scaling import YarnScaling

ARCHITECTURE = "DeepseekV4ForCausalLM"
_BELONGS = "Use the config.json that belongs to the weights."


class LayerKind(enum.Enum):
    """What a layer attends to besides its sliding window."""

    SWA = "sliding_attention"  # nothing
    CSA = "compressed_sparse_attention"  # compressed entries (overlapping windows) chosen by the indexer
    HCA = "heavily_compressed_attention"  # all compressed entries


_KIND_OF_RATIO = {0: LayerKind.SWA, 4: LayerKind.CSA, 128: LayerKind.HCA}

# Fields with one supported value. Absent means that value.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

# Fields that do not change the forward pass (training, bookkeeping) or are leftovers of a V3 template.
_IGNORED = frozenset(
    "_name_or_path attention_dropout auto_map aux_loss_alpha dtype ep_size expert_dtype initializer_range n_group "
    "output_router_logits pad_token_id pretraining_tp router_aux_loss_coef router_jitter_noise seq_aux topk_group "
    "torch_dtype transformers_version use_cache".split()
)

_INTEGERS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups o_lora_rank "
    "sliding_window max_position_embeddings index_n_heads index_head_dim index_topk moe_intermediate_size "
    "n_routed_experts num_experts_per_tok hc_mult hc_sinkhorn_iters".split()
)
_NUMBERS = "routed_scaling_factor swiglu_limit hc_eps rms_norm_eps".split()
_DSPARK = "dspark_block_size dspark_noise_token_id dspark_target_layer_ids dspark_markov_rank".split()
_ELSEWHERE = (
    "architectures bos_token_id compress_rates compress_ratios compress_rope_theta eos_token_id layer_types "
    "mlp_layer_types num_hash_layers num_nextn_predict_layers partial_rotary_factor qk_rope_head_dim "
    "quantization_config rope_parameters rope_scaling rope_theta".split()
)
_KNOWN = _IGNORED.union(_FIXED, _INTEGERS, _NUMBERS, _DSPARK, _ELSEWHERE)

# Beyond these a number is damage, not a size: nothing is allocated or counted to for it.
_LARGEST_INTEGER, _LARGEST_NUMBER = 2**40, 1e30
MAX_LAYERS, MAX_EXPERTS = 1024, 4096
_LARGEST = {"num_hidden_layers": MAX_LAYERS, "n_routed_experts": MAX_EXPERTS}

_YARN_KEYS = frozenset(
    "type rope_type factor beta_fast beta_slow original_max_position_embeddings attention_factor truncate "
    "rope_theta partial_rotary_factor".split()
)


@dataclasses.dataclass(frozen=True)
class DSparkConfig:
    """Shape of a DSpark draft (0731 and 0813 releases).

    Attributes:
        block_size: tokens drafted at once.
        noise_token_id: token that fills the places to draft.
        target_layer_ids: backbone layers whose outputs feed the draft.
        markov_rank: rank of the draft's token-to-token table.
    """

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V4; fields carry the names of config.json where it has one for them.

    Attributes:
        architecture: name in config.json's `architectures`.
        layer_kinds: one per backbone layer.
        ratios: tokens per compressed entry, one per backbone layer; 0 for SWA.
        hash_routed: one per backbone layer; True where experts are chosen by token id.
        qk_rope_head_dim: rotary channels, the last ones of a head.
        yarn: scaling of the compressed layers' rotary table, or None.
        num_nextn_predict_layers: what config.json claims; which draft there is, the tensors say.
        eos_token_ids: every id that ends a sequence.
        dspark: the DSpark draft's shape, or None.
        unused_keys: keys of config.json that this package does not know and does not use.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_kinds: tuple[LayerKind, ...]
    ratios: tuple[int, ...]
    hash_routed: tuple[bool, ...]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_nextn_predict_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dspark: DSparkConfig | None
    unused_keys: tuple[str, ...]

    @property
    def chat_release(self) -> str:
        """Which release's effort tiers the model was trained with (chat/protocol.py): DSpark came with the second."""
        return "preview" if self.dspark is None else "0731"


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Read config.json of a checkpoint directory.

    Raises:
        CheckpointError: the file is missing or not JSON, or `parse_config` refuses it.
    """
    return parse_config(load_raw_config(directory), where=str(pathlib.Path(directory) / "config.json"))


def load_raw_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read config.json of a checkpoint directory as it is.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"config: no file {path}. Pass a checkpoint's folder.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"config: {path} is not JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"config: {path} is not a JSON object. Download it again.")
    return raw


def parse_config(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Turn the content of config.json into a ModelConfig.

    Args:
        raw: the parsed JSON object, in DeepSeek's or transformers' spelling.
        where: what error messages call it.

    Raises:
        CheckpointError: a field is missing, has an unsupported value, or contradicts another; all are listed.
    """
    return _Parser(raw, where).parse()


class _Parser:
    """Reads fields and collects problems; a problem yields a harmless value so that parsing can go on."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.problems: list[str] = []

    def parse(self) -> ModelConfig:
        self.check_fixed()
        if self.problems:  # another architecture: its other fields would only add noise
            raise CheckpointError.listing(self.where, self.problems)
        sizes: dict[str, Any] = {name: self.integer(name) for name in _INTEGERS}
        numbers: dict[str, Any] = {name: self.number(name) for name in _NUMBERS}
        layer_kinds, ratios = self.layers(sizes["num_hidden_layers"])
        hash_routed = self.hash_layers(sizes["num_hidden_layers"])
        rope_theta, compress_rope_theta, yarn = self.rotary()
        config = ModelConfig(
            architecture=self.architecture(),
            **sizes,
            **numbers,
            layer_kinds=layer_kinds,
            ratios=ratios,
            hash_routed=hash_routed,
            qk_rope_head_dim=self.rope_dim(sizes["head_dim"]),
            rope_theta=rope_theta,
            compress_rope_theta=compress_rope_theta,
            yarn=yarn,
            num_nextn_predict_layers=self.integer("num_nextn_predict_layers", minimum=0, default=0),
            bos_token_id=self.token_ids("bos_token_id")[0] if self.token_ids("bos_token_id") else None,
            eos_token_ids=self.token_ids("eos_token_id"),
            dspark=self.dspark(),
            unused_keys=tuple(sorted(set(self.raw) - _KNOWN)),
        )
        self.check_sizes(config)
        if self.problems:
            raise CheckpointError.listing(self.where, self.problems)
        return config

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if name not in self.raw and default is None:
            self.problem(f"{name} is missing. {_BELONGS}")
            return minimum
        if isinstance(value, str):
            self.problem(f"{name} is the text {value!r}, not a number. Write it without quotes.")
            return minimum
        if type(value) is not int or value < minimum:
            self.problem(f"{name} is {value!r}; expected an integer of at least {minimum}.")
            return minimum
        largest = _LARGEST.get(name, _LARGEST_INTEGER)
        if value > largest:
            self.problem(f"{name} is {value}; expected an integer of at most {largest}.")
            return minimum
        return value

    def number(self, name: str, source: Mapping[str, Any] | None = None, label: str | None = None) -> float:
        label = label or name
        source = self.raw if source is None else source
        if name not in source:
            self.problem(f"{label} is missing. {_BELONGS}")
            return 1.0
        value = source[name]
        if isinstance(value, str):
            self.problem(f"{label} is the text {value!r}, not a number. Write it without quotes.")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_NUMBER:
            self.problem(f"{label} is {value!r}; expected a positive number.")
            return 1.0
        return float(value)

    def object(self, name: str, source: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return a JSON object, empty when absent or null."""
        value = (self.raw if source is None else source).get(name)
        if value is not None and not isinstance(value, dict):
            self.problem(f"{name} is {value!r}; expected an object.")
            return {}
        return value or {}

    def strings(self, name: str) -> list[str] | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.problem(f"{name} is {value!r}; expected a list of names.")
            return None
        return value

    def check_fixed(self) -> None:
        for name, allowed in _FIXED.items():
            value = self.raw.get(name, allowed)
            if type(value) is not type(allowed) or value != allowed:
                self.problem(f"{name} is {value!r}; this package computes {allowed!r} only.")

    def architecture(self) -> str:
        names = self.strings("architectures")
        if names is None or len(names) != 1:
            self.problem(f"architectures is {self.raw.get('architectures')!r}; expected one name in a list.")
            return ""
        if names[0] != ARCHITECTURE:
            self.problem(f"architectures names {names[0]!r}; implemented is {ARCHITECTURE!r}.")
        return names[0]

    def layers(self, count: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
        """Return kinds and ratios from whichever spelling is there; both must agree."""
        native, saved = self.native_layers(count), self.saved_layers(count)
        if native and saved and native != saved:
            self.problem("compress_ratios contradicts layer_types with compress_rates. Keep the one that is right.")
        pairs = native or saved
        null = [name for name in ("compress_ratios", "layer_types") if name in self.raw and self.raw[name] is None]
        if not pairs and null:
            self.problem(f"{' and '.join(null)} is null; it must say what each layer attends to. {_BELONGS}")
        elif not pairs and "compress_ratios" not in self.raw and "layer_types" not in self.raw:
            self.problem(
                "neither compress_ratios nor layer_types says what each layer attends to. "
                "Use the config.json that belongs to the weights."
            )
        pairs = pairs or [(LayerKind.SWA, 0)] * count
        return tuple(kind for kind, _ in pairs), tuple(ratio for _, ratio in pairs)

    def native_layers(self, count: int) -> list[tuple[LayerKind, int]] | None:
        ratios = self.raw.get("compress_ratios")
        if ratios is None:
            return None
        if not isinstance(ratios, list) or any(type(ratio) is not int for ratio in ratios) or len(ratios) < count:
            self.problem(f"compress_ratios is {ratios!r}; expected at least num_hidden_layers ({count}) integers.")
            return None
        unknown = sorted(set(ratios) - set(_KIND_OF_RATIO))
        if unknown:
            self.problem(
                f"compress_ratios holds {unknown}; allowed are 0, 4 and 128. "
                "Spell other ratios as layer_types with compress_rates."
            )
            return None
        if any(ratios[count:]):
            self.problem(f"compress_ratios beyond layer {count} (draft layers) is {ratios[count:]}; expected zeros.")
        return [(_KIND_OF_RATIO[ratio], ratio) for ratio in ratios[:count]]

    def saved_layers(self, count: int) -> list[tuple[LayerKind, int]] | None:
        names = self.strings("layer_types")
        if names is None:
            return None
        allowed = [kind.value for kind in LayerKind]
        unknown = sorted(set(names) - set(allowed))
        if unknown or len(names) != count:
            self.problem(
                f"layer_types has {len(names)} entries{f', among them {unknown}' if unknown else ''}; "
                f"expected num_hidden_layers ({count}) of {', '.join(allowed)}."
            )
            return None
        rates = self.object("compress_rates")
        pairs = []
        for kind in map(LayerKind, names):
            rate = 0 if kind is LayerKind.SWA else rates.get(kind.value)
            if type(rate) is not int or (kind is not LayerKind.SWA and rate < 1):
                self.problem(f"compress_rates[{kind.value!r}] is {rate!r}; expected a positive integer.")
                rate = 1
            pairs.append((kind, rate))
        return pairs

    def hash_layers(self, count: int) -> tuple[bool, ...]:
        names = self.strings("mlp_layer_types")
        native: tuple[bool, ...] | None = None
        if "num_hash_layers" in self.raw or names is None:
            first = self.integer("num_hash_layers", minimum=0)
            native = tuple(layer < first for layer in range(count))
            if first > count:
                self.problem(f"num_hash_layers is {first}; expected at most num_hidden_layers ({count}).")
        if names is None:
            return native or ()
        unknown = sorted(set(names) - {"hash_moe", "moe"})
        if unknown or len(names) != count:
            self.problem(
                f"mlp_layer_types has {len(names)} entries{f', among them {unknown}' if unknown else ''}; "
                f"expected num_hidden_layers ({count}) of hash_moe, moe."
            )
        saved = tuple(name == "hash_moe" for name in names)
        if native is not None and native != saved:
            self.problem("num_hash_layers contradicts mlp_layer_types. Keep the one that is right.")
        return saved

    def rotary_sources(self) -> tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]:
        """Return the main table's parameters and every object that describes the compressed table.

        transformers nests both tables in rope_parameters, under main and compress. An object that is not nested (as
        rope_scaling never is) gives the compressed table's scaling, but a rope_theta in it is the main table's.
        """
        parameters, scaling = self.object("rope_parameters"), self.object("rope_scaling")
        main: Mapping[str, Any] = {}
        compressed = [("rope_scaling", scaling)] if scaling else []
        if "main" in parameters or "compress" in parameters:
            main = self.object("main", parameters)
            compressed.append(("rope_parameters.compress", self.object("compress", parameters)))
            if set(parameters) != {"main", "compress"}:
                self.problem(f"rope_parameters holds {sorted(parameters)}; expected main and compress.")
        elif parameters:
            compressed.append(("rope_parameters", parameters))
        return main, compressed

    def rotary(self) -> tuple[float, float, YarnScaling | None]:
        """Return the two bases and the scaling of the compressed layers' table."""
        main, compressed = self.rotary_sources()
        kind = main.get("rope_type", "default")
        if kind != "default" or set(main) - {"rope_type", "rope_theta", "partial_rotary_factor"}:
            self.problem(f"rope_parameters.main is {dict(main)}; sliding-window layers have no scaling ('default').")
        bases = [(f"{label}.rope_theta", source.get("rope_theta")) for label, source in compressed]
        is_nested = [label == "rope_parameters.compress" for label, _ in compressed]
        of_main = [base for base, nested in zip(bases, is_nested, strict=True) if not nested]
        of_compressed = [base for base, nested in zip(bases, is_nested, strict=True) if nested]
        rope_theta = self.agreed("rope_theta", [("rope_parameters.main.rope_theta", main.get("rope_theta")), *of_main])
        compress_rope_theta = self.agreed("compress_rope_theta", of_compressed)
        scalings = [self.yarn(label, source) for label, source in compressed]
        if any(scaling != scalings[0] for scaling in scalings):
            self.problem("rope_scaling contradicts rope_parameters. Keep the one that is right.")
        return rope_theta, compress_rope_theta, scalings[0] if scalings else None

    def agreed(self, name: str, others: list[tuple[str, Any]]) -> float:
        """Return a number given under `name`, in other places, or both with the same value."""
        given = [(label, value) for label, value in [(name, self.raw.get(name)), *others] if value is not None]
        values = [self.number("value", {"value": value}, label) for label, value in given]
        if not values:
            return self.number(name)
        if any(value != values[0] for value in values):
            said = ", ".join(f"{label} {value}" for (label, _), value in zip(given, values, strict=True))
            self.problem(f"{name} is contradicted: {said}. Keep the one that is right.")
        return values[0]

    def yarn(self, label: str, source: Mapping[str, Any]) -> YarnScaling | None:
        kind = source.get("rope_type", source.get("type", "default"))
        if source.get("type", kind) != kind or kind not in ("default", "yarn"):
            self.problem(f"{label} is {dict(source)}; the type must be 'yarn' or 'default'.")
            return None
        if unknown := sorted(set(source) - _YARN_KEYS):
            self.problem(f"{label} holds {unknown}, which this package does not compute. Remove what is inert.")
        if source.get("attention_factor", 1.0) != 1.0 or source.get("truncate", True) is not True:
            self.problem(
                f"{label}: attention_factor must be 1.0 and truncate true, as DeepSeek-V4 was trained; got "
                f"{source.get('attention_factor')!r} and {source.get('truncate')!r}."
            )
        if kind == "default":
            return None
        original = source.get("original_max_position_embeddings")
        if type(original) is not int or original < 1:
            self.problem(f"{label}.original_max_position_embeddings is {original!r}; expected a positive integer.")
            original = 1
        return YarnScaling(
            factor=self.number("factor", source, f"{label}.factor"),
            beta_fast=self.number("beta_fast", {"beta_fast": 32.0, **source}, f"{label}.beta_fast"),
            beta_slow=self.number("beta_slow", {"beta_slow": 1.0, **source}, f"{label}.beta_slow"),
            original_max_pos=original,
        )

    def rope_dim(self, head_dim: int) -> int:
        main, compressed = self.rotary_sources()
        places = [("config", self.raw), ("rope_parameters.main", main), *compressed]
        said = {}
        if "qk_rope_head_dim" in self.raw:
            said["qk_rope_head_dim"] = self.integer("qk_rope_head_dim")
        for label, source in places:
            if source.get("partial_rotary_factor") is not None:
                label = f"{label}.partial_rotary_factor"
                said[label] = int(head_dim * self.number("partial_rotary_factor", source, label))
        if len(set(said.values())) != 1:
            self.problem(
                f"rotary channels are contradicted: {said}. Keep the one that is right."
                if said
                else "qk_rope_head_dim is missing. Use the config.json that belongs to the weights."
            )
            return 2
        return next(iter(said.values()))

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(one) is not int or one < 0 for one in values):
            self.problem(f"{name} is {value!r}; expected a token id or a list of them.")
            return ()
        return tuple(values)

    def dspark(self) -> DSparkConfig | None:
        given = [name for name in _DSPARK if self.raw.get(name) is not None]
        if not given:
            return None
        if len(given) < len(_DSPARK):
            self.problem(f"{', '.join(given)} without {', '.join(sorted(set(_DSPARK) - set(given)))}.")
            return None
        layers = self.raw["dspark_target_layer_ids"]
        num_layers, vocab_size = self.raw.get("num_hidden_layers"), self.raw.get("vocab_size")  # checked elsewhere
        if not isinstance(layers, list) or not layers or any(type(layer) is not int for layer in layers):
            self.problem(f"dspark_target_layer_ids is {layers!r}; expected a list of layer numbers.")
            return None
        if type(num_layers) is int and not 0 <= min(layers) <= max(layers) < num_layers:
            self.problem(f"dspark_target_layer_ids is {layers!r}; layers are 0 to {num_layers - 1}.")
        noise = self.integer("dspark_noise_token_id", minimum=0)
        if type(vocab_size) is int and noise >= vocab_size:
            self.problem(f"dspark_noise_token_id is {noise}; expected an id below vocab_size ({vocab_size}).")
        return DSparkConfig(
            block_size=self.integer("dspark_block_size"),
            noise_token_id=noise,
            target_layer_ids=tuple(layers),
            markov_rank=self.integer("dspark_markov_rank"),
        )

    def check_sizes(self, config: ModelConfig) -> None:
        """Refuse sizes that cannot belong together."""
        if config.num_attention_heads % config.o_groups:
            self.problem(
                f"num_attention_heads ({config.num_attention_heads}) is not a multiple of o_groups ({config.o_groups})."
            )
        if config.num_experts_per_tok > config.n_routed_experts:
            self.problem(
                f"num_experts_per_tok ({config.num_experts_per_tok}) exceeds n_routed_experts "
                f"({config.n_routed_experts})."
            )
        for name, size in (("head_dim", config.head_dim), ("index_head_dim", config.index_head_dim)):
            if config.qk_rope_head_dim % 2 or config.qk_rope_head_dim > size:
                self.problem(f"qk_rope_head_dim ({config.qk_rope_head_dim}) must be even and at most {name} ({size}).")
        for name, ids in (("bos_token_id", (config.bos_token_id or 0,)), ("eos_token_id", config.eos_token_ids)):
            if any(one >= config.vocab_size for one in ids):
                self.problem(f"{name} is {self.raw.get(name)!r}; expected ids below vocab_size ({config.vocab_size}).")
        if config.dspark and any(not 0 <= one < config.num_hidden_layers for one in config.dspark.target_layer_ids):
            self.problem(f"dspark_target_layer_ids is {config.dspark.target_layer_ids}; expected backbone layers.")
