"""The short self-test before a run: when it runs, what is kept, what other ranks see, what a wrong kernel says."""

import argparse
import json
import logging
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from linear_moe.entry import kernel_check
from linear_moe.entry.arguments import add_mom_arguments, fill_mom_arguments
from linear_moe.entry.environment import read_settings
from linear_moe.entry.kernel_check import KernelError, check_kernels, plan_of
from mom_layers.selftest.cases import Line
from mom_layers.selftest.processes import check_all

RIGHT = Line("gla", "2 heads", error=1e-3, bound=1e-2, of="o")
WRONG = Line("gla", "2 heads", right=False, wrong=["dk is off by 0.5, the bound is 0.01"])
LOST = Line("gla", "", right=False, failure="OutOfMemoryError: CUDA out of memory", unknown=True)


def arguments(*words):
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args(["--token-mixer", "mom", "--hidden-size", "64", *words])
    fill_mom_arguments(args)
    args.params_dtype = torch.bfloat16
    return args


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one GPU; `lines` are what its checks give, `runs` the plans that were checked."""

    class Machine:
        lines, runs, chip, triton = [RIGHT], [], "a chip (sm_99)", "3.6.0"

    found = Machine()
    found.runs = []
    found.kept = tmp_path / "cache" / "mom-kernel-checks"

    def check(plan, workers):
        found.runs.append(plan)
        return {"gla": found.lines}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(kernel_check, "chip_name", lambda device: found.chip)
    monkeypatch.setattr(kernel_check, "triton_version", lambda: found.triton)
    monkeypatch.setattr(kernel_check, "check_all", check)
    monkeypatch.setattr(kernel_check, "kernel_problem", lambda settings, dtype, device: None)
    monkeypatch.setattr(kernel_check, "node_folder", lambda: tmp_path / "node")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("LOCAL_RANK", kernel_check.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("linear_moe")
    monkeypatch.setattr(logger, "propagate", True)
    return found


def test_a_pair_of_chip_and_versions_is_checked_once(machine, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        check_kernels(arguments())
    assert "checking them once on a chip (sm_99) with Triton 3.6.0" in caplog.text and "1 are right" in caplog.text
    check_kernels(arguments())
    assert len(machine.runs) == 1
    machine.triton = "3.7.0"
    check_kernels(arguments())
    machine.chip = "another (sm_98)"
    check_kernels(arguments())
    check_kernels(arguments("--mom-head-dim", "128"))
    monkeypatch.setattr(kernel_check, "kernels_digest", lambda: "other kernels")
    check_kernels(arguments("--mom-head-dim", "128"))
    assert len(machine.runs) == 5
    assert len(list(machine.kept.iterdir())) == 5


@pytest.mark.parametrize("words", [["--no-kernel-check"], ["--mom-kernels", "torch"], ["--token-mixer", "attention"]])
def test_runs_that_are_not_checked(machine, words):
    check_kernels(arguments(*words))
    assert machine.runs == []


def test_a_problem_is_said_before_any_check(machine, monkeypatch):
    seen = []

    def problem(settings, dtype, device):
        seen.append((settings.head_dim, device))
        return "heads of 64 do not fit"

    monkeypatch.setattr(kernel_check, "kernel_problem", problem)
    with pytest.raises(KernelError, match="^heads of 64 do not fit$"):
        check_kernels(arguments("--mom-head-dim", "64"))
    assert seen == [(64, torch.device("cuda", 0))] and machine.runs == []


def test_the_environment_switches_the_check_off(machine, monkeypatch):
    monkeypatch.setenv(kernel_check.VARIABLE, "0")
    check_kernels(arguments())
    assert machine.runs == []
    assert read_settings({kernel_check.VARIABLE: "0"}) == {"token_mixer": "mom"}


def test_a_wrong_kernel_ends_the_run_each_time(machine):
    machine.lines = [RIGHT, WRONG]
    for _ in range(2):
        with pytest.raises(KernelError) as error:
            check_kernels(arguments())
        assert str(error.value).startswith(
            "wrong kernels on a chip (sm_99) with Triton 3.6.0, PyTorch "
        ) and "gla (2 heads): dk is off by 0.5, the bound is 0.01" in str(error.value)
        assert "--mom-kernels torch" in str(error.value) and "another version of Triton" in str(error.value)
    assert len(machine.runs) == 2 and not machine.kept.exists()


def test_the_message_is_short_where_every_kernel_fails():
    failed = [Line(f"kernel {n}", "", right=False, failure="RuntimeError: Cannot find ptxas") for n in range(9)]
    message = kernel_check.describe(failed, "a chip")
    assert message.startswith("kernels fail on a chip: kernel 0: RuntimeError: Cannot find ptxas | kernel 1: ")
    assert "kernel 2" in message and "kernel 3" not in message and "| and 6 more. Use --mom-kernels torch" in message


def test_a_check_that_could_not_run_ends_nothing_and_is_not_kept(machine, caplog):
    machine.lines = [RIGHT, LOST]
    check_kernels(arguments())
    assert "1 of 2 could not be checked on a chip (sm_99)" in caplog.text and "out of memory" in caplog.text
    assert not machine.kept.exists()


@pytest.mark.parametrize("lines", [[RIGHT], [WRONG], [LOST]], ids=["right", "wrong", "unknown"])
def test_other_ranks_wait_for_the_first(machine, monkeypatch, tmp_path, lines):
    """Each rank has a cache of its own here."""
    machine.lines, ends, looked = lines, {}, threading.Event()

    def sleep(seconds):
        looked.set()
        time.sleep(seconds)

    monkeypatch.setattr(kernel_check, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
    monkeypatch.setattr(kernel_check, "LOOK_AGAIN", 0.01)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache of rank 1"))

    def second():
        try:
            check_kernels(arguments())
            ends["second"] = "trains"
        except KernelError as error:
            ends["second"] = str(error)

    thread = threading.Thread(target=second)
    thread.start()
    assert looked.wait(30)  # the variables of rank 1 have been read
    assert ends == {} and machine.runs == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache of rank 0"))
    try:
        check_kernels(arguments())
    except KernelError as error:
        ends["first"] = str(error)
    thread.join(timeout=10)
    assert len(machine.runs) == 1
    assert ends == ({"first": ends["first"], "second": ends["first"]} if lines == [WRONG] else {"second": "trains"})


def test_other_ranks_do_not_wait_for_ever(machine, monkeypatch, caplog):
    monkeypatch.setattr(kernel_check, "WAIT", 0.05)
    monkeypatch.setattr(kernel_check, "LOOK_AGAIN", 0.01)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_kernels(arguments())
    assert "no result of the check" in caplog.text and machine.runs == []


def test_an_old_message_does_not_end_a_new_run(machine, monkeypatch):
    machine.lines = [WRONG]
    with pytest.raises(KernelError):
        check_kernels(arguments())
    (file,) = kernel_check.node_folder().iterdir()
    assert "dk is off" in json.loads(file.read_text())["result"]
    os.utime(file, (time.time() - 3600,) * 2)
    monkeypatch.setattr(kernel_check, "WAIT", 0.05)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_kernels(arguments())


def test_a_folder_that_cannot_be_written_ends_nothing(machine, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        check_kernels(arguments())
    assert "is not kept in" in caplog.text


def test_the_plan_follows_the_arguments():
    args = arguments(
        "--mom-rule", "gla", "--mom-num-heads", "8", "--mom-head-dim", "64", "--mom-expand-v", "2", "--mom-topk", "1",
        "--no-mom-shared-memory", "--tensor-model-parallel-size", "2", "--context-parallel-size", "2",
    )  # fmt: skip
    plan = plan_of(args)
    assert (plan.device, plan.dtype) == ("cuda", "bfloat16")
    sizes = {"num_heads": 4, "head_dim": 64, "expand_v": 2.0, "topk": 1, "shared_memory": False, "rule": "gla"}
    assert plan.run | sizes | {"hidden_size": 64, "sliced": True} == plan.run
    assert {"gla", "gates", "convolutions", "combine", "route", "routing plan", "gather rows", "state passing"} <= set(
        plan.checks()
    )
    args.context_parallel_size = 1
    assert "state passing" not in plan_of(args).checks()


@pytest.mark.gpu
def test_the_kernels_of_a_run_are_right_on_this_card():
    start = time.monotonic()
    lines = [line for found in check_all(plan_of(arguments()), 3).values() for line in found]
    assert [line for line in lines if not line.right] == [] and len(lines) >= 8
    assert time.monotonic() - start < 60
