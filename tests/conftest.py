"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are defined."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.repair()
    interpreter.hasten()
torch.set_num_threads(1)  # tests run side by side, and their tensors are small


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
