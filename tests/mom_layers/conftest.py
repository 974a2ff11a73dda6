"""Fixtures of the kernels' tests."""

import pytest
from triton.runtime.jit import KernelInterface


@pytest.fixture
def refused_launches(monkeypatch):
    """Every launch of a Triton kernel raises RuntimeError, on a GPU and in Triton's interpreter."""

    def refuse(self, grid):
        raise RuntimeError(f"the Triton kernel {self.__name__} was launched")

    monkeypatch.setattr(KernelInterface, "__getitem__", refuse)
