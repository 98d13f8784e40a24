# SPDX-License-Identifier: Apache-2.0
"""What a device's memory is for: planned before the caches are allocated, printed at the start, and kept.

    weights       what loading left on the device
    workspace     what the largest step with a prompt takes beside them; measured by running one
    graphs        the pool of the captured decode steps; measured by capturing the largest
    step area, rings, snapshots, pages: the caches

Weights, workspace and graphs are what they are, so the caches get what they leave of the budget. Every pool starts a
segment of its own at worst, which the allocator rounds up; that room is planned too. The budget covers what torch's
allocator holds. The CUDA context and loaded kernels, some hundred megabytes, lie outside of it, as other processes do.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.cache.pools import CapacityReport
from megamoe.engine.config import EngineConfig, smallest_capacity
from megamoe.engine.engine import Engine
from megamoe.engine.model import BatchModel
from megamoe.engine.warm_up import run_every_bucket

SEGMENT_BYTES = 2 * 2**20
"""What the allocator rounds large segments up to."""
DEFAULT_SHARE = 0.9
"""Of the free memory of a device, where no budget is given."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the bytes of a budget are for.

    Attributes:
        budget: all that may be used.
        weights: with rotary tables.
        workspace: of the largest step with a prompt.
        graphs: of decode steps, their results included.
        step_area, rings, snapshots, pages: of the caches.
        rounding: room for what the allocator rounds up.
    """

    budget: int
    weights: int
    workspace: int
    graphs: int
    step_area: int = 0
    rings: int = 0
    snapshots: int = 0
    pages: int = 0
    rounding: int = 0

    @property
    def fixed(self) -> int:
        """Bytes that are there whatever the caches get."""
        return self.weights + self.workspace + self.graphs

    @property
    def spare(self) -> int:
        """Bytes of the budget that nothing is planned for."""
        return self.budget - sum(bytes_of for name, bytes_of in self.parts() if name != "spare")

    def parts(self) -> list[tuple[str, int]]:
        """Return every part with its bytes, in the order of this file's heading."""
        names = [one.name for one in dataclasses.fields(self) if one.name != "budget"]
        return [(name.replace("_", " "), getattr(self, name)) for name in names]

    def with_caches(self, capacity: CapacityReport) -> MemoryPlan:
        """Return the plan with what the caches take."""
        return dataclasses.replace(
            self,
            step_area=capacity.step_area_bytes,
            rings=capacity.size.num_sequences * capacity.bytes_per_sequence,
            snapshots=capacity.num_snapshots * capacity.bytes_per_snapshot,
            pages=capacity.size.num_pages * capacity.bytes_per_page,
            rounding=SEGMENT_BYTES * capacity.num_pools,
        )

    def __str__(self) -> str:
        """Return a line per part."""
        lines = [f"{bytes_of:>17,} B {name}" for name, bytes_of in self.parts()]
        lines.append(f"{self.spare:>17,} B spare, of a budget of {self.budget:,} B")
        return "\n".join(lines)


def budget_of(device: str, memory: int | None) -> int | None:
    """Return the bytes to plan with on a GPU, before anything is loaded; None where there is none.

    Args:
        device: as users name it.
        memory: what the user gives; None for nearly all that is free now.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():  # loading refuses a device that is not there
        return None
    return int(DEFAULT_SHARE * torch.cuda.mem_get_info(torch.device(device))[0]) if memory is None else memory


def plan_memory(model: BatchModel, config: EngineConfig, budget: int) -> tuple[EngineConfig, MemoryPlan]:
    """Measure what is fixed, and give the caches the rest.

    Args:
        model: loaded, on a GPU; kernels have been prepared.
        config: of the engine; its memory_bytes is not used.
        budget: bytes of device memory for everything.

    Returns:
        (the same configuration with the memory of its caches, the plan with them).

    Raises:
        ValueError: what is fixed, with one page and the rings, is more than the budget; every part is named.
    """
    fixed = measure(model, config, budget)
    least = smallest_capacity(config, model)
    with_least = fixed.with_caches(least)
    if with_least.spare < 0:
        named = ", ".join(f"{name} {bytes_of:,}" for name, bytes_of in with_least.parts())
        raise ValueError(
            f"memory: {budget:,} bytes are {-with_least.spare:,} too few for model {model.name!r} with one page: "
            f"{named}. Raise --memory, or lower max_sequences, max_step_tokens or prefill_chunk."
        )
    rest = budget - fixed.fixed - SEGMENT_BYTES * least.num_pools
    return dataclasses.replace(config, memory_bytes=rest), fixed


def measure(model: BatchModel, config: EngineConfig, budget: int) -> MemoryPlan:
    """Run every bucket over small caches, and return what the steps take beside these and the weights."""
    device = model.device
    per_page = smallest_capacity(config, model).size.tokens_per_page
    pages = 2 * config.max_sequences + -(-config.max_step_tokens // per_page)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved(device)
    engine = Engine(model, dataclasses.replace(config, prefix_cache=False, num_pages=pages))
    with_caches = torch.cuda.memory_reserved(device)
    run_every_bucket(engine)
    torch.cuda.synchronize(device)
    graphs = engine.runner.num_bytes
    workspace = torch.cuda.memory_reserved(device) - with_caches - graphs
    del engine
    torch.cuda.empty_cache()
    return MemoryPlan(budget, weights, workspace, graphs)


def keep(plan: MemoryPlan, device: torch.device) -> None:
    """From now on, let the allocator refuse what is beyond the budget."""
    total = torch.cuda.get_device_properties(device).total_memory
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, plan.budget / total), number)
