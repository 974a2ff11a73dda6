"""Runs that are killed or told to stop, at every kind of moment: all resume bit-equal, and nothing is left behind.

MOM_ALL_KILLS=1 runs all thirty, otherwise a few stand for them.
"""

import os
import re
import signal
from pathlib import Path

import pytest
import warm_python
from pretraining_runs import MOM, ROOT, TINY
from stopped_runs import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 14
ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()
TRACKER = "latest_checkpointed_iteration.txt"

WHOLE, ONE_RANK, STOP = "the whole run", "one rank", "SIGTERM"
BETWEEN, IN_A_SAVE = "between saves", "in a save"
MOMENTS = {BETWEEN: f" 8/{STEPS} ", IN_A_SAVE: "saving checkpoint at iteration       6 "}

# What is signalled, when, how checkpoints are saved, processes, and arguments of a kind of its own.
KILLS = [
    (what, when, save, processes, ())
    for what in (WHOLE, ONE_RANK, STOP)
    for when in MOMENTS
    for save in ("sync", "async")
    for processes in (1, 2)
]
KILLS += [
    (what, BETWEEN, save, processes, ("--num-workers", "2"))
    for what, save, processes in [(STOP, "sync", 1), (STOP, "async", 2), (WHOLE, "sync", 1), (WHOLE, "async", 2)]
]
KILLS += [(STOP, IN_A_SAVE, "async", 1, ("--num-workers", "2")), (WHOLE, IN_A_SAVE, "async", 1, ("--num-workers", "2"))]
FEW = [
    (WHOLE, IN_A_SAVE, "async", 2, ()),
    (ONE_RANK, BETWEEN, "sync", 2, ()),
    (STOP, BETWEEN, "sync", 2, ()),
    (STOP, IN_A_SAVE, "async", 1, ("--num-workers", "2")),
]
assert len(KILLS) == 30 and set(FEW) <= set(KILLS)


def arguments(folder: Path, save: str) -> list:
    words = [*TINY, *MOM, "--mock-data", "--train-iters", STEPS, "--save-interval", 3, "--exit-signal-handler"]
    words += ["--use-distributed-optimizer", "--save", folder / "c", "--load", folder / "c"]
    return words + (ASYNC if save == "async" else [])


def train(folder: Path, save: str, processes: int) -> tuple[str, dict[int, float]]:
    """A run to the last step: its output, and the loss of every step to the bit."""
    plots = folder / "plots"
    words = ["-m", "linear_moe.pretrain", *arguments(folder, save)]
    words += ["--tensorboard-dir", plots, "--tensorboard-log-interval", 1]
    environment = os.environ | warm_python.ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = warm_python.run(*words, folder=ROOT, environment=environment, timeout=250, ranks=processes)
    assert run.returncode == 0, run.stdout[-3000:]
    events = EventAccumulator(str(plots))
    events.Reload()
    return run.stdout, {event.step: event.value for event in events.Scalars("lm loss")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Number of processes -> loss of every step."""
    return {n: train(tmp_path_factory.mktemp("uninterrupted"), "sync", n)[1] for n in (1, 2)}


@pytest.mark.parametrize(
    "kill", KILLS if os.environ.get("MOM_ALL_KILLS") else FEW, ids=lambda kill: " ".join(map(str, kill[:4] + kill[4]))
)
def test_resumes_bit_equal_and_leaves_nothing(kill, uninterrupted, tmp_path):
    what, when, save, processes, more = kill
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = [*arguments(tmp_path, save), *more]
    options = {"processes": processes, "ignore_sigterm": what == STOP, "environment": {"TMPDIR": str(temporary)}}
    with Run(tmp_path, *words, **options) as run:
        run.wait_for(MOMENTS[when])
        if what == STOP:
            run.signal_all(signal.SIGTERM)
        elif what == WHOLE:
            run.signal_all(signal.SIGKILL)
        else:
            os.kill(run.ranks()[-1], signal.SIGKILL)
        status = run.wait()
        assert run.left_after(10) == {}
        text = run.text()
    assert (status == 0) == (what == STOP), text[-3000:]
    tracker = tmp_path / "c" / TRACKER
    saved = int(tracker.read_text()) if tracker.exists() else 0  # an asynchronous save may take until the next one
    if what == STOP:
        assert saved == max(map(int, re.findall(r"^step +(\d+)/", text, re.M))), text[-3000:]
    names = [path.name for path in temporary.rglob("*")]  # torchrun and wandb leave empty folders there
    assert not [name for name in names if name.startswith(("pymp-", "listener-"))], names

    output, losses = train(tmp_path, save, processes)
    assert saved == 0 or f"] at iteration {saved}\n" in output
    expected = {step: loss for step, loss in uninterrupted[processes].items() if step > saved}
    assert losses == expected and STEPS in losses
    left = sorted(path.name for path in (tmp_path / "c").iterdir())
    checkpoints = [name for name in left if name not in (TRACKER, "log.txt")]
    assert all(re.fullmatch(r"iter_\d{7}", name) for name in checkpoints), left
    assert all((tmp_path / "c" / name / "metadata.json").is_file() for name in checkpoints), left
