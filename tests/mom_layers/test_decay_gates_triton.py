"""The gated delta rule's gates in Triton against PyTorch's in float64: values and every gradient."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, draw, relative_error

from mom_layers.recur.rules import gated_deltanet
from mom_layers.recur.scalar_delta.gates_triton import decay_gates_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, heads, dtype):
    raw = 4 * draw(rows, 2 * heads + 3, dtype=dtype)
    return raw, draw(heads, seed=1), draw(heads, seed=2) - 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,heads", [(1, 1), (130, 3), (300, 4), (0, 2)])
def test_agrees(rows, heads, dtype):
    raw, A_log, dt_bias = (x.requires_grad_() for x in inputs(rows, heads, dtype))
    exact = [x.detach().double().requires_grad_() for x in (raw, A_log, dt_bias)]

    def gates(raw, A_log, dt_bias, kernels):
        given = {"beta": raw[:, 1 : 1 + heads], "a": raw[:, 2 + heads : 2 + 2 * heads]}
        return gated_deltanet.gates(given, {"A_log": A_log, "dt_bias": dt_bias}, kernels)

    got, expected = gates(raw, A_log, dt_bias, "triton"), gates(*exact, "torch")
    for name in ("g", "beta"):
        assert got[name].dtype == torch.float32 and got[name].shape == (rows, heads)
        if rows:
            assert relative_error(got[name], expected[name]) <= 1e-6, name
    grads = {name: draw(rows, heads, seed=seed) for seed, name in enumerate(("g", "beta"), 3)}
    sum((got[name] * grads[name]).sum() for name in grads).backward()
    sum((expected[name] * grads[name].double()).sum() for name in grads).backward()
    for name, a, b in zip(("raw", "A_log", "dt_bias"), (raw, A_log, dt_bias), exact, strict=True):
        assert a.grad.dtype == a.dtype
        if rows:
            assert relative_error(a.grad, b.grad) <= TOLERANCE.get(a.dtype, 1e-2), name
        else:
            assert not a.grad.any()


def test_small_time_steps_keep_their_digits():
    a = torch.linspace(-30, 30, 601, device=DEVICE)[:, None]
    g, _ = decay_gates_triton(a, a, torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    exact = -torch.log1p(a.double().exp())
    assert ((g - exact) / exact).abs().max() <= 4e-6  # a GPU's exp rounds its argument times log2(e)


def test_refuses_what_does_not_fit():
    raw, A_log, dt_bias = inputs(4, 2, torch.float32)
    with pytest.raises(ValueError, match=r"of one type, got \[4, 2\] torch.float32 and \[3, 2\] torch.float32"):
        decay_gates_triton(raw[:, :2], raw[:3, :2], A_log, dt_bias)
    with pytest.raises(ValueError, match=r"A_log and dt_bias must be \[2\], got \[1\] and \[2\]"):
        decay_gates_triton(raw[:, :2], raw[:, :2], A_log[:1], dt_bias)
