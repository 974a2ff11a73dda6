"""Console lines and plotted values of both reporters, with a stand-in for Megatron's training_log."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.training import training

from linear_moe.watching import metrics, reporter
from linear_moe.watching.lines import other_fields, validation_line
from linear_moe.watching.metrics import MemoryMetrics
from linear_moe.watching.reporter import AddedLineReporter, WholeLineReporter

# As Megatron 0.19.2 prints them.
ITERATION_LINE = (
    " [2026-11-23 07:25:52.881020] iteration {:8d}/      40 | consumed samples:           20 |"
    " elapsed time per iteration (ms): 165.3 | learning rate: 8.333333E-03 | global batch size:     4 |"
    " lm loss: 4.214999E+00 | load_balancing_loss: 1.002300E+00 | loss scale: 1.0 | grad norm: 0.630 |"
    " params norm: 20.576 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)
WARNING = "WARNING: something else that goes through print_rank_last"


class Timer:
    """Megatron's interval timer, set by hand: `elapsed` updates what `active_time` returns."""

    def __init__(self):
        self.time = self.read = 0.0

    def elapsed(self, reset=True, barrier=False):
        self.read = self.time

    def active_time(self):
        return self.read


class Writer:
    def __init__(self):
        self.values, self.layouts = {}, []

    def add_custom_scalars(self, layout):
        self.layouts.append(layout)

    def add_scalar(self, name, value, iteration):
        self.values.setdefault(name, {})[iteration] = value


class Run:
    """A training loop of steps that take one second and hold 4096 tokens of 2e12 FLOPs."""

    def __init__(self, monkeypatch, capsys):
        self.capsys = capsys
        self.timer, self.writer, self.flops = Timer(), Writer(), 2e12
        self.args = SimpleNamespace(
            token_mixer="mom", num_layers=2, mtp_num_layers=None, mom_num_memories=2, train_iters=40, log_interval=5,
            tensorboard_dir=None, tensorboard_log_interval=1, micro_batch_size=1, data_parallel_size=2,
            gtp_weight_remat_size=1, seq_length=1024, world_size=1,
        )  # fmt: skip
        self.started = None
        monkeypatch.setattr(training, "get_args", lambda: self.args)
        monkeypatch.setattr(training, "get_timers", lambda: lambda name: self.timer)
        monkeypatch.setattr(training, "get_num_microbatches", lambda: 2)
        monkeypatch.setattr(
            training, "get_tensorboard_writer", lambda: self.writer if self.args.tensorboard_dir else None
        )
        monkeypatch.setattr(training, "get_wandb_writer", lambda: None)
        monkeypatch.setattr(training, "training_log", self.training_log)
        monkeypatch.setattr(metrics, "_metrics", None)
        monkeypatch.setattr(reporter, "device_peak_flops", lambda: 10e12)

    def training_log(
        self, loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter,
        grad_norm, params_norm, num_zeros_in_grad, max_attention_logit, pg_collection=None, is_first_iteration=False,
        seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None,
    ):  # fmt: skip
        if iteration % self.args.log_interval == 0 or is_first_iteration:
            self.timer.elapsed(barrier=True, reset=not is_first_iteration)
            training.print_rank_last(ITERATION_LINE.format(iteration))
        if iteration == 7:
            training.print_rank_last(WARNING)
        return "flag"

    def step(self, iteration, loss=1.0, skipped=0, seconds=1.0, **changes):
        """One call of training_log; returns what was printed."""
        self.timer.time += seconds
        loss = torch.tensor([loss]) if isinstance(loss, float) else loss
        self.started = self.started or iteration
        call = dict(learning_rate=2.9e-4, grad_norm=0.921) | changes
        flag = training.training_log(
            {"lm loss": loss}, {}, call["learning_rate"], iteration, 1.0, True, skipped, call["grad_norm"],
            None, None, None, is_first_iteration=iteration == self.started,
            total_real_tokens_in_batch=changes.get("tokens"),
        )  # fmt: skip
        assert flag == "flag"
        return self.capsys.readouterr().out

    def route(self, layer, *choices):
        """One token for each of the choices, with k = 1."""
        routing_map = torch.nn.functional.one_hot(torch.tensor(choices), 2).bool()
        metrics.memory_metrics().record_routing(layer, routing_map, torch.zeros(len(choices), 2))


@pytest.fixture
def run(monkeypatch, capsys):
    run = Run(monkeypatch, capsys)
    patch = WholeLineReporter().patch()
    patch.apply()
    with pytest.MonkeyPatch.context() as stand_in:
        stand_in.setattr(training, "num_floating_point_operations", lambda *args, **kwargs: run.flops)
        yield run
    patch.undo()


def test_a_line_has_every_part(run):
    run.step(1, loss=9.0)
    for iteration in range(2, 6):
        run.route(1, 0, 0, 1)
        run.route(2, 0, 1)
        metrics.memory_metrics().losses.record("load_balancing_loss", torch.tensor(1.05), 1, 2)
        metrics.memory_metrics().losses.record("load_balancing_loss", torch.tensor(0.99), 2, 2)
        printed = run.step(iteration, loss=float(iteration))
    assert printed == (
        "step   5/40  12% | loss 3.500 | grad 0.92 | lr 2.9e-04 | 4.10k tok/s | 2.00 TFLOP/s 20% MFU"
        " | balance 1.02 | memory load 33-67% | load_balancing_loss 1.002 | params norm 20.576 | left 0:00:35\n"
    )


def test_lines_come_at_the_first_iteration_and_every_interval(run):
    lines = {iteration: run.step(iteration) for iteration in range(1, 13)}
    assert [iteration for iteration, line in lines.items() if line.startswith("step")] == [1, 5, 10]
    assert lines[7] == WARNING + "\n"
    assert not any("iteration " in line for line in lines.values())


def test_losses_are_means_since_the_last_line(run):
    lines = {iteration: run.step(iteration, loss=float(iteration)) for iteration in range(1, 11)}
    assert "loss 1.000 " in lines[1] and "loss 3.500 " in lines[5] and "loss 8.000 " in lines[10]


def test_time_left_comes_from_recent_steps_without_the_first(run):
    assert "left" not in run.step(1, seconds=500.0)
    for iteration in range(2, 6):
        line = run.step(iteration, seconds=2.0)
    assert "| left 0:01:10\n" in line and "2.05k tok/s" in line
    for iteration in range(6, 36):
        line = run.step(iteration, seconds=3600.0)
    assert line.endswith("| left 5:00:00\n")
    run.args.train_iters = 100
    run.timer.time += 0.5
    for iteration in range(36, 41):
        line = run.step(iteration, seconds=3600.0)
    assert "| left 2d 12:00:0" in line


def test_a_resumed_run(run):
    run.args.train_iters = 2000
    assert run.step(1001).startswith("step  1001/2000  50% | loss 1.000 ")
    for iteration in range(1002, 1006):
        line = run.step(iteration)
    assert line.startswith("step  1005/2000  50% ") and line.endswith("left 0:16:35\n")


def test_nothing_is_read_from_the_device_between_lines(run):
    run.step(1)
    for iteration in range(2, 5):
        assert run.step(iteration, loss=torch.empty(1, device="meta")) == ""


def test_skipped_and_not_finite_steps_are_named(run):
    run.step(1)
    run.step(2, loss=math.inf, skipped=1, grad_norm=None)
    run.step(3, loss=math.nan, skipped=1, grad_norm=None)
    run.step(4, loss=2.0)
    line = run.step(5, loss=4.0)
    assert "| loss 3.000 | 2 skipped | 2 with NaN or infinite loss | grad 0.92 |" in line
    for iteration in range(6, 11):
        line = run.step(iteration, loss=math.inf, skipped=1, grad_norm=None, learning_rate=None)
    assert "| no loss: every step was skipped | 5 with NaN or infinite loss | 4.10k tok/s |" in line
    for iteration in range(11, 16):
        line = run.step(iteration, loss=math.nan if iteration == 13 else 1.0)
    assert "| loss nan | 1 with NaN or infinite loss |" in line


def test_softmax_attention_has_no_memory_parts(run):
    run.args.token_mixer = "attention"
    run.args.tensorboard_dir = "somewhere"
    line = run.step(1)
    assert "balance" not in line and "memory" not in line
    assert set(run.writer.values) == {"tokens-per-second", "tflops-per-device", "mfu"}


def test_no_mfu_where_the_peak_is_unknown(run, monkeypatch):
    monkeypatch.setattr(reporter, "device_peak_flops", lambda: None)
    run.flops = 3e9
    assert "| 4.10k tok/s | 3.00 GFLOP/s | " in run.step(1)


def test_padding_is_not_counted_as_tokens(run):
    assert "| 1.50k tok/s |" in run.step(1, tokens=1500)


def test_plots_and_lines_at_different_intervals_miss_nothing(run):
    run.args.tensorboard_dir = "somewhere"
    run.args.tensorboard_log_interval = 3
    lines = {}
    for iteration in range(1, 11):
        run.route(1, *([0] * iteration + [1] * (20 - iteration)))
        lines[iteration] = run.step(iteration, seconds=float(iteration))
    share = {i: i / 20 for i in range(1, 11)}

    def mean(first, last):
        return pytest.approx(sum(share[i] for i in range(first, last + 1)) / (last - first + 1))

    (layout,) = run.writer.layouts
    assert layout["training"]["loss"] == ["Multiline", ["lm loss", "lm loss validation"]]
    assert layout["memories"]["load of layer 1"] == ["Multiline", ["mom/load/layer_01/.*"]]
    assert run.writer.values["mom/load/layer_01/memory_0"] == {3: mean(1, 3), 6: mean(4, 6), 9: mean(7, 9)}
    speed = {step: pytest.approx(4096 / mean_seconds) for step, mean_seconds in [(3, 2), (6, 5), (9, 8)]}
    assert run.writer.values["tokens-per-second"] == speed
    assert "memory load 18-82%" in lines[5]  # steps 2 to 5: 3.5 of 20 on average
    assert "memory load 40-60%" in lines[10]  # steps 6 to 10: 8 of 20
    assert f"{4096 / 8:.0f} tok/s" in lines[10]


def test_validation_lines():
    assert (
        validation_line(
            " validation loss at iteration 200 | lm loss value: 2.910013E+00 | lm loss PPL: 1.835705E+01 | "
        )
        == "validation at step 200: loss 2.910, perplexity 18.4"
    )
    assert (
        validation_line(
            " validation-books loss at iteration 9 on validation set | lm loss value: 1.0E+01 | lm loss PPL: 2.2026E+04"
            " | mtp_1 loss value: 1.1E+01 | mtp_1 loss PPL: 5.9E+04 | "
        )
        == "validation books at step 9: loss 10.000, perplexity 22026, mtp_1 loss 11.000"
    )
    assert (
        validation_line(" validation loss at iteration 30 on test set | lm loss value: NAN | lm loss PPL: NAN | ")
        == "test at step 30: loss nan, perplexity nan"
    )
    assert validation_line("validation of the data failed") is None


def test_evaluation_is_printed_in_one_line(run):
    line = " validation loss at iteration 200 | lm loss value: 2.910013E+00 | lm loss PPL: 1.835705E+01 | "
    for text in ("-" * len(line), line, "-" * len(line)):
        training.print_rank_last(text)
    assert run.capsys.readouterr().out == "validation at step 200: loss 2.910, perplexity 18.4\n"


def test_two_runs_in_one_process_are_counted_apart(run):
    for iteration in range(1, 6):
        run.step(iteration, loss=100.0)
    run.started = None
    line = run.step(1, loss=2.0)
    assert "| loss 2.000 |" in line and "left" not in line


@pytest.fixture
def added(monkeypatch):
    """A reporter for other scripts, and the settings of a run with a stand-in for training_log."""
    settings = SimpleNamespace(token_mixer="mom", log_interval=2, num_layers=2, mtp_num_layers=None, mom_num_memories=2)
    monkeypatch.setattr(training, "get_args", lambda: settings)
    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(training, "get_wandb_writer", lambda: None)
    monkeypatch.setattr(metrics, "_metrics", MemoryMetrics())
    return AddedLineReporter(), settings


def training_log(iteration):
    print(f"Megatron's line {iteration}")
    return "flag"


def test_a_line_is_added_to_another_scripts_lines(added, capsys):
    reporter, _ = added
    for iteration in (1, 2):
        metrics.memory_metrics().record_routing(1, torch.eye(2).bool(), torch.zeros(2, 2))
        assert reporter.log(training_log, iteration) == "flag"
    assert capsys.readouterr().out.splitlines() == [
        "Megatron's line 1", "Megatron's line 2", " memories at iteration 2 | load 50-50%",
    ]  # fmt: skip


def test_no_line_is_added_to_a_run_of_softmax_attention(added, capsys):
    reporter, settings = added
    del settings.token_mixer
    reporter.log(training_log, iteration=2)
    assert capsys.readouterr().out == "Megatron's line 2\n"


def test_other_fields():
    line = ITERATION_LINE.format(5).replace("loss scale: 1.0", "loss scale: 65536.0")
    assert other_fields(line, {"lm loss"}) == [
        "load_balancing_loss 1.002", "loss scale 65536.0", "params norm 20.576"
    ]  # fmt: skip
    assert other_fields("", set()) == []
