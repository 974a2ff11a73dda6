"""The comparison of layouts: numbers from runs and traces, tables and pictures."""

import csv
import gzip
import json

import bench_layouts
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from timed_rows import PNG


def write_run(folder, losses, tokens_per_second, settings):
    """The files of a training run that the tool reads."""
    writer = EventFileWriter(str(folder / "tensorboard"))
    for step, loss in enumerate(losses, start=1):
        values = {"lm loss": loss, "tokens-per-second": tokens_per_second, "mem-max-allocated-bytes": 2**30 * step}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.add_event(Event(step=step, wall_time=step, summary=summary))
    writer.close()
    (folder / "settings.json").write_text(json.dumps(settings))


def write_trace(folder, events):
    (folder / "torch_profile").mkdir(parents=True)
    with gzip.open(folder / "torch_profile" / "rank-0.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)


def kernel(name, elements, ranks=2, dtype="BFloat16", group="TP"):
    about = {"Collective name": name, "In msg nelems": elements, "Group size": ranks, "dtype": dtype}
    return {"cat": "kernel", "args": about | {"Process Group Description": group}}


def test_bytes_that_a_rank_sent_are_read_from_the_trace(tmp_path):
    events = [
        kernel("_allgather_base", 10, ranks=4),  # its 20 bytes to three other ranks
        kernel("_allgather_base", 10, ranks=4),
        kernel("_reduce_scatter_base", 40, ranks=4, dtype="Float"),  # three of four parts
        kernel("allreduce", 40, ranks=4),  # both, of all
        kernel("all_to_allv", 40, group="EP"),
        kernel("send", 8, group="PP"),
        kernel("recv", 8, group="PP"),
        kernel("allreduce", 40, ranks=1),  # no other rank
        {"cat": "cpu_op", "args": {"Collective name": "allreduce", "Group size": 4}},
        {"cat": "kernel", "args": {}},
    ]
    write_trace(tmp_path, events)
    assert bench_layouts.sent_bytes(tmp_path / "torch_profile" / "rank-0.json.gz") == {
        ("EP", "all_to_allv"): (1, 40),
        ("PP", "recv"): (1, 0),
        ("PP", "send"): (1, 16),
        ("TP", "_allgather_base"): (2, 120),
        ("TP", "_reduce_scatter_base"): (1, 120),
        ("TP", "allreduce"): (1, 120),
    }


def test_tables_and_picture_of_runs(tmp_path, monkeypatch, capsys):
    """The last step is the profiled one and counts for nothing; a layout that fails is named, and the status is 1."""

    def train(layout, folder, steps, device, options):
        if layout == "PP2":
            (folder).mkdir()
            (folder / "output.txt").write_text("error: no such stage\n")
            raise bench_layouts.subprocess.CalledProcessError(1, "pretrain")
        losses = [6.0, 5.0, 4.0, 3.0, 99.0]
        write_run(folder, [loss * (1.0 if layout == "one" else 1.01) for loss in losses],
                  1000.0 if layout == "one" else 1900.0,
                  {"GLOBAL_BATCH": 4, "MICRO_BATCH": 2, "MODEL": options.model, "SEQ_LENGTH": 2048})  # fmt: skip
        write_trace(folder, [kernel("allreduce", 100, dtype="Float", group="DP")])

    monkeypatch.setattr(bench_layouts, "train", train)
    words = ["--output", str(tmp_path), "--layouts", "one", "DP2", "PP2", "--steps", "4", "--model", "1.3b"]
    status = bench_layouts.main(words)
    told = capsys.readouterr()
    assert status == 1 and "failed: PP2" in told.err and "error: no such stage" in told.out
    with (tmp_path / "layouts.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["model"], one["sequence"]) == ("1.3b", "2048")
    assert (one["layout"], one["of_one"], one["steps"], one["last_loss"]) == ("one", "1.00", "4", "3.0000")
    assert (two["layout"], two["of_one"], two["largest_difference"]) == ("DP2", "1.90", "0.0100")
    assert float(two["peak_gib"]) == 5
    assert "DP2,DP,allreduce,1,400" in (tmp_path / "exchanges.csv").read_text()
    assert (tmp_path / "losses.csv").read_text().splitlines()[1] == "1,6.00000,6.06000"
    assert (tmp_path / "losses.png").read_bytes().startswith(PNG)


def test_a_run_that_cannot_be_read_leaves_the_rows_of_the_others(tmp_path, monkeypatch, capsys):
    """A run without event files, one cut in its warm-up one with half a trace; a later row is written all the same."""
    settings = {"GLOBAL_BATCH": 4, "MICRO_BATCH": 2, "MODEL": "380m", "SEQ_LENGTH": 2048, "STEPS": 4}
    seen = []

    def train(layout, folder, steps, device, options):
        seen.append((tmp_path / "layouts.csv").read_text() if (tmp_path / "layouts.csv").exists() else "")
        if layout == "DP2":
            folder.mkdir()
            (folder / "settings.json").write_text(json.dumps(settings))
            return
        write_run(folder, [6.0, 5.0] if layout == "TP2" else [6.0, 5.0, 4.0, 3.0], 1000.0, settings)
        if layout == "EP2":
            (folder / "torch_profile").mkdir()
            (folder / "torch_profile" / "rank-0.json.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])

    monkeypatch.setattr(bench_layouts, "train", train)
    layouts = ["one", "DP2", "TP2", "EP2", "PP2"]
    words = ["--output", str(tmp_path), "--layouts", *layouts, "--steps", "4", "--no-profile"]
    assert bench_layouts.main(words) == 1
    told = capsys.readouterr()
    assert "failed: DP2, TP2, EP2" in told.err
    assert "DP2: " in told.out and "there is no folder" in told.out and "delete the folder" in told.out
    assert "no step after the first 2" in told.out
    assert ",one," in seen[1]  # before the second layout begins
    with (tmp_path / "layouts.csv").open(newline="") as file:
        rows = {row["layout"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["one", "EP2", "PP2"]
    assert (rows["PP2"]["steps"], rows["PP2"]["last_loss"]) == ("4", "3.0000")  # all steps: none is profiled


def test_too_few_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_layouts.main(["--output", str(tmp_path), "--steps", "2"])
    assert "--steps 2: the first 2 are not timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model,layout,words,expected,argument",
    [
        ("380m", "EP4 peer-memory", [], {"EP": "4", "TP": "1", "MICRO_BATCH": "16", "GPUS": "4"}, "peer-memory"),
        ("1.3b", "TP2+SP x EP2", [], {"TP": "2", "EP": "2", "MODEL": "1.3b"}, "auto"),
        ("7b", "PP2 x DP2", ["--micro-batch", "1", "--no-profile"], {"PP": "2", "MICRO_BATCH": "1"}, "auto"),
        ("380m", "CP4", ["--long", "--tokens", "1048576"], {"CP": "4", "SEQ_LENGTH": "1048576"}, "auto"),
    ],
)
def test_settings_reach_the_script(tmp_path, monkeypatch, model, layout, words, expected, argument):
    """The script is a stand-in that writes down its settings and arguments."""
    script = tmp_path / "examples" / "pretrain_mom_a100.sh"
    script.parent.mkdir()
    names = "TP EP PP CP GPUS MODEL MICRO_BATCH SEQ_LENGTH TRAIN_ITERS"
    script.write_text(
        f'for name in {names}; do echo "given $name=${{!name:-}}"; done; echo "arguments $*"\n'
        "printf '  SEQ_LENGTH=4096\\n  MICRO_BATCH=2\\n'\n"
    )
    monkeypatch.setattr(bench_layouts, "ROOT", tmp_path)
    monkeypatch.delenv("MICRO_BATCH", raising=False)
    options = bench_layouts.parse(["--output", str(tmp_path), "--model", model, *words])
    bench_layouts.train(layout, tmp_path / "run", 5, "cuda", options)
    shown = (tmp_path / "run" / "output.txt").read_text()
    assert all(f"given {name}={value}\n" in shown for name, value in expected.items()), shown
    assert f"--mom-expert-exchange {argument}" in shown
    if model == "1.3b":
        assert "given MICRO_BATCH=\n" in shown  # the script chooses
    assert f"given TRAIN_ITERS={5 if '--no-profile' in words else 6}\n" in shown  # a last one to profile
    assert ("--profile-step-end 6" in shown) == ("--no-profile" not in words)
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["STEPS"] == 5
    assert (kept["SEQ_LENGTH"], kept["MICRO_BATCH"], kept["MODEL"]) == (4096, 2, model)


def test_layouts_are_those_that_the_machine_has_gpus_for(monkeypatch):
    monkeypatch.setattr(bench_layouts.torch.cuda, "device_count", lambda: 2)
    assert bench_layouts.possible_layouts("cuda", False)[-1] == "CP2"
    assert "EP2 peer-memory" not in bench_layouts.possible_layouts("cpu", False)
    monkeypatch.setattr(bench_layouts.torch.cuda, "device_count", lambda: 4)
    assert bench_layouts.possible_layouts("cuda", True) == ("one", "CP2", "CP4")
