"""The kernels of the exchange between expert-parallel ranks: rows by index out of several buffers; weighted sums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linear_moe.parallel.peer_memory_triton import pull_rows
from linear_moe.parallel.weighted_rows import weighted_sum
from mom_layers.route.plan import build_routing_plan
from mom_layers.route.plan_part import plan_of_memories

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels,first,width", [(24, 0, 24), (24, 8, 16), (37, 5, 20), (1100, 0, 1100)])
@pytest.mark.parametrize("choices", [1, 3])
def test_rows_are_pulled_by_index(dtype, channels, first, width, choices, poisoned_memory):
    random = torch.Generator().manual_seed(0)
    buffers = torch.randn(3, 5, channels, generator=random).to(DEVICE, dtype)
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    wanted = torch.randint(-3, 15, (9, choices), generator=random, dtype=torch.int32).clamp(min=-1).to(DEVICE)
    got = pull_rows(pointers, wanted, buffers[1], first, width)
    rows = torch.cat([buffers.flatten(0, 1)[:, first : first + width].float(), buffers.new_zeros(1, width).float()])
    expected = rows[wanted.long()].sum(1).to(dtype)  # -1 is the row of zeros at the end
    torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("channels", [20, 1100])
def test_a_weighted_sum_counts_the_rows_that_are_here(kernels, channels, poisoned_memory):
    random = torch.Generator().manual_seed(0)
    ids = torch.rand(9, 4, generator=random).argsort(1)[:, :2]
    borders = torch.tensor([0, 9], dtype=torch.int32)
    whole = build_routing_plan(ids, borders, num_memories=4, shared=False, kernels="torch")
    plan, row_here = plan_of_memories(whole, 1, 2)
    choice_of_row = torch.full((plan.num_rows,), -1, dtype=torch.int32)
    here = plan.row_of_choice >= 0
    choice_of_row[plan.row_of_choice[here].long()] = torch.arange(18, dtype=torch.int32).view(9, 2)[here]
    rows = torch.randn(plan.num_rows, channels, generator=random)
    rows[row_here < 0] = float("nan")
    weights = torch.rand(9, 2, generator=random)
    dy = torch.randn(9, channels, generator=random)

    leaves = [rows.to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_()]
    on_device = {name: value.to(DEVICE) for name, value in vars(plan).items() if torch.is_tensor(value)}
    plan_here = type(plan)(**{**vars(plan), **on_device})
    y = weighted_sum(*leaves, plan_here, choice_of_row.to(DEVICE), kernels=kernels)
    drows, dweights = torch.autograd.grad(y, leaves, dy.to(DEVICE))

    exact = [rows.nan_to_num().double().requires_grad_(), weights.double().requires_grad_()]
    chosen = exact[0][plan.row_of_choice.clamp(min=0).long()] * here[..., None]
    expected = (chosen * exact[1][..., None]).sum(1)
    expected_gradients = torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in zip((y, drows, dweights), (expected, *expected_gradients), strict=True):
        assert (got.cpu().double() - wanted).norm() <= 1e-6 * wanted.norm()


COMPILE = """
import sys
sys.path[:0] = [{tests!r}]
import torch
from compile_only import compiling
from linear_moe.parallel.peer_memory_triton import pull_rows

pointers = torch.zeros(4, dtype=torch.int64)
with compiling("sm_90") as kernels:
    for choices, first in ((1, 0), (2, 1024)):
        wanted = torch.zeros(10, choices, dtype=torch.int32)
        pull_rows(pointers, wanted, torch.empty(64, 2048, dtype=torch.bfloat16), first, 1024)
for _, kernel in kernels:
    code = kernel.asm["ptx"]
    print("vectors" if "ld.global.v4.b32" in code and "ld.global.b16" not in code else "single")
"""


def test_rows_of_a_peer_are_read_in_vectors():
    """Nothing tells the compiler that an address is aligned but a hint, and loads of 2 bytes would waste NVLink."""
    tests = Path(__file__).parents[1] / "mom_layers"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE.format(tests=str(tests))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["vectors", "vectors"], done.stderr[-2000:]
