"""The self-test: right kernels pass, faults that are put into kernels are found, a lost process costs one check."""

import importlib
import importlib.util
import itertools
import pkgutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from comparison import DEVICE
from triton.runtime.jit import KernelInterface

import mom_layers
from mom_layers.selftest import command, decoding, operations, recurrences, report
from mom_layers.selftest.cases import Case, Line, Setting, Task, check_task, time_task
from mom_layers.selftest.checks import checks_of_a_run, tiny_checks
from mom_layers.selftest.operations import Tokens
from mom_layers.selftest.plan import Plan
from mom_layers.selftest.processes import Worker, check_all
from mom_layers.selftest.speed import floor_milliseconds
from mom_layers.settings import MixerSettings

TINY = Setting(DEVICE, torch.float32, repeats=1)


def lines_of(name, setting=TINY, checks=tiny_checks):
    """The lines of one check."""
    return [check_task(task, setting) for task in checks(setting)[name](setting)]


@pytest.fixture(scope="module")
def whole_run():
    """The lines of all tiny checks, and the kernels that they launched."""
    launched, launch = set(), KernelInterface.__getitem__

    def record(self, grid):
        launched.add((self.fn.__module__, self.__name__))
        return launch(self, grid)

    KernelInterface.__getitem__ = record
    try:
        lines = [line for name in tiny_checks(TINY) for line in lines_of(name)]
    finally:
        KernelInterface.__getitem__ = launch
    return lines, launched


def test_right_kernels_are_right(whole_run):
    lines, _ = whole_run
    assert len(lines) >= 12
    assert [report.row(line) for line in lines if not line.right] == []
    assert all(line.of for line in lines)


def test_every_kernel_is_launched(whole_run):
    """A new kernel needs a check. Kernels of one chip's set run on that chip alone."""
    _, launched = whole_run
    found = set()
    for module in pkgutil.walk_packages(mom_layers.__path__, "mom_layers."):
        if "triton" in module.name and not module.ispkg:
            objects = vars(importlib.import_module(module.name)).items()
            found |= {
                (module.name, name)
                for name, value in objects
                if isinstance(value, KernelInterface)
                and name.endswith("_kernel")
                and value.fn.__module__ == module.name
            }
    assert len(found) > 25
    assert found - launched == set()


@pytest.mark.parametrize(
    "sizes",
    [
        {"topk": 1, "shared_memory": False, "num_heads": 1},
        {"num_memories": 1, "topk": 1, "rule": "gla", "num_heads": 2},
    ],
    ids=["one choice a token", "one memory"],
)
def test_the_checks_of_a_run_raise_no_false_alarm(sizes):
    """Where a gradient is zero but for rounding, its relative error says nothing."""
    found = checks_of_a_run(TINY, MixerSettings(head_dim=16, **sizes), hidden_size=40, sliced=False)
    lines = [check_task(task, TINY) for check in found.values() for task in check(TINY)]
    assert [report.row(line) for line in lines if not line.right] == [] and len(lines) >= 8


# (file, right text, wrong text, check, a name that the line must give as wrong).
FAULTS = {
    "a wrong constant": (
        "combine.triton", "1.0 - 0.5 * (b_rest - b_rest * b_t)", "1.0 - 0.4 * (b_rest - b_rest * b_t)",
        "combine", "doutput_gate",
    ),
    "a wrong mask of the delta rule": (
        "recur.scalar_delta.triton.local_gradients", "tl.where(o_t[:, None] >= o_t[None, :], b_dG",
        "tl.where(o_t[:, None] > o_t[None, :], b_dG", "gated_deltanet", "da",
    ),
    "a wrong mask of linear attention": (
        "recur.channel_decay.triton.local_gradients", "mask=o_t[:, None] > o_t[None, :]",
        "mask=o_t[:, None] >= o_t[None, :]", "gla", "dq",
    ),
    "rows left out of a sum": (
        "project.triton", "b_r = i_r + tl.arange(0, BK)\n        m_r = b_r < end",
        "b_r = i_r + tl.arange(0, BK)\n        m_r = b_r < end - 1", "grouped projection", "dweight",
    ),
    "elements that no program writes": (
        "route.rows_triton", "b_sum.to(out.dtype.element_ty), mask=m_tile)",
        "b_sum.to(out.dtype.element_ty), mask=m_tile & (b_t > 0)[:, None])", "gather rows", "dx",
    ),
    "a wrong row number": (
        "route.plan_triton", "tl.where(b_masked, i_choice, 0)", "tl.where(b_masked, 0, 0)",
        "routing plan", "row_of_choice",
    ),
}  # fmt: skip


def put_in(module_name, right, wrong, folder: Path, monkeypatch):
    """Replaces the kernels of a module by kernels from a changed copy of its file."""
    module = importlib.import_module(f"mom_layers.{module_name}")
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, f"{module.__file__} no longer has one {right!r}: choose another text"
    file = folder / f"faulty_{module_name.replace('.', '_')}.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, faulty)  # a GPU's compiler looks the source up by the module's name
    spec.loader.exec_module(faulty)
    for name, value in vars(faulty).items():
        if isinstance(value, KernelInterface) and name.endswith("_kernel"):
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    module, right, wrong, check, name = FAULTS[fault]
    put_in(module, right, wrong, tmp_path, monkeypatch)
    line = next(line for line in lines_of(check) if not line.right)
    assert any(reason.startswith(f"{name} is off by") for reason in line.wrong), line
    assert "WRONG" in report.row(line) and f"{name} is off by" in report.row(line)


HOPPER_FAULT = ("recur.scalar_delta.hopper.reverse_recurrence", "b_z = scale * b_Pdo", "b_z = 1.5 * scale * b_Pdo")


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [*FAULTS, "a wrong constant in Hopper's kernels"])
def test_a_fault_is_found_on_the_card(fault, tmp_path, monkeypatch):
    """In 16 bits, with the shapes of the whole self-test."""
    from mom_layers.selftest.checks import all_checks

    setting = Setting("cuda", torch.bfloat16)
    checks = {
        "combine": "combine, K 128 V 128",
        "gated_deltanet": "gated_deltanet, K 64 V 128",
        "gla": "gla, K 64 V 128",
    }
    if fault in FAULTS:
        module, right, wrong, check, name = FAULTS[fault]
        kernels = "general kernels" if check == "gated_deltanet" and torch.cuda.get_device_capability()[0] == 9 else ""
    else:
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("needs a GPU of compute capability 9")
        (module, right, wrong), check, name, kernels = HOPPER_FAULT, "gated_deltanet", "dk", ""
    put_in(module, right, wrong, tmp_path, monkeypatch)
    lines = lines_of(checks.get(check, check), setting, all_checks)
    line = next(line for line in lines if not line.right and kernels in line.shape)
    assert any(reason.startswith(f"{name} is off by") for reason in line.wrong), lines
    if kernels:  # the chip's own set does not have the fault
        assert lines[0].right, lines


@pytest.mark.gpu
def test_the_whole_self_test_is_right_on_this_card(capsys):
    assert command.main([]) == 0, capsys.readouterr().out


def test_an_exception_becomes_a_line():
    def fails(leaves):
        raise RuntimeError("out of\nresource: shared memory")

    case = Case({"x": torch.ones(2)}, fails, lambda leaves: {"y": leaves["x"]})
    line = check_task(Task("a kernel", "2 numbers", (lambda: case,), torch.float32), TINY)
    assert not line.right and line.failure == "RuntimeError: out of resource: shared memory"
    assert "Traceback" in line.details and "fails" in line.details
    assert "RuntimeError: out of resource" in report.row(line)


def test_the_worst_of_several_runs_counts():
    """A kernel that is wrong in its second run is wrong."""
    runs = itertools.count()

    def run(leaves):
        return {"y": leaves["x"] * (2.0 if next(runs) == 1 else 1.0)}

    case = Case({"x": torch.ones(2)}, run, lambda leaves: {"y": leaves["x"] * 1.0})
    task = Task("a kernel", "", (lambda: case,), torch.float32)
    line = check_task(task, Setting("cpu", torch.float32, repeats=3))
    assert line.wrong == ["y is off by 1, the bound is 2e-05", "dx is off by 1, the bound is 2e-05"]


@pytest.fixture
def in_this_process(monkeypatch):
    """The command runs its checks without other processes, on a card too."""
    monkeypatch.setattr(command, "_on_the_card", lambda plan, options: (list(command._in_this_process(plan)), None))


def test_the_command_prints_lines_and_a_block(capsys, in_this_process, tmp_path):
    assert command.main(["--only", "gather rows", "--log", str(tmp_path / "log")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("right  ") == 1 and "right  gather rows" in printed and "1 right, 0 wrong" in printed
    block = printed.partition("```\n")[2].partition("```")[0]
    assert all(name in block for name in ("chip: ", "torch: ", "Triton: ", "linear-moe: ", "kernels: 1 right"))
    assert not (tmp_path / "log").exists()


def test_the_command_ends_with_1_for_a_wrong_kernel(capsys, in_this_process, monkeypatch, tmp_path):
    module, right, wrong, *_ = FAULTS["elements that no program writes"]
    put_in(module, right, wrong, tmp_path, monkeypatch)
    assert command.main(["--only", "gather rows", "--log", str(tmp_path / "log")]) == 1
    printed = capsys.readouterr().out
    assert "WRONG  gather rows" in printed and f"tracebacks: {tmp_path / 'log'}" in printed
    assert "WRONG: gather rows" in printed.partition("```\n")[2]
    assert "dx is off by inf" in (tmp_path / "log").read_text()


def test_the_command_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert command.main([]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_lost_processes_cost_one_check(monkeypatch):
    """A check that ends its process, and a check that takes too long, become lines."""
    plan = Plan("cpu", "float32", 1)
    monkeypatch.setattr(Plan, "checks", lambda self: {"first": None, "second": None})
    found = check_all(plan, 1)  # the process has no such checks: it ends with a KeyError
    assert list(found) == ["first", "second"]
    for lines in found.values():
        (line,) = lines
        assert not line.right and line.failure.startswith("its process ended with status 1: KeyError")
        assert "Traceback" in line.details
    worker = Worker(plan, limit=0.2)
    try:
        assert worker.ask({"check": "route", "what": "errors"})[1] == "no answer within 0 seconds"
        assert worker.process is None
    finally:
        worker.close()


REPAIR = """
import sys
sys.path.insert(0, {tests!r})
import interpreter
interpreter.repair()
"""


def test_checks_run_in_other_processes(tmp_path, monkeypatch):
    if DEVICE == "cpu":
        (tmp_path / "sitecustomize.py").write_text(REPAIR.format(tests=str(Path(__file__).parents[1])))
        monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    plan = Plan(DEVICE, "float32", 1, only=("gather rows", "routing plan"))
    found = check_all(plan, 2, lambda done, total: seen.append((done, total)))
    assert list(found) == list(plan.checks()) and seen == [(1, 2), (2, 2)]
    lines = [line for lines in found.values() for line in lines]
    assert [line.kernel for line in lines] == ["routing plan", "gather rows"] and all(line.right for line in lines), (
        lines
    )


def test_what_is_timed_runs(monkeypatch):
    """The calls that a clock times on a GPU, here once each and small."""
    monkeypatch.setattr(recurrences, "TIMED_ROWS", 70)
    monkeypatch.setattr(recurrences, "TIMED_SEGMENTS", 3)
    small, few = Tokens((3, 2)), Tokens((0, 4))
    size = {"heads": 1, "k_dim": 16, "v_dim": 32}
    checks = [
        partial(operations.routing, tokens=3, memories=4, topk=2, timed=5),
        partial(operations.planning, tokens=(few,), timed=small),
        partial(operations.gathering, tokens=few, channels=16, timed=small),
        partial(operations.projection, tokens=few, inputs=16, outputs=16, dtypes=(torch.float32,), timed=small),
        partial(operations.convolutions, tokens=few, timed=small, **size),
        partial(operations.combining, tokens=(few,), heads=1, v_dim=16, timed=small),
        partial(decoding.decoding, rule="gated_deltanet", hidden=16, batches=(1,), timed=2, **size),
        partial(recurrences.recurrence, name="gated_deltanet", timed=True, every_set=False, **size),
        partial(recurrences.recurrence, name="gla", timed=True, every_set=False, **size),
    ]

    def clock(step):
        step()
        return 2.0

    for check in checks:
        for task in check(TINY):
            line = time_task(task, clock)
            assert line.right and line.milliseconds == 2.0, line.details
            moved, flops = line.floor
            assert moved > 0 and (flops > 0) == (task.kernel in ("grouped projection", "gated_deltanet", "gla"))
            assert floor_milliseconds(moved, flops, (1e12, 1e12)) == pytest.approx(1e-9 * max(moved, flops))


def test_a_run_of_one_memory_has_no_checks_of_a_router():
    settings = MixerSettings.of_one_memory(num_heads=2, head_dim=64, conv_kernel=1)
    found = checks_of_a_run(TINY, settings, 64, sliced=True)
    assert set(found) == {"gated_deltanet", "one memory", "gates", "state passing"}
    assert found["one memory"].keywords["width"] == 1


def test_lines_travel_between_processes():
    line = Line("a kernel", "2 numbers", wrong=["y is off by 1, the bound is 0"], milliseconds=0.5, floor=0.1)
    assert Line(**line.as_dict()) == line
    assert "20 %" in report.row(line)
    plan = Plan("cuda", "bfloat16", 3, ("a", "b"), {"hidden_size": 8})
    assert Plan.from_json(plan.to_json()) == plan
