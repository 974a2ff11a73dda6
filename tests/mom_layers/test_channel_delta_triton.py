"""The Triton delta rule with a decay a channel against the loop in float64: outputs, states, every gradient."""

import os
import subprocess
import sys

import pytest
import torch
from comparison import DEVICE, TOLERANCE, relative_error
from test_channel_delta import NAMES, chunked, expected, inputs, outputs_and_gradients

from mom_layers.common.chips import forced
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.channel_delta import channel_delta_rule, initial_state_gradient

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Triton's interpreter takes seconds for a thousand rows.
RAGGED = [0, 1, 63, 65, 0, 130] if DEVICE == "cpu" else [0, 1, 2, 63, 64, 65, 0, 517, 600, 3]
BOUNDS = TOLERANCE | {torch.float16: 1e-2}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(leaves, cu_seqlens, state=True, final=True, scale=None):
    def operation(*arguments):
        *rows, ends, initial_state = arguments
        return channel_delta_rule(
            *rows, ends, initial_state=initial_state, output_final_state=final, scale=scale, kernels="triton"
        )

    return outputs_and_gradients(operation, leaves, cu_seqlens, state, final)


def compare(lengths, heads, key_size, value_size, dtype, decay="usual", strengths="numbers", **options):
    leaves, cu_seqlens = inputs(lengths, heads, key_size, value_size, dtype, decay, strengths)
    got, want = run(leaves, cu_seqlens, **options), expected(leaves, cu_seqlens, **options)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= BOUNDS[dtype], errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items() if f"d{name}" in got)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("strengths", ["numbers", "channels"])
def test_ragged_segments(strengths, dtype):
    compare(RAGGED, 2, 16, 32, dtype, strengths=strengths)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("decay", ["zero", "fast", "strong", "resets", "jumps"])
def test_every_kind_of_decay(decay, dtype):
    """From no decay, where a chunk is one block, to channels that forget everything, where pairs meet on six levels."""
    if (dtype, decay) == (torch.float16, "strong"):
        decay = "resets"  # exp(-20) is zero in float16, and all that "strong" leaves of a state is as small
    compare([70, 64], 1, 32, 16, dtype, decay=decay, strengths="channels")


@pytest.mark.parametrize("state,final", [(False, False), (True, False), (False, True)])
def test_without_states(state, final):
    compare([5, 0, 66], 1, 16, 16, torch.float32, strengths="erase channels", state=state, final=final, scale=0.7)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [1, 1, 1]])
def test_few_rows(lengths):
    compare(lengths, 1, 16, 16, torch.float32)


@pytest.mark.parametrize("strengths", ["numbers", "channels"])
def test_more_chunks_than_a_span(strengths):
    """The states between those that the forward pass stored are computed again."""
    compare([9 * 64 + 3], 1, 16, 16, torch.float32, strengths=strengths)


def sizes():
    if DEVICE == "cpu" and not os.environ.get("MOM_ALL_LAYOUTS"):
        return [(64, 128), (128, 64), (256, 256)]
    return [(k, v) for k in HEAD_SIZES for v in HEAD_SIZES]


@pytest.mark.parametrize("key_size,value_size", sizes())
def test_head_sizes(key_size, value_size):
    compare([3, 66] if DEVICE == "cpu" else [3, 66, 700], 1, key_size, value_size, torch.bfloat16)


@pytest.mark.parametrize(
    ("key_size", "value_size", "strengths"), [(16, 64, "numbers"), (32, 16, "channels"), (256, 16, "channels")]
)
def test_tiles_that_reach_past_the_head_size(key_size, value_size, strengths):
    """Hopper's tiles of row gradients, and of recurrences over 256 keys, have at least 64 columns."""
    with forced("sm_90"):
        compare([3, 70], 1, key_size, value_size, torch.bfloat16, decay="resets", strengths=strengths)


def test_the_initial_states_gradient_needs_no_values():
    leaves, cu_seqlens = inputs([5, 0, 70], dtype=torch.float32, strengths="channels")
    q, k, v, g, erase, write, state = (leaves[name] for name in NAMES)
    o, _ = channel_delta_rule(q, k, v, g, erase, write, cu_seqlens, initial_state=state, kernels="torch")
    do = torch.randn_like(o)
    (want,) = torch.autograd.grad(o, state, do)
    assert relative_error(initial_state_gradient(q, k, g, erase, do, cu_seqlens, kernels="triton"), want) <= 1e-5


def test_a_second_run_gives_the_same_bits():
    leaves, cu_seqlens = inputs([70, 3], 1, dtype=torch.bfloat16)
    first, second = run(leaves, cu_seqlens), run(leaves, cu_seqlens)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_kernels_follow_the_chunked_path():
    """One level of blocks, where the loop's rounding is far away: the difference is float32's."""
    leaves, cu_seqlens = inputs([130], 1, dtype=torch.float32)
    got, want = run(leaves, cu_seqlens), outputs_and_gradients(chunked, leaves, cu_seqlens)
    assert max(relative_error(got[name], want[name]) for name in want) <= 2e-6


@pytest.mark.parametrize(
    "key_size,change,message",
    [
        (48, {}, "head size K = 48 is not supported"),
        (16, {"v": torch.float16}, "q, k and v must share one type"),
        (16, {"g": torch.float64}, "g must be of a type in"),
    ],
)
def test_inputs_that_the_kernels_do_not_take_are_named(key_size, change, message):
    leaves, cu_seqlens = inputs([9], key_size=key_size, dtype=torch.bfloat16)
    rows = [leaves[name].to(change.get(name, leaves[name].dtype)) for name in NAMES[:6]]
    with pytest.raises(ValueError, match=message):
        channel_delta_rule(*rows, cu_seqlens, kernels="triton")


COMPILE = """
import sys
import torch
from compile_only import compiling, left_operands_in_registers
from mom_layers.common.chips import CHIPS
from mom_layers.recur.channel_delta import channel_delta_rule
from product_addresses import unknown_addresses
from undefined_registers import undefined_registers

rows, heads = 1024, 2
keys, values = map(int, sys.argv[1:])
borders = torch.tensor([0, rows], dtype=torch.int32)
k, v = (torch.zeros(rows, heads, n, dtype=torch.bfloat16, requires_grad=True) for n in (keys, values))
strength = torch.zeros(rows, heads, requires_grad=True)
with compiling("sm_90") as compiled:
    o, _ = channel_delta_rule(k, k, v, 0.0 * k.float(), strength, strength, borders, kernels="triton")
    o.sum().backward()
for name, kernel in compiled:
    assert kernel.metadata.shared <= CHIPS["sm_90"].shared_memory, (name, kernel.metadata.shared)
    assert left_operands_in_registers(kernel) == 0, name
    assert not undefined_registers(kernel), (name, undefined_registers(kernel))
    assert not unknown_addresses(kernel), (name, unknown_addresses(kernel))
assert len({name for name, _ in compiled}) == 8, sorted(name for name, _ in compiled)
assert sum(kernel.asm["ptx"].count("wgmma.mma_async") for _, kernel in compiled) > 50
"""


@pytest.mark.parametrize("key_size,value_size", [(16, 64), (128, 256), (256, 16)])
def test_hopper_reads_defined_registers(key_size, value_size):
    """Few segments and narrow heads: there ptxas of CUDA 12.8 took addresses from unwritten registers."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(key_size), str(value_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
