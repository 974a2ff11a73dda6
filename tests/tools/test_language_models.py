"""Language models on real text: the corpus, the tokens that repeat, the jobs, the time, the rows and the tables."""

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from linear_moe.commands import language_models as command
from linear_moe.evidence import fit, held_out, jobs, report, runs, tables, texts
from linear_moe.evidence.classes import comparisons, title
from linear_moe.evidence.repeats import DISTANCES, FREQUENCIES, LONGEST, BigramCounts, Repeats, find_repeats
from linear_moe.recall import records

SHAPE = jobs.Shape(layers=2, hidden=32, ffn=64, attention_heads=2, heads=4, head_dim=16, length=32, vocabulary=32)
TRAINING = jobs.Training(tokens=256, batch=4, micro_batch=2, precision="fp32")
ORIGIN = dict(zip(records.ORIGIN, ("CPU", "1", "2", "abc", "tools/language_models.py"), strict=True))
LINES = [f"line {number} of a file that no other file has" for number in range(50)]


def job(name="mom", **training):
    return jobs.make_job(name, SHAPE, replace(TRAINING, **training))


def quiet(line):
    pass


@pytest.fixture
def installed(tmp_path):
    """A folder of packages, and its text files."""
    files = {
        "alpha/__init__.py": "\n".join(LINES),
        "alpha/copy.py": "\n".join([*LINES, "one line more than the original"]),
        "alpha-1.0.dist-info/METADATA": "What alpha is for. " * 20,
        "beta.py": "\n".join(f"beta line {number}" for number in range(50)),
        "gamma/near.md": "\n".join([*LINES[:45], *(f"gamma's own line {number}" for number in range(5))]),
        "gamma/own.md": "\n".join(f"gamma text {number}" for number in range(50)),
        "gamma/table.txt": "0" * (texts.LONGEST_LINE + 1),
        "gamma/short.py": "x = 1",
        "gamma/picture.png": "p" * 500,
        "gamma/__pycache__/cached.py": "\n".join(LINES),
    }
    for name, content in files.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "packages/gamma/latin.py").write_bytes("\xe9".encode("latin-1") * 300)
    return texts.find_texts([("", tmp_path / "packages")])


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("torch/nn/functional.py", "torch"),
        ("six.py", "six"),
        ("Typing-Extensions-4.1.dist-info/METADATA", "typing_extensions"),
        ("my_tool-0.2.1.egg-info/top.txt", "my_tool"),
    ],
)
def test_a_file_belongs_to_the_package_of_its_first_folder(path, package):
    assert texts.package_of(path) == package


def test_text_files_of_packages_are_found(installed):
    assert [(text.package, text.name) for text in installed] == [
        ("alpha", "alpha-1.0.dist-info/METADATA"), ("alpha", "alpha/__init__.py"), ("alpha", "alpha/copy.py"),
        ("beta", "beta.py"), ("gamma", "gamma/latin.py"), ("gamma", "gamma/near.md"), ("gamma", "gamma/own.md"),
        ("gamma", "gamma/table.txt"),
    ]  # fmt: skip


def test_copies_and_near_copies_are_left_out_across_the_split(installed, tmp_path):
    sides = texts.gather(installed, {"gamma"}, tmp_path, workers=1)
    paths = {name: [json.loads(line)["path"] for line in side.path.open()] for name, side in sides.items()}
    assert paths == {
        "training": ["alpha/alpha-1.0.dist-info/METADATA", "alpha/alpha/__init__.py", "beta/beta.py"],
        "held_out": ["gamma/gamma/own.md"],  # 90 % of near.md stands in alpha
    }
    listed = (tmp_path / "files.csv").read_text().splitlines()
    assert len(listed) == 5 and listed[0] == "side,package,file,bytes,sha256"
    again = texts.gather(installed, {"gamma"}, tmp_path, workers=2)
    assert again == sides  # the digest too


def test_a_side_without_a_file_is_an_error(installed, tmp_path):
    with pytest.raises(ValueError, match="no file of the Python installation is left for the held_out side"):
        texts.gather(installed, set(), tmp_path, workers=1)


def test_packages_are_held_out_up_to_a_share_and_large_ones_never():
    found = [texts.TextFile(f"p{i:03d}", "a.py", "", 10) for i in range(400)] + [
        texts.TextFile("big", "a.py", "", 4000)
    ]
    chosen = texts.held_out_packages(found, 0.01)
    assert len(chosen) == 8 and "big" not in chosen  # 1 % of 8000 bytes
    assert chosen == texts.held_out_packages(found[::-1], 0.01)


def test_the_limit_of_bytes_draws_files_and_keeps_their_order():
    found = [texts.TextFile("p", f"{i}.py", "", 10) for i in range(100)]
    chosen = texts.limited(found, 200)
    assert len(chosen) == 20 and chosen == sorted(chosen, key=found.index)


def test_this_projects_own_sources_are_no_part_of_the_corpus():
    folders = [folder for _, folder in texts.roots()]
    assert any(folder.name == "site-packages" for folder in folders)
    assert not any((folder / "linear_moe/config.py").exists() and folder.name != "site-packages" for folder in folders)


def by_hand(window, counts, place):
    """(longest n-gram that repeats, tokens since the bigram's last occurrence, its occurrences in training)."""
    longest = 1
    for n in range(2, LONGEST + 1):
        gram = tuple(window[place - n + 1 : place + 1])
        if place - n + 1 >= 0 and any(tuple(window[e - n + 1 : e + 1]) == gram for e in range(n - 1, place)):
            longest = n
    ends = [e for e in range(1, place) if tuple(window[e - 1 : e + 1]) == tuple(window[place - 1 : place + 1])]
    return longest, place - ends[-1] if ends else 0, counts.get(tuple(window[place - 1 : place + 1]), 0)


def test_repeats_are_what_loops_over_the_tokens_find():
    rng = np.random.default_rng(0)
    windows, text = rng.integers(5, size=(3, 61)), rng.integers(5, size=150)
    text[text == 4] = 3  # bigrams that training never saw
    counts = {}
    for pair in zip(text.tolist(), text[1:].tolist(), strict=False):
        counts[pair] = counts.get(pair, 0) + 1
    found = find_repeats(windows, 5, BigramCounts(text, [windows], 5))
    for index, window in enumerate(windows.tolist()):
        for place in range(1, len(window)):
            longest, distance, count = by_hand(window, counts, place)
            assert found.longest[index, place - 1] == longest
            assert found.distance[index, place - 1] == sum(distance >= end for end in DISTANCES)
            assert found.frequency[index, place - 1] == sum(count >= end for end in FREQUENCIES)
    assert {1, 2, 3, 4} <= set(found.longest.flat) and set(found.frequency.flat) == {0, 1, 2}


def test_bigrams_are_counted_across_the_pieces_of_a_text(monkeypatch):
    text, windows = np.arange(100) % 7, np.array([[0, 1, 2, 3, 4, 5, 6, 0]])
    whole = BigramCounts(text, [windows], 7)
    monkeypatch.setattr("linear_moe.evidence.repeats.CHUNK", 10)
    assert (BigramCounts(text, [windows], 7).counts == whole.counts).all() and whole.counts.sum() == 99


def test_windows_are_spread_over_the_text_and_limited():
    tokens = np.arange(101)
    assert held_out.cut_windows(tokens, 10, 1000)[:, 0].tolist() == list(range(0, 91, 10))
    assert held_out.cut_windows(tokens, 10, 30)[:, 0].tolist() == [0, 45, 90]
    with pytest.raises(ValueError, match="the held-out text has 101 tokens, and a window of 200"):
        held_out.cut_windows(tokens, 200, 1000)


def test_a_run_with_other_windows_leaves_those_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "bytes_of_tokens", lambda tokenizer: np.ones(7, np.int64))
    text = np.arange(101) % 7
    (first,) = held_out.prepare(tmp_path, text, text, tmp_path, [10], 100)
    (second,) = held_out.prepare(tmp_path, text, text, tmp_path, [10], 30)
    for found, windows in ((first, 10), (second, 3)):
        assert np.load(found.path).shape == (windows, 11) and found.repeats.longest.shape == (windows, 10)


def some_windows(tmp_path):
    rng = np.random.default_rng(1)
    windows = rng.integers(4, size=(6, 33))
    repeats = find_repeats(windows, 4, BigramCounts(windows.ravel(), [windows], 4))
    return held_out.HeldOut(tmp_path / "windows_32.npy", 32, 500, repeats), rng.random((6, 32)).astype(np.float32)


def test_the_parts_of_the_loss_add_up(tmp_path):
    about, losses = some_windows(tmp_path)
    values = held_out.summary(losses, about)
    assert values["bits_per_byte"] == pytest.approx(losses.sum() / np.log(2) / 500)
    share = values["repeating_share"]
    parts = share * values["repeating_loss"] + (1 - share) * values["other_loss"]
    assert parts == pytest.approx(values["loss"], rel=1e-6) and 0 < share < 1
    bins = list(held_out.by_position(losses))
    assert [first for first, *_ in bins][1:] == [end for _, end, *_ in bins][:-1] and bins[-1][1] == 32
    assert sum((end - first) * loss for first, end, loss, _ in bins) == pytest.approx(32 * values["loss"])
    cells = list(held_out.by_repeat(losses, about.repeats))
    assert sum(tokens for *_, tokens, _ in cells) == losses.size
    assert sum(tokens * loss for *_, tokens, loss in cells) == pytest.approx(losses.sum(), rel=1e-6)
    assert {distance for longest, distance, *_ in cells if longest == 1} == {-1}


def test_only_the_mixer_differs_between_the_models():
    def shared(name):
        words = job(name).arguments()
        return words[words.index("--num-layers") :]

    names = [name for name in jobs.TITLES if name != jobs.SMALL]
    assert all(shared(name) == shared("mom") for name in names)
    assert len({tuple(job(name).arguments()) for name in names}) == len(names)
    assert set(jobs.EQUAL_TOKENS) | set(jobs.ABLATIONS) | {jobs.SMALL, "gdn-heads"} == set(jobs.TITLES)


def test_one_memory_holds_moms_state_in_all():
    mom, by_size, by_heads = (jobs.mixer_of(name, SHAPE) for name in ("mom", "gdn-state", "gdn-heads"))
    assert mom.state == by_size.state == by_heads.state == 5 * 4 * 16 * 16
    assert (by_size.heads, by_size.key_size, by_heads.heads) == (5, 32, 20)
    with pytest.raises(ValueError, match="15 heads of all memories are no multiple of 4"):
        jobs.mixer_of("gdn-state", replace(SHAPE, heads=3))


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch of 4 is no multiple of micro-batches of 3"):
        job(micro_batch=3)
    with pytest.raises(ValueError, match="a batch of 4 is no multiple of micro-batches of 2 on 4 GPUs"):
        job(micro_batch=2, gpus=4)
    with pytest.raises(ValueError, match="there is no model 'mamba'; there are softmax"):
        job("mamba")
    for words in (["--models", "mamba"], ["--fit-time"], ["--tokens", "none"], ["--seeds", "-1"]):
        with pytest.raises(SystemExit) as end:
            command.parse_arguments(["--output", str(tmp_path), *words])
        assert end.value.code == 2


def test_gpus_are_grouped_for_models_that_take_several():
    assert command.grouped((2, 3, 5, 7, 11), 1) == (2, 3, 5, 7, 11)
    assert command.grouped((2, 3, 5, 7, 11), 2) == ("2,3", "5,7")
    for devices in ((0, 1), (None,)):
        with pytest.raises(ValueError, match=f"--gpus 3: there are {len(devices) if devices[0] == 0 else 0} GPUs"):
            command.grouped(devices, 3)


def test_tokens_are_cut_to_what_all_models_can_do():
    slow, fast = job("mom", tokens=50_000_000), job("softmax", tokens=50_000_000)
    speeds = {slow: 1e5, fast: 4e5}
    seconds = fit.seconds_needed([slow, fast], speeds, 2, 10_000_000, 20)
    assert seconds == pytest.approx(fit.MARGIN * 100 + fit.START_SECONDS + 20)
    assert fit.fit_tokens([slow, fast], speeds, 2, seconds, 20) == 10_000_000
    assert fit.fit_tokens([slow, fast], speeds, 2, 1e6, 20) == 50_000_000
    assert fit.seconds_needed([slow, fast], speeds, 1, 10_000_000, 20) > seconds
    with pytest.raises(ValueError, match="50 s are too few for 2 models"):
        fit.fit_tokens([slow, fast], speeds, 2, 50, 20)


def test_a_history_goes_on_where_a_run_was_started_again(tmp_path):
    lines = [{"step": 1, "loss": 9}, {"step": 2, "loss": 8}, {"step": 2, "validation": 7}, {"step": 3, "loss": 6}]
    lines += [{"step": 2, "loss": 5}, {"step": 2, "validation": 4}, {"step": 3, "loss": 3}]
    (tmp_path / runs.HISTORY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.read_history(tmp_path) == [lines[0], lines[4], lines[5], lines[6]]


def test_a_process_is_stopped_at_the_deadline_and_a_failure_shows_the_log(tmp_path):
    sleeper = [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"]
    assert runs._call(sleeper, tmp_path, None, time.monotonic() + 1) is False
    assert "begun" in (tmp_path / runs.LOG).read_text()
    with pytest.raises(runs.RunFailed, match=r"exit status 3, the end of .*log.txt:\nbegun\nthe reason"):
        runs._call([sys.executable, "-c", "print('the reason'); exit(3)"], tmp_path, None, float("inf"))
    assert runs._call([sys.executable, "-c", ""], tmp_path, None, float("inf")) is True


def test_a_job_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    done = []

    def run(job, place, device, *rest):
        if job.name == "gdn":
            raise runs.RunFailed("out of memory")
        if job.name == "softmax":
            raise runs.OutOfTime("not begun: no time is left")
        done.append(job.name)

    monkeypatch.setattr(runs, "run", run)
    place = runs.Place(tmp_path, (tmp_path, tmp_path), tmp_path, (None, None))
    wanted = [job(name) for name in ("mom", "gdn", "softmax", "gdn-state")]
    failed, late = runs.run_all(wanted, place, Future(), {}, ORIGIN, quiet)
    assert sorted(done) == ["gdn-state", "mom"]
    assert [job.name for job in failed] == ["gdn"] and [job.name for job in late] == ["softmax"]


def test_an_interrupt_ends_the_processes_of_the_jobs(tmp_path, monkeypatch):
    """As SIGTERM does, which `linear_moe.commands.run` turns into SystemExit."""
    lasting, ended = [sys.executable, "-c", "import time; time.sleep(60)"], []
    monkeypatch.setattr(runs, "run", lambda *rest: ended.append(runs._call(lasting, tmp_path, None, float("inf"))))
    place = runs.Place(tmp_path, (tmp_path, tmp_path), tmp_path, (None,))
    previous = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(SystemExit):
            runs.run_all([job("mom"), job("gdn")], place, Future(), {}, ORIGIN, quiet)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert ended == [False]  # the first was stopped, the second never begun


FACTS = {"digest": "0123456789abcdef", "tokens": 1000}


def write_rows(folder, job, speed=100.0):
    about, losses = some_windows(folder)
    history = [{"step": 1, "seconds": 1.0, "tokens-per-second": speed, "loss": 2.0, "load": {"1": [0.25, 0.75]},
                "entropy": {"1": 0.5}}, {"step": 8, "validation": 1.5}]  # fmt: skip
    windows = [about, replace(about, length=512)]
    counts = {"parameters": 5000, "embedding": 1000}
    tables.write(folder, job, FACTS, windows, [losses, losses], counts, history, ORIGIN)


def test_finished_models_are_found_by_all_their_settings(tmp_path):
    write_rows(tmp_path, job("softmax"))
    assert runs.is_finished(job("softmax"), tmp_path, FACTS["digest"])
    for other in (job("gdn"), job("softmax", rate=2e-3), job("softmax", tokens=512), job("softmax", seed=1)):
        assert not runs.is_finished(other, tmp_path, FACTS["digest"])
    assert not runs.is_finished(job("softmax"), tmp_path, "another text")


def test_the_report_has_every_model_and_only_models_that_may_be_compared(tmp_path):
    for name in ("mom", "softmax"):
        write_rows(tmp_path, job(name))
    write_rows(tmp_path, job("softmax", tokens=1024))
    write_rows(tmp_path, jobs.make_job("mom", replace(SHAPE, layers=4), TRAINING))
    text, written = report.write_report(tmp_path, quiet)
    assert [path.name for path in written][:2] == ["table.md", "loss_by_position.png"]
    assert all(path.stat().st_size > 0 for path in written)
    models = records.read(tmp_path / tables.MODELS)
    groups = comparisons(models)
    assert [[row["layers"] for row in group] for group in groups] == [["2", "2", "2"], ["4"]]
    assert [title(row, groups[0]) for row in groups[0]] == [
        "MoM 4/2, shared", "softmax attention, 0.000256M tokens", "softmax attention, 0.001024M tokens",
    ]  # fmt: skip
    assert text.count("| softmax attention, 0.001024M tokens |") == 8  # models, three of each length, positions
    assert "At 512 tokens, loss by tokens since the bigram's last occurrence" in text


def test_equal_time_gives_faster_models_more_tokens(tmp_path):
    slow, fast = job("mom", tokens=10_000_000), job("softmax", tokens=10_000_000)
    write_rows(tmp_path, slow, speed=100.0)
    write_rows(tmp_path, fast, speed=250.0)
    longer = command.equal_time([slow, fast], "mom", tmp_path, FACTS["digest"])
    assert [(job.name, job.training.tokens) for job in longer] == [("softmax", 25_000_000)]


def test_a_window_without_a_repeat_has_one_class():
    empty = Repeats(np.ones((1, 4), np.int8), np.zeros((1, 4), np.int8), np.zeros((1, 4), np.int8))
    assert list(held_out.by_repeat(np.ones((1, 4), np.float32), empty)) == [(1, -1, 0, 4, 1.0)]
