# SPDX-License-Identifier: Apache-2.0
"""Which stored tensors a model takes: everything of the inventory, and what a draft may leave behind.

Every tensor is claimed, and so used or listed, or it is unknown. Only headers are looked at: `inspect` compares with
this, and the loader builds from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.inventory import Entry, Role, draft_names, inventory
from megamoe.models.deepseek_v4.layout import FLOATS, Format, StoredHeaders, dspark_shape
from megamoe.models.deepseek_v4.observed import DraftFound


@dataclasses.dataclass(frozen=True)
class Claims:
    """What was claimed.

    Attributes:
        entries: what a checkpoint with this draft holds.
        formats: native name -> format, for every weight whose headers are sound.
        num_mtp: classic draft stages that are loaded.
        num_dspark: DSpark stages that are loaded; 0 where config.json does not describe them.
        stripped: native names left of a stage whose linears are gone.
        copies: native names of the draft's copies of embedding and head.
        unused: native names of draft tensors that are recognized and not loaded.
    """

    entries: tuple[Entry, ...]
    formats: Mapping[str, Format]
    num_mtp: int
    num_dspark: int
    stripped: tuple[str, ...]
    copies: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def loaded(self) -> tuple[Entry, ...]:
        """The entries that are loaded: all but a DSpark draft that config.json does not describe."""
        if self.num_mtp or self.num_dspark:
            return self.entries
        return tuple(entry for entry in self.entries if not entry.name.startswith("mtp."))


def claim_tensors(stored: StoredHeaders, config: ModelConfig, draft: DraftFound) -> Claims:
    """Claim every tensor of the inventory; what is wrong is taken down in `stored.problems`.

    Args:
        stored: the tensors.
        config: of the same checkpoint.
        draft: which draft the tensors hold.
    """
    dspark = dspark_shape(stored, config, draft.num_dspark) if draft.num_dspark else None
    stripped = _claim_known(stored, config, draft.stripped)
    copies = tuple(name for name in draft.copies if name in stored)
    for name in copies:
        stored.claim(name)
    entries = inventory(config, num_mtp=draft.num_mtp, dspark=dspark)
    formats: dict[str, Format] = {}
    for entry in entries:
        if entry.role in (Role.LINEAR, Role.EXPERT):
            num_rows, num_columns = entry.shape
            found = stored.detect(entry.name, (num_rows, num_columns))
            if found is not None:
                formats[entry.name] = found
        else:
            stored.expect(entry.name, ("I64", "I32") if entry.role is Role.TABLE else FLOATS, entry.shape)
    stored.refuse_unclaimed()
    unused: tuple[str, ...] = ()
    if draft.num_dspark and config.dspark is None:
        unused = tuple(name for name in stored.names if name.startswith("mtp.") and name not in copies)
    return Claims(
        entries=entries,
        formats=formats,
        num_mtp=draft.num_mtp,
        num_dspark=draft.num_dspark if config.dspark is not None else 0,
        stripped=stripped,
        copies=copies,
        unused=tuple(sorted((*stripped, *copies, *unused))),
    )


def _claim_known(stored: StoredHeaders, config: ModelConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Claim those of a stripped stage's names that a stage may have."""
    allowed: set[str] = set()
    for stage in {name.split(".")[1] for name in names}:
        allowed.update(draft_names(config, f"mtp.{stage}"))
    known = tuple(name for name in names if name in allowed and name in stored)
    for name in known:
        stored.claim(name)
    return known
