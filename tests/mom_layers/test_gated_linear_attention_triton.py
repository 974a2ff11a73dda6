"""The Triton gated linear attention against the token-by-token loop in float64: outputs, final states, gradients."""

import os
import subprocess
import sys

import pytest
import torch
from comparison import TOLERANCE, relative_error
from test_gated_linear_attention import NAMES, expected, inputs, outputs_and_gradients

from mom_layers.recur.channel_decay import autograd as entry
from mom_layers.recur.channel_decay.autograd import gated_linear_attention_triton

RAGGED = [0, 1, 63, 64, 65, 0, 130]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that an element read before it is written is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        fresh = getattr(owner, name)

        def poisoned(*args, fresh=fresh, **kwargs):
            out = fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


def run(leaves, cu_seqlens, state=True, final=True, scale=None):
    def kernels(q, k, v, g, cu_seqlens, initial_state):
        return gated_linear_attention_triton(q, k, v, g, cu_seqlens, initial_state, final, scale)

    return outputs_and_gradients(kernels, leaves, cu_seqlens, state, final)


def compare(lengths, heads, key_size, value_size, dtype, decay="usual", state=True, final=True, scale=None):
    leaves, cu_seqlens = inputs(lengths, heads, key_size, value_size, dtype, decay)
    got = run(leaves, cu_seqlens, state, final, scale)
    want = expected(leaves, cu_seqlens, state, final, scale)
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE.get(dtype, 1e-2), errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items() if f"d{name}" in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear_attention_triton_ragged(dtype):
    compare(RAGGED, 1, 16, 32, dtype)


@pytest.mark.parametrize("decay,dtype", [("zero", torch.float32), ("resets", torch.float32), ("usual", torch.bfloat16)])
def test_gated_linear_attention_triton_over_several_groups_of_chunks(decay, dtype):
    compare([64 * 4, 3, 64 * 4 + 5], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize("decay", ["zero", "strong", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear_attention_triton_decays(dtype, decay):
    compare([66], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize(
    ("key_size", "value_size", "dtype"),
    [
        (16, 16, torch.float16),
        (32, 16, torch.float32),
        (64, 128, torch.bfloat16),
        (128, 64, torch.bfloat16),
        (256, 32, torch.float32),
        (256, 256, torch.bfloat16),
    ],
)
def test_gated_linear_attention_triton_sizes(key_size, value_size, dtype):
    compare([35], 2 if key_size == 32 else 1, key_size, value_size, dtype)


@pytest.mark.parametrize(("state", "final"), [(False, False), (False, True), (True, False)])
def test_gated_linear_attention_triton_optional_states(state, final):
    compare([0, 5, 3], 1, 16, 32, torch.float32, state=state, final=final, scale=0.7)


def test_gated_linear_attention_triton_gate_in_bfloat16_and_strided_inputs():
    leaves, cu_seqlens = inputs([20], dtype=torch.float32)
    leaves["g"] = leaves["g"].detach().bfloat16().requires_grad_()
    got, want = run(leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert got["dg"].dtype == torch.bfloat16 and errors.pop("dg") <= 3e-3  # rounded once, to the gate's type
    assert max(errors.values()) <= 1e-5, errors

    q, k, v, g = (leaves[n].detach().transpose(0, 1).contiguous().transpose(0, 1) for n in NAMES[:4])
    assert not q.is_contiguous()
    o, last = gated_linear_attention_triton(q, k, v, g, cu_seqlens, leaves["initial_state"], True)
    assert torch.equal(o, got["o"]) and torch.equal(last, got["final_state"])


def test_gated_linear_attention_triton_gradient_of_the_final_state_alone():
    leaves, cu_seqlens = inputs([66], 1, dtype=torch.float32)
    _, last = gated_linear_attention_triton(*(leaves[n] for n in NAMES[:4]), cu_seqlens, leaves["initial_state"], True)
    got = dict(zip(NAMES, torch.autograd.grad(last.square().sum(), list(leaves.values())), strict=True))
    double = {n: leaf.detach().double().cpu().requires_grad_() for n, leaf in leaves.items()}
    k, v, g, state = (double[n] for n in NAMES[1:])
    left = torch.cat([g[1:], torch.zeros_like(g[:1])]).flip(0).cumsum(0).flip(0).exp()
    last = g.sum(0).exp()[..., None] * state + torch.einsum("rhk,rhv->hkv", k * left, v)
    want = torch.autograd.grad(last.square().sum(), (k, v, g, state))
    assert not got["q"].any()
    for name, gradient in zip(NAMES[1:], want, strict=True):
        assert relative_error(got[name], gradient) <= 1e-5, name


def test_gated_linear_attention_triton_segments_do_not_touch_each_other():
    leaves, cu_seqlens = inputs([3, 65, 0, 20], 1, dtype=torch.float32)
    o, last = gated_linear_attention_triton(*(leaves[n] for n in NAMES[:4]), cu_seqlens, leaves["initial_state"], True)
    (o[3:68].sum() + last[1].sum()).backward()
    for name in NAMES[:4]:
        grad = leaves[name].grad
        assert grad[3:68].any() and not grad[:3].any() and not grad[68:].any(), name
    assert leaves["initial_state"].grad[1].any() and not leaves["initial_state"].grad[[0, 2, 3]].any()


def test_gated_linear_attention_triton_is_deterministic():
    leaves, cu_seqlens = inputs([1, 0, 66], 1, dtype=torch.float32)
    first, second = run(leaves, cu_seqlens), run(leaves, cu_seqlens)
    for name, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[name]), name


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_gated_linear_attention_triton_without_rows(lengths):
    leaves, cu_seqlens = inputs(lengths, dtype=torch.float32)
    qkvg, state = [leaves[n] for n in NAMES[:4]], leaves["initial_state"]
    o, last = gated_linear_attention_triton(*qkvg, cu_seqlens, state, True)
    assert o.shape == (0, 2, 32) and torch.equal(last, state)
    last.square().sum().backward()
    assert torch.equal(state.grad, 2 * state)
    _, last = gated_linear_attention_triton(*qkvg, cu_seqlens, None, True)
    assert not last.any() and last.shape == leaves["initial_state"].shape


def test_gated_linear_attention_triton_refuses(monkeypatch):
    leaves, cu_seqlens = inputs([5, 3], dtype=torch.float32)
    good = [leaf.detach() for leaf in leaves.values()]
    good.insert(4, cu_seqlens)
    monkeypatch.setattr(entry, "decayed_rows", lambda *_: pytest.fail("launched"))

    def refuses(message, position, value):
        with pytest.raises(ValueError, match=message):
            gated_linear_attention_triton(*good[:position], value, *good[position + 1 :])

    refuses(r"k must be \[R, H, K\].*\[8, 2, 32\]", 1, good[2])
    refuses(r"g must be \[8, 2, 16\] as q is, got \[8, 1, 16\]", 3, good[3][:, :1])
    refuses(r"V = 48 .*\(16, 32, 64, 128, 256\)", 2, good[2].repeat(1, 1, 2)[..., :48])
    refuses("share one type.*bfloat16", 2, good[2].bfloat16())
    refuses("g must be of a type.*float64", 3, good[3].double())
    refuses("cu_seqlens must be.*int64", 4, cu_seqlens.long())
    refuses(r"initial_state must be \[2, 2, 16, 32\] float32, got \[1, 2, 16, 32\]", 5, good[5][:1])
    refuses("cu_seqlens on meta", 4, cu_seqlens.to("meta"))


COMPILE_FOR_HOPPER = """
import torch
from compile_only import SHARED_MEMORY, compile_only, left_operands_in_registers
from mom_layers.recur.channel_decay.autograd import gated_linear_attention_triton

compiled = compile_only(90)
borders = torch.tensor([0, 1], dtype=torch.int32)
for size in (64, 128, 256):
    x = torch.zeros(1, 4, size, dtype=torch.bfloat16, requires_grad=True)
    gated_linear_attention_triton(x, x, x, torch.zeros(1, 4, size), borders)[0].sum().backward()
for name, kernel in compiled:
    assert kernel.metadata.shared <= SHARED_MEMORY[90], (name, kernel.metadata.shared)
    assert left_operands_in_registers(kernel) == 0, name
assert len({name for name, _ in compiled}) == 8, sorted(name for name, _ in compiled)
assert sum(kernel.asm["ptx"].count("wgmma.mma_async") for _, kernel in compiled) > 100
"""


def test_gated_linear_attention_triton_compiles_for_hopper_without_left_operands_in_registers():
    """All head sizes fit, and nothing meets the compiler's fault that the forward kernels' file speaks of."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE_FOR_HOPPER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gated_linear_attention_triton_never_waits_for_the_device():
    leaves, cu_seqlens = inputs(RAGGED, 2, 64, 64, torch.bfloat16)

    def forward_and_backward():
        o, last = gated_linear_attention_triton(
            *(leaves[n] for n in NAMES[:4]), cu_seqlens, leaves["initial_state"], True
        )
        (o.float().sum() + last.sum()).backward()

    forward_and_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
