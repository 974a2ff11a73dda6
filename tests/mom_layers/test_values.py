"""Values that are checked on the CPU always, and on a GPU with MOM_CHECK=1."""

import pytest
import torch
from comparison import DEVICE

from mom_layers import MixtureOfMemories
from mom_layers.common.checks import check_borders
from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.scalar_delta import gated_delta_rule
from mom_layers.route.plan import build_routing_plan

BAD = {"unsorted": [0, 5, 3, 8], "negative": [0, -2, 8], "too short": [0, 5], "too long": [0, 9], "late": [1, 8]}


@pytest.fixture(autouse=True)
def checks_on_gpus(monkeypatch):
    monkeypatch.setenv("MOM_CHECK", "1")


def tensor(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("borders", BAD.values(), ids=BAD)
def test_wrong_borders_are_refused_by_every_operation(borders, kernels):
    message = r"must start at 0, never decrease and end at 8, got \[" + ", ".join(map(str, borders))
    q, k, v = (torch.randn(8, 2, 16, device=DEVICE) for _ in range(3))
    gate = -torch.rand(8, 2, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(q, k, v, gate, -gate, tensor(borders), kernels=kernels)
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(q, k, v, q.abs().neg(), tensor(borders), kernels=kernels)
    with pytest.raises(ValueError, match="token_cu_seqlens " + message):
        build_routing_plan(torch.zeros(8, 1, dtype=torch.int64, device=DEVICE), tensor(borders), num_memories=2)
    layer = MixtureOfMemories(16, num_heads=1, head_dim=16, kernels=kernels).to(DEVICE)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 8, 16, device=DEVICE), cu_seqlens=tensor(borders))


@pytest.mark.parametrize("ids", [[[0], [2]], [[-1], [0]]])
def test_memories_that_do_not_exist_are_refused(ids):
    ids = torch.tensor(ids, device=DEVICE)
    with pytest.raises(ValueError, match="memory_ids must hold numbers from 0 to 1, got"):
        build_routing_plan(ids, tensor([0, 2]), num_memories=2)


def test_without_the_variable_a_gpu_is_not_waited_for(monkeypatch):
    monkeypatch.delenv("MOM_CHECK")
    borders = torch.tensor([0, 9], dtype=torch.int32, device="meta")  # a device whose values cannot be read
    check_borders(borders, 8)
    check_borders(tensor([0, 8]), 8)


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_reaches_nothing(padding):
    """Outputs at padding are zero; outputs elsewhere, and every gradient, do not depend on what padding holds."""
    torch.manual_seed(0)
    layer = MixtureOfMemories(16, num_heads=1, head_dim=16, kernels="torch").double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False

    def run(fill):
        layer.zero_grad()
        given = x.masked_fill(~mask[..., None], fill).requires_grad_()
        out, _ = layer(given, token_mask=mask)
        out.square().sum().backward()
        return [out.detach(), given.grad, *(p.grad for p in layer.parameters())]

    clean, filled = run(0.0), run(padding)
    assert not filled[0][~mask].any() and not filled[1][~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(clean, filled, strict=True))
