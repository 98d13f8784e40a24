# SPDX-License-Identifier: Apache-2.0
"""Native NVFP4 inference for DeepSeek-V4.

    model = megamoe.load("tiny", recipe="w4a16")            # logits, new_cache, step
    llm = megamoe.LLM("tiny")                               # prompts in, text out
    llm.generate(["def "], megamoe.SamplingParams(max_tokens=32))

Names are imported when they are first used, so `import megamoe` costs nothing and `megamoe --version` does not load
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.engine.sampling_params import SamplingParams
    from megamoe.models.load import load
    from megamoe.text.llm import LLM

__version__ = "0.1.0.dev0"
__all__ = ["LLM", "SamplingParams", "__version__", "load"]

_HOMES = {
    "LLM": "megamoe.text.llm",
    "SamplingParams": "megamoe.engine.sampling_params",
    "load": "megamoe.models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megamoe' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
