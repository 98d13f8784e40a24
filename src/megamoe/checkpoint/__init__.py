# SPDX-License-Identifier: Apache-2.0
"""Files to tensors and back: safetensors checkpoints read with every disagreement named, and written atomically.

What the tensors mean is not known here: names, shapes and formats of a model are in models/<architecture>/.
"""

from megamoe.checkpoint.reader import CheckpointError, CheckpointReader, TensorInfo
from megamoe.checkpoint.writer import write_json, write_safetensors

__all__ = ["CheckpointError", "CheckpointReader", "TensorInfo", "write_json", "write_safetensors"]
