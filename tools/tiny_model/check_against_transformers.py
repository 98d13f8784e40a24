# SPDX-License-Identifier: Apache-2.0
"""Compare the training model's logits with transformers' DeepseekV4ForCausalLM on the same random fp32 weights.

python check_against_transformers.py
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import DeepseekV4ForCausalLM

from export_master import HERE, export
from model import Config, Mode, Model

TOLERANCE = 5e-4


@torch.no_grad()
def randomise(model: Model) -> None:
    """Give every parameter a value that its initialisation leaves at 0 or 1."""
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            continue
        noise = torch.randn(tensor.shape)
        if "norm.weight" in name:
            tensor.copy_(1 + 0.1 * noise)
        elif name.endswith(("_base", "attn_sink", ".ape", "gate.bias")):
            tensor.copy_(0.5 * noise)
        elif name.endswith("_scale"):
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)


@torch.no_grad()
def main() -> int:
    """Run the comparison; the exit code says whether it passed."""
    torch.manual_seed(0)
    model = Model(Config.load(HERE / "config.json")).eval()
    randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        export(model.state_dict(), None, Path(folder), torch.float32)
        theirs, info = DeepseekV4ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    print("loading problems:", {k: v for k, v in info.items() if v} or "none")
    theirs = theirs.eval().float()
    passed = True
    for num_tokens in (130, 700, 1100):  # 1100 // 4 = 275 entries, so the top 64 really drops some
        ids = torch.randint(0, model.config.vocab_size, (1, num_tokens))
        expected = theirs(ids, use_cache=False).logits
        got = model.logits(ids, Mode(select="topk"))
        difference = (got - expected).abs().max().item()
        dense = (model.logits(ids, Mode(select="all")) - expected).abs().max().item()
        passed &= difference < TOLERANCE
        print(f"{num_tokens} tokens: max |difference| {difference:.2e} (dense attention instead: {dense:.2e}), "
              f"logit std {expected.std():.3f}")  # fmt: skip
    print("ok" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
