"""Pictures from event files like those of a run."""

import matplotlib.image
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from linear_moe.commands import plot_run
from linear_moe.watching.run_plots import PlotError, plot_losses, plot_memory_load, read_scalars, smooth


def write_scalars(directory, points, start=0.0):
    """points: (name, step, value) each; `start` orders the files of one folder."""
    writer = SummaryWriter(str(directory), filename_suffix=f".{start}")
    for count, (name, step, value) in enumerate(points):
        writer.add_scalar(name, value, step, walltime=1e9 + start + count * 1e-3)
    writer.close()


def training_points(steps, layers=(1, 3), memories=4):
    for step in steps:
        yield "lm loss", step, 3.0 + 5.0 / step
        for layer in layers:
            share = np.full(memories, 1 / memories)
            share[0] += 0.1 / step
            share[1] -= 0.1 / step
            yield from ((f"mom/load/layer_{layer:02d}/memory_{m}", step, share[m]) for m in range(memories))
        if step % 10 == 0:
            yield "lm loss validation", step, 3.1 + 5.0 / step


def assert_is_a_picture(path):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300
    assert pixels[..., :3].std() > 0.01


def test_read_scalars_prefers_the_resumed_run(tmp_path):
    write_scalars(tmp_path, [("lm loss", step, 1.0) for step in (10, 20, 30, 40)] + [("only before", 40, 7.0)], start=0)
    write_scalars(tmp_path, [("lm loss", step, 2.0) for step in (30, 50)], start=100)
    scalars = read_scalars(tmp_path)
    assert scalars["lm loss"] == {10: 1.0, 20: 1.0, 30: 2.0, 50: 2.0}
    assert scalars["only before"] == {40: 7.0}


def test_read_scalars_keeps_the_validation_loss_that_the_test_loss_follows(tmp_path):
    write_scalars(tmp_path, [("lm loss validation", 40, 2.5), ("lm loss validation", 40, 2.75)])
    assert read_scalars(tmp_path)["lm loss validation"] == {40: 2.5}


def test_read_scalars_names_what_is_missing(tmp_path):
    with pytest.raises(PlotError, match="there is no folder"):
        read_scalars(tmp_path / "absent")
    with pytest.raises(PlotError, match="no TensorBoard event file"):
        read_scalars(tmp_path)
    SummaryWriter(str(tmp_path)).close()
    with pytest.raises(PlotError, match="hold no scalar"):
        read_scalars(tmp_path)


def test_smooth_is_the_mean_of_the_window():
    values = np.arange(200.0) ** 2
    smoothed = smooth(values)
    assert smoothed[0] == 0
    assert smoothed[100] == pytest.approx(values[98:103].mean())
    assert smoothed[-1] == pytest.approx(values[-3:].mean())


def test_plot_run_draws_both_pictures(tmp_path, capsys):
    write_scalars(tmp_path / "tb", training_points(range(1, 41)))
    output = tmp_path / "a" / "plots"
    arguments = ["--tensorboard-dir", tmp_path / "tb", "--output", output, "--reference-loss", "6.9", "unigram entropy"]
    assert plot_run.main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out.split() == [str(output / "loss.png"), str(output / "memory_load.png")]
    assert_is_a_picture(output / "loss.png")
    assert_is_a_picture(output / "memory_load.png")


def test_plot_run_of_a_model_without_memories(tmp_path):
    write_scalars(tmp_path / "tb", [("lm loss", 1, 3.0)])
    assert plot_run.main(["--tensorboard-dir", str(tmp_path / "tb"), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").exists() and not (tmp_path / "memory_load.png").exists()


@pytest.mark.parametrize("points, message", [([], "no TensorBoard event file"), ([("other", 1, 1.0)], "'lm loss'")])
def test_plot_run_fails_with_one_line(tmp_path, capsys, points, message):
    if points:
        write_scalars(tmp_path, points)
    assert plot_run.main(["--tensorboard-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("plot_run.py: error: ") and message in error and error.count("\n") == 1


def test_plot_run_refuses_a_reference_that_is_no_number(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        plot_run.main(["--tensorboard-dir", ".", "--output", ".", "--reference-loss", "unigram", "6.9"])


@pytest.mark.parametrize("layers, memories, steps", [(1, 1, 1), (2, 64, 3), (40, 2, 30)])
def test_plot_memory_load_of_other_sizes(tmp_path, layers, memories, steps):
    series = {step: 1 / memories for step in range(1, steps + 1)}
    scalars = {
        f"mom/load/layer_{layer:02d}/memory_{memory}": series
        for layer in range(1, layers + 1)
        for memory in range(memories)
    }
    plot_memory_load(scalars, tmp_path / "load.png")
    assert_is_a_picture(tmp_path / "load.png")


def test_plots_name_the_scalar_they_miss(tmp_path):
    with pytest.raises(PlotError, match="no scalar named 'lm loss'"):
        plot_losses({"grad-norm": {1: 1.0}}, tmp_path / "loss.png")
    with pytest.raises(PlotError, match="no Mixture-of-Memories layer"):
        plot_memory_load({"lm loss": {1: 1.0}}, tmp_path / "load.png")
