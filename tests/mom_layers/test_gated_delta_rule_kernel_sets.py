"""Which kernels of the gated delta rule a chip gets, with which tiles, and what the compiler makes of them."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mom_layers.common.chips import CHIPS, Chip, forced
from mom_layers.recur.hopper_tiles import tiles
from mom_layers.recur.scalar_delta import blackwell, hopper, kernel_sets, triton
from mom_layers.recur.scalar_delta.hopper import launches as hopper_launches
from mom_layers.recur.scalar_delta.triton.launches import TABLES, Launch, table_for

H100, A100 = Chip("H100", (9, 0), 227 * 1024), Chip("A100", (8, 0), 163 * 1024)
UNKNOWN, SMALL = Chip("a later one", (99, 0), 300 * 1024), Chip("a smaller one", (98, 0), 99 * 1024)
TINY = Chip("a tiny one", (97, 0), 32 * 1024)


def test_a_tile_is_described_as_its_constructor_does():
    x = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
    layout = tiles(x, 64).layout
    assert layout == gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    assert vars(tiles(x, 64)) == vars(TensorDescriptor(x, [5, 128], [128, 1], [64, 64], layout))
    scores = torch.zeros(3, 2, 64, 64, dtype=torch.bfloat16)
    assert vars(tiles(scores, 64)) == vars(TensorDescriptor(scores, [384, 64], [64, 1], [64, 64], layout))
    assert tiles(x[:0], 64).shape == [1, 128] and tiles(x[:0], 64).base.numel() == 128
    unaligned = torch.zeros(641, dtype=torch.bfloat16)[1:].view(5, 2, 64)
    assert tiles(unaligned, 64).base.data_ptr() % 16 == 0 and torch.equal(tiles(unaligned, 64).base, unaligned)


COMPILE = """
import sys
import torch
from compile_only import compiling, left_operands_in_registers
from mom_layers.common.chips import CHIPS, chip_of
from mom_layers.recur.scalar_delta import gated_delta_rule
from mom_layers.recur.scalar_delta.triton.launches import table_for

name, kernels = sys.argv[1:]
x, gate = torch.zeros(1, 4, 256, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1, 4)
cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
with compiling(name, kernel_set=kernels) as compiled:
    limit = CHIPS[name].shared_memory
    if kernels == "general":
        limit = table_for(chip_of(torch.device("cpu")), torch.bfloat16).shared_memory
    gated_delta_rule(x, x, x, gate, gate, cu_seqlens, kernels="triton")[0].sum().backward()
for kernel_name, kernel in compiled:
    assert kernel.metadata.shared <= limit, (kernel_name, kernel.metadata.shared, limit)
    assert left_operands_in_registers(kernel) == 0, kernel_name
assert len(compiled) == (9 if kernels == "Hopper" else 10), compiled
if name == "sm_90":
    assert sum(kernel.asm["ptx"].count("wgmma") for _, kernel in compiled) > (100 if kernels == "Hopper" else 50)
if name == "sm_100":
    assert sum(kernel.asm["ptx"].count("tcgen05.mma") for _, kernel in compiled) > 200
"""


@pytest.mark.parametrize(
    ("chip", "kernels"), [("sm_90", "Hopper"), ("sm_90", "general"), ("sm_80", "general"), ("sm_100", "Blackwell")]
)
def test_gated_delta_rule_triton_compiles_without_left_operands_in_registers(chip, kernels):
    """The largest heads fit, the general set's in the memory that its table names, and no product meets the compiler's
    fault that `triton.chunk_local` describes."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, chip, kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chip", "dtype", "k_dim", "v_dim", "expected_set", "expected_table"),
    [
        (H100, torch.bfloat16, 64, 256, hopper, None),
        (H100, torch.float16, 256, 64, hopper, None),
        (H100, torch.bfloat16, 32, 256, triton, "wide tiles"),
        (H100, torch.bfloat16, 256, 32, triton, "wide tiles"),
        (H100, torch.float32, 256, 256, triton, "float32"),
        (A100, torch.bfloat16, 256, 256, triton, "narrow tiles"),
        (A100, torch.float32, 64, 64, triton, "float32"),
        (UNKNOWN, torch.bfloat16, 256, 256, triton, "wide tiles"),
        (SMALL, torch.bfloat16, 64, 64, triton, "narrowest tiles"),
        (SMALL, torch.float32, 256, 256, triton, "float32, late loads"),
        (CHIPS["sm_86"], torch.float16, 256, 256, triton, "narrowest tiles"),
        (CHIPS["sm_120"], torch.bfloat16, 256, 256, triton, "narrowest tiles"),
        (CHIPS["sm_100"], torch.bfloat16, 256, 16, blackwell, None),
        (CHIPS["sm_103"], torch.float32, 256, 16, triton, "float32"),
        (CHIPS["gfx942"], torch.bfloat16, 256, 256, triton, "tiles for 64 KB"),
    ],
)
def test_kernel_set_of_a_chip(chip, dtype, k_dim, v_dim, expected_set, expected_table, monkeypatch):
    monkeypatch.setattr(kernel_sets, "chip_of", lambda device: chip)
    kernel_sets.kernel_set.cache_clear()
    try:
        assert kernel_sets.kernel_set(torch.device("cuda", 0), dtype, k_dim, v_dim) is expected_set
    finally:
        kernel_sets.kernel_set.cache_clear()
    if expected_table:
        assert table_for(chip, dtype).name == expected_table


def test_kernel_set_is_logged_once(caplog):
    with caplog.at_level(logging.INFO), forced(chip=TINY):
        for _ in range(2):
            kernel_sets.kernel_set(torch.device("cuda", 0), torch.bfloat16, 64, 64)
            table_for(TINY, torch.bfloat16)
    chosen, warned = (record.getMessage() for record in caplog.records)
    assert chosen == "gated delta rule: general kernels for a tiny one, torch.bfloat16, K 64, V 64"
    assert f"a tiny one has {32 * 1024} bytes of shared memory" in warned
    assert caplog.records[1].levelname == "WARNING"


def test_a_set_with_a_problem_is_passed_over_and_the_log_says_why(caplog, monkeypatch):
    monkeypatch.setattr(hopper, "problem", lambda: "its Triton is unknown")
    with caplog.at_level(logging.WARNING), forced(chip="sm_90"):
        chosen = kernel_sets.kernel_set(torch.device("cpu"), torch.bfloat16, 256, 256)
    assert chosen is triton
    (warned,) = (record.getMessage() for record in caplog.records)
    assert warned == "gated delta rule: the Hopper kernels do not run, and slower ones do: its Triton is unknown"
    with forced(kernel_set="Hopper"), pytest.raises(RuntimeError, match="Hopper kernels do not run: its Triton"):
        kernel_sets.kernel_set(torch.device("cpu"), torch.bfloat16, 256, 256)


def test_tables_stand_from_the_widest_tiles_to_the_narrowest():
    needed = [table.shared_memory for table in TABLES]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)


def test_launches_on_an_h100_and_an_a100():
    """Tile, warps and stages that were measured, or are known to run."""
    wide, narrow, narrowest, _ = TABLES
    launches = wide.launches(32, 256)
    assert launches.recurrence == Launch(64, 4, 2) and launches.state_gradients == Launch(32, 4, 1)
    assert launches.score_gradients == Launch(256, 8, 1) and launches.chunk_scores == Launch(32, 4, 3)
    assert wide.launches(256, 32).recurrence == Launch(32, 8, 2)
    launches = narrow.launches(16, 256)
    assert launches.recurrence == Launch(32, 4, 2) and launches.state_gradients == Launch(16, 4, 1, late=True)
    assert narrowest.launches(256, 64).recurrence == Launch(16, 8, 2)
    assert hopper_launches.recurrence_launch(256, 256, 4096) == (128, 8, None)
    assert hopper_launches.recurrence_launch(256, 256, 8) == (32, 8, None)
    assert hopper_launches.recurrence_launch(128, 64, 4096) == (64, 4, None)
    assert [hopper_launches.recurrence_stages(tile) for tile in (32, 64, 128)] == [2, 1, 1]
    assert hopper_launches.state_gradients_launch(64, 256) == (64, 4, None)
    assert hopper_launches.state_gradients_launch(256, 256) == (128, 8, None)
