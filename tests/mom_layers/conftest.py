"""Fixtures of the kernels' tests."""

import pytest
import torch
from triton.runtime.jit import KernelInterface


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a test sees an element that no kernel wrote."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        fresh = getattr(owner, name)

        def poisoned(*args, fresh=fresh, **kwargs):
            out = fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def refused_launches(monkeypatch):
    """Every launch of a Triton kernel raises RuntimeError, on a GPU and in Triton's interpreter."""

    def refuse(self, grid):
        raise RuntimeError(f"the Triton kernel {self.__name__} was launched")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)
