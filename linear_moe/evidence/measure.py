"""Writes the loss of every token of held-out text, by a trained model of Megatron.

    python -m linear_moe.evidence.measure CHECKPOINTS OUTPUT.json WINDOWS.npy [WINDOWS.npy ...]

Windows [W, L + 1] hold token ids. Beside OUTPUT.json, with the model's parameters, the losses [W, L] of WINDOWS.npy are
in OUTPUT.WINDOWS.npy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from linear_moe.evidence.trained_model import token_losses, trained_model
from linear_moe.temporary import replaced_file

TOKENS_AT_ONCE = 1 << 15  # of a forward pass: their logits take 2 GB


def losses_path(output: Path, windows: Path) -> Path:
    """Where the losses of the windows of a file are."""
    return output.with_suffix(f".{windows.name}")


def main() -> None:
    checkpoints, output, *files = map(Path, sys.argv[1:])
    with trained_model(checkpoints) as model:
        for path in files:
            windows = torch.from_numpy(np.load(path).astype(np.int64))
            count = max(1, TOKENS_AT_ONCE // (windows.shape[1] - 1))
            losses = [token_losses(model, windows[i : i + count]).cpu() for i in range(0, len(windows), count)]
            with replaced_file(losses_path(output, path)) as partial, partial.open("wb") as file:
                np.save(file, torch.cat(losses).numpy().astype(np.float32))
        parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = sum(count for name, count in parameters.items() if name.startswith(("embedding.", "output_layer.")))
    with replaced_file(output) as partial:
        partial.write_text(json.dumps({"parameters": sum(parameters.values()), "embedding": embedding}))


if __name__ == "__main__":
    main()
