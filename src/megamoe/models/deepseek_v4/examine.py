# SPDX-License-Identifier: Apache-2.0
"""Examine a checkpoint: headers, config.json and a few bytes of every kind against the one list of rules.

`inspect` prints what is found here. `load`, `serve` and `convert` begin with the same call and refuse or warn by what
it finds (rules.py), so none of them can know a fault that another one overlooks. Afterwards the loader and the
converter read every byte, by the same rules where values are concerned.

Nothing here needs torch or a GPU, and nothing is allocated for tensors: a complete V4-Pro takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megamoe.checkpoint.headers import Headers, read_headers
from megamoe.checkpoint.problem import CheckpointError, Problem
from megamoe.checkpoint.stopped import MANIFEST_NAME, Stopped, stopped_conversion
from megamoe.models.deepseek_v4.claims import Claims, claim_tensors
from megamoe.models.deepseek_v4.config import ARCHITECTURE, ModelConfig, parse_config
from megamoe.models.deepseek_v4.declared import check_declared
from megamoe.models.deepseek_v4.inventory import Entry, Role
from megamoe.models.deepseek_v4.layout import Format, StoredHeaders
from megamoe.models.deepseek_v4.names import native_name
from megamoe.models.deepseek_v4.observed import DraftFound, Observed, contradiction, reconcile, reconcile_draft
from megamoe.models.deepseek_v4.releases import check_release, note_yarn
from megamoe.models.deepseek_v4.rules import Finding, refusal, refuse
from megamoe.models.deepseek_v4.samples import Sampled, check_samples, is_fake

_OTHERS = {
    "deepseek_v41": "DeepSeek-V4.1 (another architecture: shared compressors, Engram tables, FP8 blocks of 32)",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v3": "DeepSeek-V3 or R1",
    "deepseek_v2": "DeepSeek-V2",
}
_OTHER_TENSORS = {
    "vision.": "DeepSeek-V4-Flash-Vision-Exp (a vision tower and gates with a second bias)",
    "aligner.": "DeepSeek-V4-Flash-Vision-Exp (a vision tower and gates with a second bias)",
}
_TOLD = ("config-no-yarn", "fake")


@dataclasses.dataclass(frozen=True)
class Examined:
    """What was found out about a checkpoint.

    Attributes:
        headers: of its files.
        natives: stored name -> native name.
        raw: content of config.json, or None.
        other: name of the architecture where it is not DeepSeek-V4, else "".
        config: with what the tensors say in place of what contradicts them; None where config.json is not usable.
        draft: which draft the tensors hold, None where they were not compared.
        stored: its tensors under native names, None where they were not compared.
        claims: which of them belong to the model.
        problems: rules broken.
        notes: what is worth knowing.
        sampled: how many bytes were looked at, or None.
        is_unreadable: it cannot be judged as a DeepSeek-V4 checkpoint.
    """

    headers: Headers
    natives: Mapping[str, str]
    raw: Mapping[str, Any] | None
    other: str
    config: ModelConfig | None
    draft: DraftFound | None
    stored: StoredHeaders | None
    claims: Claims | None
    problems: tuple[Problem, ...]
    notes: tuple[Finding, ...]
    sampled: Sampled | None
    is_unreadable: bool

    def refuse(self, accept: Collection[str] = ()) -> tuple[Finding, ...]:
        """Refuse the checkpoint if it breaks a rule that stops `load` and `convert`; see `rules.refuse`."""
        return refuse(f"checkpoint {self.headers.directory}", self.problems, accept)

    @property
    def told(self) -> tuple[Finding, ...]:
        """The notes that whoever uses the checkpoint should read, not only who inspects it."""
        return tuple(note for note in self.notes if note.rule in _TOLD)

    @property
    def usable_config(self) -> ModelConfig:
        """The configuration of a checkpoint that was not refused."""
        assert self.config is not None
        return self.config


def examine(directory: str | os.PathLike[str]) -> Examined:
    """Examine a checkpoint directory.

    Args:
        directory: folder with config.json and *.safetensors.

    Raises:
        CheckpointError: `directory` is not a directory.
        OSError: a file cannot be read.
    """
    return _Examiner(read_headers(directory)).examine()


def refuse_stopped(directory: pathlib.Path) -> None:
    """Refuse a conversion that was stopped, before anything that comes last in it is missed.

    Raises:
        CheckpointError: it is one.
    """
    if (stopped := stopped_conversion(directory)) is not None:
        raise refusal(f"checkpoint {directory}", [_unfinished(directory, stopped)])


class _Examiner:
    """Applies the rules, in an order in which causes come before their consequences."""

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.problems: list[Problem] = list(headers.problems)
        self.notes: list[Finding] = []
        self.is_unreadable = not headers.infos
        self.sampled: Sampled | None = None
        self.config: ModelConfig | None = None
        self.draft: DraftFound | None = None
        self.stored: StoredHeaders | None = None
        self.claims: Claims | None = None
        self.natives = {name: native_name(name) for name in headers.infos}
        self.observed = Observed(headers.infos, self.natives, headers.unavailable)

    def examine(self) -> Examined:
        if (stopped := stopped_conversion(self.headers.directory)) is not None:
            self.problems = [_unfinished(self.headers.directory, stopped)]  # everything else follows from that
            self.is_unreadable = True
            return self.result(None, "")
        raw = self.read_config()
        self.note_total_size()
        other = self.other_architecture(raw) if raw is not None else ""
        if other:
            self.is_unreadable = True
            text = f"config.json: this is {other}, which megamoe does not run."
            remedy = f"Implemented is {ARCHITECTURE} (DeepSeek-V4-Flash and -Pro in all their releases)."
            self.problems.append(Problem("config-invalid", "model_type", text, remedy, other, ARCHITECTURE))
        elif raw is not None:
            config = self.parse(raw)
            if config is not None and self.headers.infos:
                self.compare(config, raw)
        return self.result(raw, other)

    def result(self, raw: Mapping[str, Any] | None, other: str) -> Examined:
        return Examined(
            headers=self.headers,
            natives=self.natives,
            raw=raw,
            other=other,
            config=self.config,
            draft=self.draft,
            stored=self.stored,
            claims=self.claims,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            sampled=self.sampled,
            is_unreadable=self.is_unreadable,
        )

    def read_config(self) -> dict[str, Any] | None:
        path = self.headers.directory / "config.json"
        content: Any = None
        if not path.is_file():
            text = "config.json: missing."
        else:
            try:
                content = json.loads(path.read_bytes().decode("utf-8"))
                text = "config.json: not a JSON object."
            except (ValueError, RecursionError) as error:
                text = f"config.json: not JSON ({str(error)[:200]})."
        if isinstance(content, dict):
            return content
        remedy = "Download it from where the weights came from."
        self.problems.append(Problem("config-unreadable", "config.json", text, remedy))
        self.is_unreadable = True
        return None

    def note_total_size(self) -> None:
        claimed = self.headers.total_size
        if claimed is not None and claimed != self.headers.num_bytes and not self.headers.problems:
            text = f"The index claims {claimed:,} bytes in all; the shards hold {self.headers.num_bytes:,}."
            remedy = "Known of published checkpoints, whose index was copied from the source. The shards are right."
            self.notes.append(Finding("index-total-size", ("total_size",), text, remedy, is_note=True))

    def other_architecture(self, raw: Mapping[str, Any]) -> str:
        """Return the name of an architecture that is not DeepSeek-V4, or ""."""
        for prefix, name in _OTHER_TENSORS.items():
            if any(stored.removeprefix("model.").startswith(prefix) for stored in self.headers.infos):
                return name
        kind, names = raw.get("model_type"), raw.get("architectures")
        first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
        if kind == "deepseek_v4" or (kind is None and first in (ARCHITECTURE, None)):
            return ""
        return _OTHERS.get(str(kind), f"model_type {kind!r}, architecture {first!r}")

    def parse(self, raw: Mapping[str, Any]) -> ModelConfig | None:
        try:
            config = parse_config(raw)
        except CheckpointError as error:
            with_layers = self.parse_with_layers_of_tensors(raw)
            if with_layers is not None:
                return with_layers
            for line in error.problems or (str(error),):
                self.problems.append(Problem("config-invalid", line.split(" ", 1)[0], f"config.json: {line}"))
            text = "Tensors were not compared with an inventory, because config.json cannot be used."
            self.notes.append(Finding("not-compared", (), text, is_note=True))
            return None
        if config.unused_keys:
            text = f"config.json has fields this package does not use: {', '.join(config.unused_keys)}."
            self.notes.append(Finding("config-unused", config.unused_keys, text, is_note=True))
        return config

    def parse_with_layers_of_tensors(self, raw: Mapping[str, Any]) -> ModelConfig | None:
        """Return the configuration if nothing but its number of layers was wrong, having taken that down; else None."""
        said, shown = raw.get("num_hidden_layers"), self.observed.num_layers
        if said == shown or not shown:
            return None
        if type(said) is not int:
            return self.parse_without_number_of_layers(raw, shown)
        try:
            config = parse_config({**raw, "num_hidden_layers": shown})
        except CheckpointError:
            return None
        self.problems.append(contradiction("config-layers", "num_hidden_layers", said, shown))
        return config

    def parse_without_number_of_layers(self, raw: Mapping[str, Any], shown: int) -> ModelConfig | None:
        """Return the configuration if nothing but num_hidden_layers was unusable, having taken that down; else None."""
        try:
            config = parse_config({**raw, "num_hidden_layers": shown})
        except CheckpointError:
            return None
        try:
            parse_config(raw)
        except CheckpointError as error:
            line = next((one for one in error.problems if one.startswith("num_hidden_layers")), str(error))
            text = f"config.json: {line.removeprefix('config.json: ')}"
            remedy = f"The tensors show {shown}."
            self.problems.append(Problem("config-invalid", "num_hidden_layers", text, remedy))
        return config

    def compare(self, config: ModelConfig, raw: Mapping[str, Any]) -> None:
        """Compare tensors with the inventory, the declarations and each other."""
        headers, natives, observed = self.headers, self.natives, self.observed
        read = {info.shard for info in headers.infos.values()}
        has_unknown_part = not headers.unavailable and any(
            problem.rule in ("shard-missing", "shard-header", "index-unreadable")
            or (problem.rule == "shard-truncated" and problem.subject not in read)
            for problem in headers.problems
        )
        if has_unknown_part:
            text = "Missing tensors are not listed: a shard cannot be read and no index says what is in it."
            self.notes.append(Finding("not-compared", (), text, is_note=True))
        else:
            config, contradictions = reconcile(observed, config, raw)
            self.problems += contradictions
        draft = self.draft = observed.draft()
        stored = self.stored = StoredHeaders(headers.infos, config.n_routed_experts, natives)
        config, contradictions = reconcile_draft(draft, stored, config)
        self.problems += contradictions
        self.config = config
        self.problems += check_release(config)
        self.notes += note_yarn(config)
        claims = self.claims = claim_tensors(stored, config, draft)
        unavailable = {_module_of(native_name(name)) for name in headers.unavailable}
        for problem in stored.problems:
            is_missing = problem.rule == "tensor-missing"
            if not (is_missing and has_unknown_part) and _module_of(native_name(problem.subject)) not in unavailable:
                self.problems.append(problem)
        self.note_leftovers(stored, claims)
        self.check_stacks(stored, claims.entries)
        self.check_kv_norms(stored)
        is_packed = any(name.endswith(".weight_packed") for name in headers.infos)

        def spelled(module: str) -> str:
            return stored.stored_name(stored.codes_name(module)).rpartition(".")[0]

        quant = self.read_quant_file()
        self.problems += check_declared(raw, quant, claims.formats, is_packed=is_packed, spelled=spelled)
        found, self.sampled = check_samples(headers, stored, claims)
        self.problems += found

        if is_fake(headers):
            text = "A fake with true headers and no weights (tools/fake_checkpoint.py): its values were not looked at."
            self.notes.append(Finding("fake", (), text, is_note=True))

    def note_leftovers(self, stored: StoredHeaders, claims: Claims) -> None:
        """Say what a draft left behind: norms of a stripped stage, copies of embedding and head."""
        for names, text in (
            (claims.stripped, "What is left of a stripped MTP stage; not used."),
            (claims.copies, "The draft's copies of embedding or head; load checks that they are equal."),
        ):
            if names:
                subjects = tuple(stored.stored_name(name) for name in names)
                self.notes.append(Finding("draft-leftovers", subjects, text, is_note=True))

    def check_stacks(self, stored: StoredHeaders, entries: Iterable[Entry]) -> None:
        """Find layers whose experts do not share a format."""
        assert self.claims is not None
        stacks: dict[str, dict[str, str]] = {}
        for entry in entries:
            found = self.claims.formats.get(entry.name)
            if entry.role is Role.EXPERT and found is not None:
                kind = found.value if found in (Format.MXFP4, Format.NVFP4) else stored.stack_kind(entry.name, found)
                stacks.setdefault(entry.name.rsplit(".", 2)[0], {}).setdefault(kind, entry.name)
        for prefix, kinds in stacks.items():
            if len(kinds) > 1:
                said = ", ".join(f"{module} is {kind}" for kind, module in kinds.items())
                text = f"{prefix}: experts of one layer must share a format: {said}."
                self.problems.append(Problem("experts-mixed", prefix, text, "Convert them alike."))

    def check_kv_norms(self, stored: StoredHeaders) -> None:
        """Find norms of the latent under the name a re-save gives them (F17)."""
        renamed = [
            stored.stored_name(name)
            for name in stored.names
            if name.endswith(".attn.kv_norm.weight") and stored.stored_name(name).endswith(".attn.norm.weight")
        ]
        if not renamed:
            return
        is_resave = all(
            name.startswith("model.") or name in ("head.weight", "lm_head.weight") for name in self.headers.infos
        )
        remedy = "Rename it to attn.kv_norm.weight for other readers; this package reads both."
        if is_resave:
            text = "save_pretrained of transformers calls the norm of the latent attn.norm instead of attn.kv_norm."
            self.notes.append(Finding("kv-norm-renamed", tuple(renamed), text, remedy, is_note=True))
        else:
            for name in renamed:
                text = f"{name}: the norm of the latent is called kv_norm; a re-save has renamed it."
                self.problems.append(Problem("kv-norm-renamed", name, text, remedy))

    def read_quant_file(self) -> dict[str, Any] | None:
        path = self.headers.directory / "hf_quant_config.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            content, reason = None, str(error)[:200]
        else:
            reason = "not an object"
        if isinstance(content, dict):
            return content
        text = f"hf_quant_config.json: not JSON ({reason})."
        self.problems.append(Problem("quant-config-disagrees", "hf_quant_config.json", text, "Download it again."))
        return None


_DEFAULTS = {
    "to": "nvfp4",
    "experts": "lossless",
    "attention": "keep",
    "draft": "keep",
    "scale_search": "mse",
    "proof": "codes",
}


def _unfinished(directory: pathlib.Path, stopped: Stopped) -> Problem:
    chosen = [
        f" --{name.replace('_', '-')} {stopped.options[name]}"
        for name, default in _DEFAULTS.items()
        if stopped.options.get(name, default) != default
    ]
    chosen += [" --calibration FILE"] if stopped.options.get("calibration") is not None else []
    text = (
        f"{directory}: a conversion that was stopped ({stopped.num_files} file"
        f"{'' if stopped.num_files == 1 else 's'} finished, config.json comes last)."
    )
    remedy = f"Give the same command again, it goes on: megamoe convert SRC {directory}{''.join(chosen)}"
    return Problem("conversion-unfinished", MANIFEST_NAME, text, remedy)


def _module_of(native: str) -> str:
    return native.rpartition(".")[0]
