"""The Triton scalar decay against the token-by-token loop in float64: outputs, final states, gradients."""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
from comparison import DEVICE, TOLERANCE, relative_error
from test_scalar_decay import NAMES, expected, inputs, outputs_and_gradients

from mom_layers.common.chips import Chip, forced
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur import scalar_decay as family
from mom_layers.recur.scalar_decay import tensors
from mom_layers.recur.scalar_decay import triton as general
from mom_layers.recur.scalar_decay.kernel_sets import KERNEL_SETS, kernel_set
from mom_layers.recur.scalar_decay.operation import SIZES, initial_state_gradient_triton
from mom_layers.recur.scalar_decay.triton import launches

RAGGED = [0, 1, 63, 64, 65, 0, 130]
scalar_decay = functools.partial(family.scalar_decay, kernels="triton")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(leaves, cu_seqlens, state=True, final=True, scale=None):
    def operation(q, k, v, g, cu_seqlens, initial_state):
        return scalar_decay(q, k, v, g, cu_seqlens, initial_state=initial_state, output_final_state=final, scale=scale)

    return outputs_and_gradients(operation, leaves, cu_seqlens, state, final)


def compare(lengths, heads, key_size, value_size, dtype, decay="usual", state=True, final=True, scale=None):
    leaves, cu_seqlens = inputs(lengths, heads, key_size, value_size, dtype, decay)
    if decay == "fixed" and dtype != torch.float32:
        leaves["g"] = leaves["g"].detach()  # its gradient is one sum over all rows, whose terms nearly cancel
    got = run(leaves, cu_seqlens, state, final, scale)
    want = expected(leaves, cu_seqlens, state, final, scale)
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE.get(dtype, 1e-2), errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items() if f"d{name}" in got)


@pytest.fixture
def whole_segments(monkeypatch):
    """Segments are not cut into parts, as where there are many."""
    monkeypatch.setattr(tensors, "PROGRAMS", 0)


@pytest.mark.parametrize("decay", ["usual", "fixed", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_decay_triton_ragged(dtype, decay):
    compare(RAGGED, 2 if decay == "fixed" else 1, 16, 32, dtype, decay)


@pytest.mark.parametrize("decay,dtype", [("zero", torch.float32), ("resets", torch.float32), ("usual", torch.bfloat16)])
def test_scalar_decay_triton_over_several_spans_and_parts(decay, dtype):
    compare([64 * 8, 3, 64 * 16 + 5], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize("decay,dtype", [("usual", torch.float32), ("fixed", torch.bfloat16)])
def test_scalar_decay_triton_over_several_spans(whole_segments, decay, dtype):
    compare([64 * 8, 3, 0, 64 * 9 + 5], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize("decay", ["zero", "strong", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_decay_triton_decays(dtype, decay):
    compare([66], 1, 16, 16, dtype, decay)


@pytest.mark.parametrize(
    ("key_size", "value_size", "dtype"),
    [
        (16, 16, torch.float16),
        (32, 16, torch.float32),
        (160, 16, torch.float32),
        (48, 80, torch.bfloat16),
        (64, 128, torch.bfloat16),
        (128, 64, torch.bfloat16),
        (16, 160, torch.bfloat16),
        (256, 32, torch.float32),
        (256, 256, torch.bfloat16),
    ],
)
def test_scalar_decay_triton_sizes(key_size, value_size, dtype):
    compare([35, 70] if dtype == torch.float32 else [35], 2 if key_size == 32 else 1, key_size, value_size, dtype)


@pytest.mark.parametrize("decay", ["usual", "fixed"])
@pytest.mark.parametrize(("state", "final"), [(False, False), (False, True), (True, False)])
def test_scalar_decay_triton_optional_states(state, final, decay):
    compare([0, 5, 3], 1, 16, 32, torch.float32, decay, state=state, final=final, scale=0.7)


def test_scalar_decay_triton_without_a_gradient_of_the_decay():
    """Neither a decay by row nor a fixed decay needs a gradient: no sums for it are stored."""
    for decay in ("usual", "fixed"):
        leaves, cu_seqlens = inputs([70, 3], 1, dtype=torch.float32, decay=decay)
        leaves["g"] = leaves["g"].detach()
        o, _ = scalar_decay(*(leaves[n] for n in NAMES[:4]), cu_seqlens)
        got = torch.autograd.grad(o.square().sum(), [leaves[n] for n in NAMES[:3]])
        double = {n: leaf.detach().double().cpu().requires_grad_() for n, leaf in leaves.items()}
        o, _ = family.scalar_decay(*(double[n] for n in NAMES[:4]), cu_seqlens.cpu())
        want = torch.autograd.grad(o.square().sum(), [double[n] for n in NAMES[:3]])
        assert all(relative_error(mine, theirs) <= 1e-5 for mine, theirs in zip(got, want, strict=True)), decay


def test_scalar_decay_triton_gate_in_bfloat16_and_strided_inputs():
    leaves, cu_seqlens = inputs([20], dtype=torch.float32)
    leaves["g"] = leaves["g"].detach().bfloat16().requires_grad_()
    got, want = run(leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert got["dg"].dtype == torch.bfloat16 and errors.pop("dg") <= 3e-3  # rounded once, to the gate's type
    assert max(errors.values()) <= 1e-5, errors

    strided = {n: leaves[n].detach().transpose(0, 1).contiguous().transpose(0, 1) for n in NAMES[:4]}
    assert not strided["q"].is_contiguous()
    o, last = scalar_decay(
        *strided.values(), cu_seqlens, initial_state=leaves["initial_state"], output_final_state=True
    )  # fmt: skip
    assert torch.equal(o, got["o"]) and torch.equal(last, got["final_state"])


@pytest.mark.parametrize("decay", ["usual", "none"])
def test_scalar_decay_triton_gradient_of_the_final_state_alone(decay):
    leaves, cu_seqlens = inputs([66, 0], 1, dtype=torch.float32, decay=decay)

    def loss(leaves, cu_seqlens, kernels):
        q, k, v = (leaves[n] for n in NAMES[:3])
        last = family.scalar_decay(
            q, k, v, leaves.get("g"), cu_seqlens,
            initial_state=leaves["initial_state"], output_final_state=True, kernels=kernels,
        )[1]  # fmt: skip
        return last.square().sum()

    wanted = [n for n in leaves if n != "q"]
    got = torch.autograd.grad(loss(leaves, cu_seqlens, "triton"), list(leaves.values()))
    double = {n: leaf.detach().double().cpu().requires_grad_() for n, leaf in leaves.items()}
    want = torch.autograd.grad(loss(double, cu_seqlens.cpu(), "torch"), [double[n] for n in wanted])
    assert not got[0].any()
    for name, mine, theirs in zip(wanted, got[1:], want, strict=True):
        assert relative_error(mine, theirs) <= 1e-5, name


@pytest.mark.parametrize("decay", ["usual", "fixed", "none"])
@pytest.mark.parametrize("lengths", [[3, 0, 66], [600, 0, 520]])
def test_the_initial_states_gradient_alone(decay, lengths):
    """As context parallelism computes the gradient, with parts and without."""
    leaves, cu_seqlens = inputs(lengths, 1, dtype=torch.float32, decay=decay)
    do = torch.randn_like(leaves["v"])
    q, k, v, g, state = leaves["q"], leaves["k"], leaves["v"], leaves.get("g"), leaves["initial_state"]
    o, _ = family.scalar_decay(q, k, v, g, cu_seqlens, initial_state=state, kernels="torch")
    (want,) = torch.autograd.grad(o, state, do)
    got = initial_state_gradient_triton(q, g, do, cu_seqlens)
    assert relative_error(got, want) <= 1e-5
    with pytest.raises(ValueError, match=r"g must be \[\d+, 1\], or \[1\] for all rows, or None"):
        initial_state_gradient_triton(q, q, do, cu_seqlens)


def test_scalar_decay_triton_segments_do_not_touch_each_other():
    leaves, cu_seqlens = inputs([3, 65, 0, 20], 1, dtype=torch.float32)
    q, k, v, g, state = (leaves[name] for name in NAMES)
    o, last = scalar_decay(q, k, v, g, cu_seqlens, initial_state=state, output_final_state=True)
    (o[3:68].sum() + last[1].sum()).backward()
    for name in NAMES[:4]:
        grad = leaves[name].grad
        assert grad[3:68].any() and not grad[:3].any() and not grad[68:].any(), name
    assert state.grad[1].any() and not state.grad[[0, 2, 3]].any()


def test_scalar_decay_triton_is_deterministic():
    leaves, cu_seqlens = inputs([1, 0, 66], 1, dtype=torch.float32)
    first, second = run(leaves, cu_seqlens), run(leaves, cu_seqlens)
    for name, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[name]), name


@pytest.mark.parametrize("decay", ["usual", "fixed"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_scalar_decay_triton_without_rows(lengths, decay):
    leaves, cu_seqlens = inputs(lengths, dtype=torch.float32, decay=decay)
    qkvg, state = [leaves[n] for n in NAMES[:4]], leaves["initial_state"]
    o, last = scalar_decay(*qkvg, cu_seqlens, initial_state=state, output_final_state=True)
    assert o.shape == (0, 2, 32) and torch.equal(last, state)
    last.square().sum().backward()
    assert torch.equal(state.grad, 2 * state)
    _, last = scalar_decay(*qkvg, cu_seqlens, output_final_state=True)
    assert not last.any() and last.shape == leaves["initial_state"].shape


def test_scalar_decay_triton_refuses(monkeypatch):
    leaves, cu_seqlens = inputs([5, 3], dtype=torch.float32)
    good = {name: leaf.detach() for name, leaf in leaves.items()} | {"cu_seqlens": cu_seqlens}
    monkeypatch.setattr(general, "walk", lambda **_: pytest.fail("launched"))

    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            scalar_decay(**(good | changes))

    refuses(r"k must be \[R, H, K\].*\[8, 2, 32\]", k=good["v"])
    refuses(r"g must be \[8, 2\], or \[2\] for all rows, or None, got \[8, 1\]", g=good["g"][:, :1])
    refuses(r"V = 40 .*\(16, 32, 48, .* 256\)", v=good["v"].repeat(1, 1, 2)[..., :40], initial_state=None)
    refuses("share one type.*bfloat16", v=good["v"].bfloat16())
    refuses("g must be of a type.*float64", g=good["g"].double())
    refuses("cu_seqlens must be.*int64", cu_seqlens=cu_seqlens.long())
    refuses("initial_state must be float32, got torch.bfloat16", initial_state=good["initial_state"].bfloat16())
    refuses("cu_seqlens must be on .*, got meta", cu_seqlens=cu_seqlens.to("meta"))


def test_few_segments_are_cut_into_parts():
    """About PROGRAMS programs in all, in whole spans; with enough segments, a part for every segment."""

    def cuts(segments, rows, programs):
        cu_seqlens = torch.arange(segments + 1, dtype=torch.int32, device=DEVICE) * (rows // segments)
        return tensors.Cuts.of(cu_seqlens, rows, programs, False)

    few = cuts(2, 4096, 64)
    assert few.in_parts and few.part_chunks * 64 == 1024 and few.parts.offsets.tolist() == [0, 2, 4]
    many = cuts(8, 4096, 32)
    assert not many.in_parts and many.parts.offsets.tolist() == list(range(9)) and many.chunks is None
    short = cuts(2, 512, 64)
    assert not short.in_parts and short.parts.offsets.tolist() == [0, 1, 2]


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

    (wide, narrow), (exact,) = launches.TABLES, launches.FLOAT32_TABLES
    assert table(227) is wide and table(163) is table(99) is narrow
    assert table(227, torch.float32) is table(99, torch.float32) is exact
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert table(64) is narrow and table(64, torch.float32) is exact
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and all(f"has {64 * 1024} bytes" in warning for warning in warnings)


@pytest.mark.parametrize("table", [*launches.TABLES, *launches.FLOAT32_TABLES], ids=lambda table: table.name)
def test_tiles_divide_the_head_sizes(table):
    """But for the narrowest tiles, whose last columns are masked."""
    for a_dim, c_dim in itertools.product(SIZES, repeat=2):
        found = table.launches(a_dim, c_dim)
        for launch in (found.walk, found.walk_with_terms, found.part_states):
            assert c_dim % launch.tile == 0 or launch.tile == table.narrowest


@pytest.mark.parametrize(("key_size", "value_size"), [(48, 80), (160, 16)])
def test_tiles_that_reach_past_the_head_size(key_size, value_size):
    """Hopper's tiles have at least 64 columns."""
    with forced("sm_90"):
        compare([3, 70], 1, key_size, value_size, torch.bfloat16)


COMPILE = """
import sys
import torch
from compile_only import compiling, left_operands_in_registers
from product_addresses import unknown_addresses
from undefined_registers import undefined_registers
from mom_layers.common.chips import Chip
from mom_layers.recur.scalar_decay import scalar_decay

name, kilobytes = sys.argv[1], int(sys.argv[2])
hopper = (name, kilobytes) == ("sm_90", 227)
rows = 4096
borders = torch.tensor([0, rows], dtype=torch.int32)
with compiling(name, chip=Chip("made up", (99, 0), kilobytes * 1024)) as compiled:
    for keys, values in ((64, 64), (128, 128), (256, 256), *(((64, 16), (128, 80)) if hopper else ())):
        x, v = (torch.zeros(rows, 4, n, dtype=torch.bfloat16, requires_grad=True) for n in (keys, values))
        for g in (torch.zeros(rows, 4, requires_grad=True), torch.zeros(4), None)[0 if keys == values else 2 :]:
            scalar_decay(x, x, v, g, borders, kernels="triton")[0].sum().backward()
for kernel_name, kernel in compiled:
    assert kernel.metadata.shared <= kilobytes * 1024, (kernel_name, kernel.metadata.shared)
    assert left_operands_in_registers(kernel) == 0, kernel_name
    assert not (hopper and undefined_registers(kernel)), (kernel_name, undefined_registers(kernel))
    assert not (hopper and unknown_addresses(kernel)), (kernel_name, unknown_addresses(kernel))
assert len({kernel_name for kernel_name, _ in compiled}) == 5, sorted(kernel_name for kernel_name, _ in compiled)
if name == "sm_90":
    assert sum(kernel.asm["ptx"].count("wgmma.mma_async") for _, kernel in compiled) > 100
"""


@pytest.mark.parametrize("chip,kilobytes", [("sm_90", 227), ("sm_80", 163), ("sm_90", 99), ("sm_89", 99)])
def test_scalar_decay_triton_compiles_within_the_shared_memory(chip, kilobytes):
    """At every head size, by the chip's own table, without the left operands that the compiler treats wrongly.

    A chip of capability 9.0 with 99 KB does not exist: asynchronous products take the most shared memory.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, chip, str(kilobytes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["usual", "none"])
def test_scalar_decay_triton_never_waits_for_the_device(decay):
    leaves, cu_seqlens = inputs(RAGGED, 2, 64, 64, torch.bfloat16, decay)

    def forward_and_backward():
        o, last = scalar_decay(
            *(leaves.get(n) for n in NAMES[:4]), cu_seqlens,
            initial_state=leaves["initial_state"], output_final_state=True,
        )  # fmt: skip
        (o.float().sum() + last.sum()).backward()

    forward_and_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["usual", "fixed", "none"])
@pytest.mark.parametrize(("key_size", "value_size"), [*itertools.product(HEAD_SIZES, repeat=2), (160, 64), (256, 48)])
def test_scalar_decay_triton_at_every_head_size(key_size, value_size, decay):
    """Several launches, for a fault of the compiler may show in some only."""
    for _ in range(3):
        compare([200, 64, 3, 700, 0, 130], 2, key_size, value_size, torch.bfloat16, decay)
