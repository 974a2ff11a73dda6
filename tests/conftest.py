"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are defined."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.repair()
    interpreter.hasten()
    interpreter.check_addresses()
torch.set_num_threads(1)  # tests run side by side, and their tensors are small


@pytest.fixture(autouse=True)
def command_line_of_its_own(monkeypatch):
    """A command that a test calls names itself in sys.argv, which the next test must not see."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a test sees an element that no kernel wrote."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        fresh = getattr(owner, name)

        def poisoned(*args, fresh=fresh, **kwargs):
            out = fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
