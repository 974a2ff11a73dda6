"""The associative recall tool: the order of training, the rows that a later run continues, report and command."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from timed_rows import PNG

from linear_moe.commands import recall as command
from linear_moe.recall import baselines, records, report, runs
from linear_moe.recall.models import SOFTMAX, Mixer, Shape
from linear_moe.recall.task import Task
from linear_moe.recall.timing import _one_step, step_milliseconds
from linear_moe.recall.training import Job, OutOfTime, Result, Settings, Training

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TASK = Task(vocabulary=32, length=16, pairs=(2, 4), batch=16)
SHAPE = Shape(layers=2, hidden=32)
SETTINGS = Settings(TASK, SHAPE, Training(steps=8, evaluations=8))
GDN, SOFT = Mixer(), Mixer(SOFTMAX, 2, 16, 16)
MOM = Mixer(memories=4, topk=2)
ORIGIN = dict(zip(records.ORIGIN, ("CPU", "1", "2", "abc", "tools/recall.py"), strict=True))


def quiet(line):
    pass


def result(job, accuracy=(0.5, 0.25), flat=True):
    return Result(job, accuracy, ((4, 0.1), (8, sum(accuracy) / 2)), 1.0, flat, 1.0, 2)


def plan(**changes):
    return runs.Plan((MOM,), SETTINGS, **{"max_steps": 8, "rates": (1e-3, 2e-3), "seeds": (0, 1, 2)} | changes)


def test_all_rates_come_first_and_the_best_goes_to_the_other_seeds():
    mixers, rows = [MOM, GDN], {}

    def finish(jobs, good):
        for job in jobs:
            wanted = 0.9 if job.rate == good[job.mixer] else 0.1
            rows[job] = records.result_row(result(job, (wanted, wanted)), SETTINGS, ORIGIN)

    first = runs.next_jobs(mixers, plan(), rows)
    assert first == [Job(mixer, rate, 0) for mixer in mixers for rate in (1e-3, 2e-3)]
    good = {MOM: 2e-3, GDN: 1e-3}
    finish(first[:3], good)
    assert runs.next_jobs(mixers, plan(), rows) == first[3:]
    finish(first[3:], good)
    second = runs.next_jobs(mixers, plan(), rows)
    assert second == [Job(mixer, good[mixer], seed) for mixer in mixers for seed in (1, 2)]
    finish(second, good)
    assert runs.next_jobs(mixers, plan(), rows) == [] and runs.all_flat(mixers, plan(), rows)
    every = runs.next_jobs(mixers, plan(all_rates=True), rows)
    assert {(job.mixer, job.rate, job.seed) for job in every} == {
        (m, 3e-3 - good[m], s) for m in mixers for s in (1, 2)
    }
    rows[second[0]]["flat"] = "False"
    assert not runs.all_flat(mixers, plan(), rows)
    assert plan(max_steps=40).step_counts() == [8, 16, 32]


def test_groups_are_of_one_size_and_every_device_gets_one():
    jobs = [Job(GDN, 1e-3, seed) for seed in range(9)]
    assert [len(group) for group in runs.cut_groups(jobs, 4, 1)] == [3, 3, 3]
    assert [len(group) for group in runs.cut_groups(jobs, 16, 2)] == [4, 5]
    assert [len(group) for group in runs.cut_groups(jobs[:1], 16, 8)] == [1]
    assert [job for group in runs.cut_groups(jobs, 2, 1) for job in group] == jobs


def test_rows_are_found_by_every_setting_and_a_cut_line_is_dropped(tmp_path):
    path, job = tmp_path / "rows.csv", Job(MOM, 2.5e-3, 1)
    rows = [records.result_row(result(job), SETTINGS, ORIGIN)]
    records.append(path, rows)
    with path.open("a") as file:
        file.write("MoM(GDN) 4/2,gated_del")  # a kill while writing
    assert records.read(path) == rows
    records.append(path, rows)
    assert records.read(path) == rows + rows
    assert runs.finished_rows(records.read(path), SETTINGS).keys() == {job}
    for other in (
        replace(SETTINGS, training=Training(steps=9, evaluations=8)),
        replace(SETTINGS, task=replace(TASK, batch=32)),
        replace(SETTINGS, shape=replace(SHAPE, mlp=8)),
    ):
        assert runs.finished_rows(records.read(path), other) == {}
    assert records.pairs_of(rows[0]) == {2: 0.5, 4: 0.25} and records.mean_accuracy(rows[0]) == 0.375
    assert records.curve_of(rows[0]) == [(4, 0.1), (8, 0.375)]
    with pytest.raises(ValueError, match="other columns"):
        records.append(path, [{"model": "x"}])


def older(rows):
    """The rows without the columns of later versions."""
    return [{name: value for name, value in row.items() if name not in records.LATER_COLUMNS} for row in rows]


def test_rows_of_an_older_version_are_models_without_a_convolution_over_the_text(tmp_path):
    """Rows of this version can follow them."""
    path, jobs = tmp_path / "rows.csv", [Job(MOM, 1e-3, seed) for seed in (0, 1)]
    rows = [records.result_row(result(job), SETTINGS, ORIGIN) for job in jobs]
    records.append(path, older(rows))
    assert runs.finished_rows(records.read(path), SETTINGS).keys() == set(jobs)
    for _ in range(2):
        records.upgrade(path)
        assert records.read(path) == rows
        assert list(records.read(path)[0]) == list(rows[0])
    text = Job(replace(MOM, text_conv=4), 1e-3, 0)
    records.append(path, [records.result_row(result(text), SETTINGS, ORIGIN)])
    found = runs.finished_rows(records.read(path), SETTINGS)
    assert found.keys() == {*jobs, text} and found[text]["model"] == MOM.name + " text conv"
    records.upgrade(tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_a_run_goes_on_from_an_older_version_with_models_that_have_a_convolution_over_the_text(tmp_path, monkeypatch):
    trained = []

    def train(jobs, settings, device, deadline, say):
        trained.extend(jobs)
        return [result(job) for job in jobs]

    monkeypatch.setattr(runs, "train_group", train)
    monkeypatch.setattr(runs, "step_milliseconds", lambda mixer, settings, device: 1.0)
    small = plan(baselines=(baselines.STATE_PER_MEMORY,))
    runs.run(small, tmp_path, [CPU], float("inf"), ORIGIN, quiet)
    for name in (records.RESULTS, records.TIMES):
        rows = records.read(tmp_path / name)
        (tmp_path / name).unlink()
        records.append(tmp_path / name, older(rows))
    before = len(trained)
    text = replace(MOM, text_conv=4)
    more = replace(small, moms=(text, MOM))
    comparisons, times, whole = runs.run(more, tmp_path, [CPU], float("inf"), ORIGIN, quiet)
    assert whole and {job.mixer for job in trained[:before]} == {MOM, GDN}
    assert {job.mixer for job in trained[before:]} == {text} and len(times.rows) == 3
    assert [comparison.baselines for comparison in comparisons] == [{baselines.STATE_PER_MEMORY: GDN}] * 2
    written, _ = report.write_report(more, comparisons, times, tmp_path)
    assert f"### {text.name}\n" in written and f"### {MOM.name}\n" in written


def test_a_run_that_was_stopped_goes_on_with_the_rest(tmp_path, monkeypatch):
    trained = []

    def train(jobs, settings, device, deadline, say):
        trained.append(list(jobs))
        if len(trained) == 3:
            raise OutOfTime("stopped")
        return [result(job, flat=settings.training.steps > 8) for job in jobs]

    monkeypatch.setattr(runs, "train_group", train)
    monkeypatch.setattr(runs, "step_milliseconds", lambda mixer, settings, device: 1.0)
    small = plan(group_size=6, max_steps=16)
    arguments = (small, tmp_path, [CPU], float("inf"), ORIGIN, quiet)
    *_, whole = runs.run(*arguments)
    assert not whole
    kept = {job for jobs in trained[:2] for job in jobs}
    stopped = trained[2]
    comparisons, times, whole = runs.run(*arguments)
    assert whole and kept.isdisjoint(trained[3]) and set(stopped) <= {job for jobs in trained[3:] for job in jobs}
    assert len(times.rows) == len(records.read(tmp_path / records.TIMES))
    rows = records.read(tmp_path / records.RESULTS)
    jobs = len(baselines.all_mixers(comparisons)) * (2 + 2)
    assert len(rows) == 2 * jobs and {row["steps"] for row in rows} == {"8", "16"}  # not flat after 8
    count = len(trained)
    assert runs.run(*arguments)[2] and len(trained) == count  # nothing is left

    text, written = report.write_report(small, comparisons, times, tmp_path)
    assert "16 steps" in text and "GDN 4 x 16 x 16" in text
    assert all(path.read_bytes().startswith(PNG) for path in written if path.suffix == ".png") and len(written) == 4


def test_a_baseline_that_does_not_run_here_is_left_out_and_said(tmp_path, monkeypatch):
    def measure(mixer, settings, device):
        if mixer.key_size > 16 and mixer.rule != SOFTMAX:
            raise RuntimeError("out of registers")
        return 1.0

    monkeypatch.setattr(runs, "step_milliseconds", measure)
    lines = []
    times = runs.StepTimes(tmp_path / "times.csv", SETTINGS, CPU, ORIGIN, lines.append)
    (comparison,) = runs.find_comparisons(plan(), times)
    assert set(comparison.baselines) == set(baselines.MATCHES.values()) - {baselines.STATE_BY_KEYS}
    assert any("left out" in line and "out of registers" in line for line in lines)


def test_several_processes_share_the_jobs_and_the_rows(tmp_path):
    jobs = [Job(SOFT, 1e-3, seed) for seed in range(3)]
    settings = replace(SETTINGS, training=Training(steps=2, evaluations=1))
    assert runs.train_jobs(jobs, plan(), settings, tmp_path, [CPU, CPU], float("inf"), ORIGIN)
    rows = records.read(tmp_path / records.RESULTS)
    assert runs.finished_rows(rows, settings).keys() == set(jobs) and {row["group"] for row in rows} == {"1", "2"}
    for left, status in ((0.0, runs.OUT_OF_TIME), (60.0, 0)):  # past the time limit, and within
        with pytest.raises(SystemExit) as ended:
            runs._process([[Job(SOFT, 1e-3, 3)]], settings, tmp_path, CPU, left, ORIGIN)
        assert ended.value.code == status


def test_the_table_says_whether_the_claim_holds(tmp_path):
    task = Task(vocabulary=128, length=128, pairs=(16, 32), batch=2)
    settings = Settings(task, SHAPE, Training(steps=8))
    wanted = runs.Plan((MOM,), settings, max_steps=8, rates=(1e-3,), seeds=(0, 1))
    comparison = baselines.compare(MOM, SHAPE, 128)
    for low, holds in ((0.49, True), (0.51, False)):
        found = {GDN: (low, 0.2), MOM: (0.95, 0.91)}
        jobs = {m: [Job(m, 1e-3, s) for s in (0, 1)] for m in found}
        rows = {
            job: records.result_row(result(job, found[m]), settings, ORIGIN)
            for m, group in jobs.items()
            for job in group
        }
        first, second = report.claim(comparison, wanted, rows, dict.fromkeys(found, 1e-3)).splitlines()
        assert ("do not hold" not in first) is holds and "do not hold" not in second and "all seeds" in first


def test_a_step_is_timed():
    assert step_milliseconds(SOFT, SETTINGS, CPU) > 0
    _one_step(SOFT, SETTINGS, CPU)  # the step that compiles the kernels in other processes


def test_kernels_are_compiled_once_on_all_cores(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(runs, "compile_kernels", lambda mixers, settings, device: compiled.append(set(mixers)))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    times = runs.StepTimes(tmp_path / "times.csv", SETTINGS, torch.device("cuda"), ORIGIN, quiet)
    wanted = plan(baselines=(baselines.STATE_PER_MEMORY, baselines.TIME))
    runs._compile(wanted, times)
    everything = {MOM, *(replace(GDN, heads=heads) for heads in runs.TIMED_HEADS)}
    assert compiled == [everything]
    (tmp_path / "cache" / "kernel").mkdir(parents=True)
    times.rows = [records.time_row(MOM, SETTINGS, 1.0, ORIGIN)]
    runs._compile(wanted, times)
    assert compiled[1:] == [everything - {MOM}]
    times.rows = [records.time_row(mixer, SETTINGS, 1.0, ORIGIN) for mixer in everything]
    runs._compile(wanted, times)
    assert len(compiled) == 2


# --- the command


def test_the_command_trains_reports_and_does_not_train_again(tmp_path, capsys):
    words = ["--output", str(tmp_path / "out"), "--mom", "2/1", "--steps", "2", "--evaluations", "1", "--device", "cpu"]
    words += ["--baselines", "memory", "time"]
    assert command.main([*words, "--time-limit", "0"]) == 0
    assert "goes on with them" in capsys.readouterr().out
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "MoM(GDN) 2/1 1 x 16 x 16" in out and "goes on with them" not in out
    with (tmp_path / "out" / records.RESULTS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["commit"] and row["command"].startswith("tools/recall.py") for row in rows)
    for name in report.PICTURES:
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    assert command.main(words) == 0
    assert len(records.read(tmp_path / "out" / records.RESULTS)) == len(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mom", "8/9"], "8/9"),
        (["--pairs", "8"], "length 16: expected an even number of tokens, and at least four a pair: 32 for pairs [8]"),
        (["--seeds", "1", "1"], "--seeds has a value twice"),
        (["--rule", "other"], "unknown memory rule 'other'"),
    ],
)
def test_wrong_settings_end_with_a_message(words, said, tmp_path, capsys):
    assert command.main(["--output", str(tmp_path / "out"), "--device", "cpu", *words]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--rates", "0"], ["--rates", "nan"], ["--seeds", "-1"], ["--time-limit", "-1"]])
def test_wrong_numbers_end_with_their_argument(words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--output", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err
    assert f"argument {words[0]}" in error and repr(words[1]) in error and not (tmp_path / "out").exists()


def test_the_tool_imports_nothing_of_megatron():
    code = "import sys, linear_moe.commands.recall; sys.exit(any(n.split('.')[0] == 'megatron' for n in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
