"""The Triton gated linear attention against the token-by-token loop in float64: outputs, final states, gradients."""

import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from comparison import TOLERANCE, relative_error
from test_gated_linear_attention import NAMES, expected, inputs, outputs_and_gradients

from mom_layers.common.chips import Chip, forced
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur import channel_decay
from mom_layers.recur.channel_decay import hopper
from mom_layers.recur.channel_decay import triton as general
from mom_layers.recur.channel_decay.hopper import launches as hopper_launches
from mom_layers.recur.channel_decay.kernel_sets import KERNEL_SETS, kernel_set
from mom_layers.recur.channel_decay.tensors import SPAN, Inputs
from mom_layers.recur.channel_decay.triton import launches
from mom_layers.recur.chunks import Chunks

RAGGED = [0, 1, 63, 64, 65, 0, 130]
gated_linear_attention = functools.partial(channel_decay.gated_linear_attention, kernels="triton")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(leaves, cu_seqlens, state=True, final=True, scale=None):
    def operation(q, k, v, g, cu_seqlens, initial_state):
        return gated_linear_attention(
            q, k, v, g, cu_seqlens, initial_state=initial_state, output_final_state=final, scale=scale
        )

    return outputs_and_gradients(operation, leaves, cu_seqlens, state, final)


def run_leaves(leaves, cu_seqlens):
    """o and the final state, from the initial state."""
    q, k, v, g, state = (leaves[name] for name in NAMES)
    return gated_linear_attention(q, k, v, g, cu_seqlens, initial_state=state, output_final_state=True)


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
def test_gated_linear_attention_triton_over_several_spans(decay, dtype):
    compare([64 * 4, 3, 64 * 4 + 5], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize("decay", ["zero", "strong", "resets", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear_attention_triton_decays(dtype, decay):
    compare([66], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize("dtype,most", [(torch.bfloat16, 120), (torch.float16, 120), (torch.float32, 20)])
def test_chunks_are_whole_up_to_a_limit_of_their_decay(dtype, most):
    """A chunk that decays a little less than the limit, one that decays a little more, and a chunk of few rows."""
    leaves, cu_seqlens = inputs([64 * 2 + 5], 1, 16, 16, dtype)
    a_row = -most * math.log(2) / 64
    with torch.no_grad():
        leaves["g"][:64, :, 0] = 0.99 * a_row
        leaves["g"][64:128, :, 0] = 1.01 * a_row
    q, k, v, g = (leaves[name].detach() for name in NAMES[:4])
    chunks = Chunks.of(cu_seqlens, q.shape[0], SPAN)
    local = general.chunk_local(inputs=Inputs(q, k, v, g, 1.0), chunks=chunks)
    assert local.whole_chunks[:3, 0].tolist() == [1, 0, 1]
    got, want = run(leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE.get(dtype, 1e-2), errors


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
    strided = dict(zip(NAMES, (q, k, v, g, leaves["initial_state"]), strict=True))
    o, last = run_leaves(strided, cu_seqlens)
    assert torch.equal(o, got["o"]) and torch.equal(last, got["final_state"])


def test_gated_linear_attention_triton_gradient_of_the_final_state_alone():
    leaves, cu_seqlens = inputs([66], 1, dtype=torch.float32)
    _, last = run_leaves(leaves, cu_seqlens)
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
    o, last = run_leaves(leaves, cu_seqlens)
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
    o, last = run_leaves(leaves, cu_seqlens)
    assert o.shape == (0, 2, 32) and torch.equal(last, state)
    last.square().sum().backward()
    assert torch.equal(state.grad, 2 * state)
    _, last = gated_linear_attention(*qkvg, cu_seqlens, output_final_state=True)
    assert not last.any() and last.shape == leaves["initial_state"].shape


def test_gated_linear_attention_triton_refuses(monkeypatch):
    leaves, cu_seqlens = inputs([5, 3], dtype=torch.float32)
    good = {name: leaf.detach() for name, leaf in leaves.items()} | {"cu_seqlens": cu_seqlens}
    monkeypatch.setattr(general, "chunk_local", lambda **_: pytest.fail("launched"))

    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            gated_linear_attention(**(good | changes))

    refuses(r"k must be \[R, H, K\].*\[8, 2, 32\]", k=good["v"])
    refuses(r"g must be \[8, 2, 16\] as q is, got \[8, 1, 16\]", g=good["g"][:, :1])
    refuses(r"V = 48 .*\(16, 32, 64, 128, 256\)", v=good["v"].repeat(1, 1, 2)[..., :48], initial_state=None)
    refuses("share one type.*bfloat16", v=good["v"].bfloat16())
    refuses("g must be of a type.*float64", g=good["g"].double())
    refuses("cu_seqlens must be.*int64", cu_seqlens=cu_seqlens.long())
    refuses(r"initial_state must be \[2, 2, 16, 32\], got \[1, 2, 16, 32\]", initial_state=good["initial_state"][:1])
    refuses("initial_state must be float32, got torch.bfloat16", initial_state=good["initial_state"].bfloat16())
    refuses("cu_seqlens must be on .*, got meta", cu_seqlens=cu_seqlens.to("meta"))


def test_hopper_runs_its_own_set_for_the_sizes_that_it_takes():
    def chosen(chip, dtype, k_dim, v_dim):
        with forced(chip=chip):
            return kernel_set(torch.device("cuda", 0), dtype, k_dim, v_dim)

    assert chosen("sm_90", torch.bfloat16, 256, 64) is chosen("sm_90", torch.float16, 64, 256) is hopper
    assert chosen("sm_90", torch.float32, 256, 256) is chosen("sm_90", torch.bfloat16, 32, 256) is general
    assert chosen("sm_80", torch.bfloat16, 256, 256) is chosen("sm_100", torch.bfloat16, 256, 256) is general


@pytest.mark.parametrize("key_size", [64, 128, 256])
@pytest.mark.parametrize("value_size", [64, 128, 256])
@pytest.mark.parametrize("num_states", [1, 100, 10000])
def test_hoppers_tiles_divide_the_head_sizes(key_size, value_size, num_states):
    launch = hopper_launches.recurrence_launch(key_size, value_size, num_states)
    assert value_size % launch.tile == 0 and launch.tile >= 32
    assert key_size % hopper_launches.state_gradients_launch(key_size, value_size).tile == 0


def test_the_last_kernel_set_takes_every_chip():
    assert KERNEL_SETS[-1] is general
    for capability, kilobytes in (((0, 0), 163), ((8, 0), 163), ((9, 0), 227), ((99, 0), 64)):
        chip = Chip("made up", capability, kilobytes * 1024)
        assert general.takes(chip, torch.bfloat16, 16, 256) and general.takes(chip, torch.float32, 256, 16)
    device = torch.device("cpu")
    assert kernel_set(device, torch.float32, 16, 32) is kernel_set(device, torch.float32, 16, 32)


def test_the_shared_memory_of_a_chip_decides_its_tiles(caplog):
    def table(kilobytes, dtype=torch.bfloat16):
        return launches.table_for(Chip("made up", (99, 0), kilobytes * 1024), dtype)

    (wide, medium, narrow), (exact, late) = launches.TABLES, launches.FLOAT32_TABLES
    assert table(227) is wide and table(163) is medium and table(128) is table(99) is narrow
    assert table(227, torch.float32) is table(163, torch.float32) is exact and table(99, torch.float32) is late
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert table(64) is narrow and table(64, torch.float32) is late
    (first, second) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"has {64 * 1024} bytes" in first and first != second


@pytest.mark.parametrize("table", [*launches.TABLES, *launches.FLOAT32_TABLES], ids=lambda table: table.name)
@pytest.mark.parametrize("key_size", [16, 64, 256])
@pytest.mark.parametrize("value_size", [16, 128, 256])
def test_tiles_divide_the_head_sizes(table, key_size, value_size):
    """Grids are counted by whole tiles: a rest would be left out."""
    found = table.launches(key_size, value_size)
    by_key = (found.chunk_local, found.block_scores, found.state_gradients, found.row_gradients, found.block_gradients)
    assert all(key_size % launch.tile == 0 for launch in by_key)
    assert all(value_size % launch.tile == 0 for launch in (found.recurrence, found.score_gradients))


COMPILE = """
import sys
import torch
from compile_only import compiling, left_operands_in_registers
from mom_layers.common.chips import Chip
from mom_layers.recur.channel_decay import gated_linear_attention

name, kilobytes, kernels = sys.argv[1], int(sys.argv[2]), sys.argv[3]
borders = torch.tensor([0] * 64 + [1], dtype=torch.int32)  # as many segments as need no narrower tiles
with compiling(name, chip=Chip("made up", (99, 0), kilobytes * 1024), kernel_set=kernels) as compiled:
    for size in (64, 128, 256):
        x = torch.zeros(1, 4, size, dtype=torch.bfloat16, requires_grad=True)
        gated_linear_attention(x, x, x, torch.zeros(1, 4, size), borders, kernels="triton")[0].sum().backward()
for kernel_name, kernel in compiled:
    assert kernel.metadata.shared <= kilobytes * 1024, (kernel_name, kernel.metadata.shared)
    assert left_operands_in_registers(kernel) == 0, kernel_name
different = 8 if kernels == "Hopper" else 9
assert len({kernel_name for kernel_name, _ in compiled}) == different, sorted(name for name, _ in compiled)
if name == "sm_90":
    assert sum(kernel.asm["ptx"].count("wgmma.mma_async") for _, kernel in compiled) > 100
"""


@pytest.mark.parametrize(
    "chip,kilobytes,kernels",
    [
        ("sm_90", 227, "Hopper"),
        ("sm_90", 227, "general"),
        ("sm_80", 163, "general"),
        ("sm_90", 99, "general"),
        ("sm_89", 99, "general"),
    ],
)
def test_gated_linear_attention_triton_compiles_within_the_shared_memory(chip, kilobytes, kernels):
    """At every head size, by the chip's own table, without the left operands that the compiler treats wrongly.

    A chip of capability 9.0 with 99 KB does not exist: asynchronous products take the most shared memory.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, chip, str(kilobytes), kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gated_linear_attention_triton_never_waits_for_the_device():
    leaves, cu_seqlens = inputs(RAGGED, 2, 64, 64, torch.bfloat16)

    def forward_and_backward():
        o, last = run_leaves(leaves, cu_seqlens)
        (o.float().sum() + last.sum()).backward()

    forward_and_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(HEAD_SIZES, repeat=2)))
def test_gated_linear_attention_triton_at_every_head_size(key_size, value_size):
    """Several launches, for a fault of the compiler may show in some only."""
    for _ in range(3):
        compare([200, 64, 3, 330, 0, 130], 2, key_size, value_size, torch.bfloat16)
