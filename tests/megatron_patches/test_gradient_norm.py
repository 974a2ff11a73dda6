"""The norm of the gradients is computed by Transformer Engine's kernels, also where one kernel is missing there."""

import sys
from types import ModuleType

import pytest
import torch

from megatron_patches import gradient_norm

clip_grads = pytest.importorskip(gradient_norm.MODULE)
WITHOUT = {name: getattr(clip_grads, name) for name in gradient_norm.KERNELS}


def chosen():
    return {target.attribute: target.build(WITHOUT[target.attribute]) for target in gradient_norm.PATCH.targets}


@pytest.fixture
def engine(monkeypatch):
    """A module in the place of Transformer Engine's optimizers, with kernels in plain PyTorch."""
    module = ModuleType("transformer_engine.pytorch.optimizers")
    calls = []

    def norm(chunk, overflow, tensors, each):
        calls.append("norm")
        return torch.stack([tensor.norm() for tensor in tensors[0]]).norm().view(1), None

    def scale(chunk, overflow, tensors, factor):
        calls.append("scale")
        for source, result in zip(*tensors, strict=True):
            result.copy_(source * factor)

    module.multi_tensor_applier = lambda kernel, overflow, tensors, *rest: kernel(65536, overflow, tensors, *rest)
    module.multi_tensor_l2norm, module.multi_tensor_scale, module.calls = norm, scale, calls
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_transformer_engine_without_one_kernel_gives_the_others(engine):
    kernels = chosen()
    assert kernels["l2_norm_impl"] is engine.multi_tensor_l2norm
    apply, gradients = kernels["multi_tensor_applier"], [torch.tensor([3.0]), torch.tensor([[4.0]])]
    found, _ = apply(kernels["l2_norm_impl"], None, [gradients], False)
    assert found.item() == 5
    apply(kernels["multi_tensor_scale_impl"], None, [gradients, gradients], 0.5)
    assert [gradient.item() for gradient in gradients] == [1.5, 2] and engine.calls == ["norm", "scale"]


def test_megatron_keeps_its_choice_where_the_kernel_exists(engine):
    engine.multi_tensor_scale_tensor = object()
    assert chosen() == WITHOUT


def test_megatron_keeps_its_choice_where_another_kernel_is_missing(engine):
    del engine.multi_tensor_scale
    assert chosen() == WITHOUT
