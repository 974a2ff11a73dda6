"""What keeps the kernels from running is said in one line, with the value and what to do."""

from types import SimpleNamespace

import pytest
import torch

from mom_layers.common import chips, triton_versions
from mom_layers.common.chips import CHIPS, Chip, chip_of, forced
from mom_layers.kernel_problems import kernel_problem
from mom_layers.recur.channel_delta.triton import launches as channel_delta_launches
from mom_layers.recur.scalar_delta.kernel_sets import kernel_set
from mom_layers.selftest.checks import with_kernels
from mom_layers.settings import MixerSettings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [(chip, dtype) for chip in CHIPS for dtype in (torch.bfloat16, torch.float32)
     if (chip, dtype) != ("gfx942", torch.float32)],  # 64 KB are too few for float32
)  # fmt: skip
def test_every_chip_of_the_table_takes_the_largest_heads(chip, dtype):
    with forced(chip=chip):
        assert kernel_problem(MixerSettings(head_dim=256), dtype, CPU) is None


def test_a_head_size_that_the_kernels_do_not_take():
    problem = kernel_problem(MixerSettings(head_dim=96), torch.bfloat16, CPU)
    assert problem.startswith("head_dim = 96 is not supported by the gated_deltanet kernels: use one of 16, 32, 64")
    assert "kernels='torch'" in problem and "\n" not in problem


def test_a_chip_with_too_little_shared_memory():
    with forced(chip=Chip("a small card", (7, 5), 48 * 1024)):
        problem = kernel_problem(MixerSettings(head_dim=256), torch.bfloat16, CPU)
        assert "a small card has 49152 bytes" in problem and "heads of 256" in problem and "smaller heads" in problem
        assert kernel_problem(MixerSettings(head_dim=128), torch.bfloat16, CPU) is None


def test_the_kernels_of_another_rule_do_not_count(monkeypatch):
    monkeypatch.setattr(channel_delta_launches, "table_for", lambda chip, dtype: SimpleNamespace(shared_memory=1 << 30))
    assert kernel_problem(MixerSettings(rule="gated_deltanet"), torch.float32, CPU) is None
    assert "heads of 256" in kernel_problem(MixerSettings(rule="kda"), torch.float32, CPU)


@pytest.mark.parametrize("rule", sorted(set(with_kernels()) - {"based", "rebased"}))  # whose heads are of 16
def test_every_rule_needs_the_shared_memory_of_its_kernels(rule):
    with forced(chip=Chip("a small card", (7, 5), 16 * 1024)):
        assert "heads of 256" in kernel_problem(MixerSettings(rule=rule), torch.bfloat16, CPU)


def test_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setattr(triton_versions, "VERSION", (3, 1))
    assert "Triton 3.1 is installed, and the kernels need 3.5" in kernel_problem(MixerSettings(), torch.bfloat16, CPU)


@pytest.mark.parametrize("version", [(3, 5), (3, 10), (4, 0)])
def test_hopper_takes_the_general_set_where_gluon_is_unknown(version, monkeypatch):
    monkeypatch.setattr(triton_versions, "VERSION", version)
    triton_versions.gluon_problem.cache_clear()
    try:
        with forced(chip="sm_90"):
            assert kernel_set(CPU, torch.bfloat16, 256, 256).NAME == "general"
            assert "known to compile with Triton 3.6 to 3.9" in triton_versions.gluon_problem()
    finally:
        triton_versions.gluon_problem.cache_clear()


def test_a_chip_and_a_set_are_forced_by_the_environment(monkeypatch):
    monkeypatch.setenv("MOM_CHIP", "sm_100")
    monkeypatch.setenv("MOM_KERNEL_SET", "general")
    chips._from_environment.cache_clear()
    try:
        assert chip_of(CPU) is CHIPS["sm_100"] and chips.forced_kernel_set() == "general"
        monkeypatch.setenv("MOM_CHIP", "sm_1")
        chips._from_environment.cache_clear()
        with pytest.raises(ValueError, match="no chip 'sm_1': choose one of sm_80"):
            chip_of(CPU)
    finally:
        chips._from_environment.cache_clear()
    monkeypatch.undo()
    chips._from_environment.cache_clear()
