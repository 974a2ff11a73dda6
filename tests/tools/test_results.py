"""RESULTS.md: its parts follow from the measured rows, and `make results QUICK=1` runs the whole way on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from linear_moe.commands import results as command
from linear_moe.evidence import recall_summary, tables
from linear_moe.evidence.origin import origin_table, repeatable
from linear_moe.evidence.results import LANGUAGE_MODELS, NOT_MEASURED, PART, Results, fill, merge_rows
from linear_moe.recall import records
from linear_moe.recall.models import Mixer, Shape
from linear_moe.recall.task import Task
from linear_moe.recall.training import Job, Result, Settings, Training

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(Task(256, 256, (16, 32), 16), Shape(2, 32), Training(steps=8))
ORIGIN = dict(zip(records.ORIGIN, ("CPU", "1", "2", "abc", "tools/recall.py --steps 8"), strict=True))
GDN, MOM = Mixer(), Mixer(memories=4, topk=2, shared=True)


def rows_of(mixer, accuracies, steps=8):
    """accuracies: {(rate, seed): at both numbers of pairs}."""
    settings = replace(SETTINGS, training=replace(SETTINGS.training, steps=steps))
    return [
        records.result_row(Result(Job(mixer, rate, seed), both, ((8, 0.5),), 1.0, True, 1.0, 1), settings, ORIGIN)
        for (rate, seed), both in accuracies.items()
    ]


def test_the_document_is_what_the_measured_rows_say(tmp_path):
    """Mended by: python tools/results.py --document-only"""
    document = (ROOT / "RESULTS.md").read_text()
    assert fill(document, Results(ROOT / "tools/measured", tmp_path, "docs/pictures")) == document
    for picture in re.findall(r"\]\((docs/pictures/\S+)\)", document):
        assert (tmp_path / Path(picture).name).stat().st_size > 0


def test_a_part_without_a_name_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the document has parts nothing; there are recall, language-models"):
        fill("<!-- results: nothing -->\n<!-- end of results -->\n", Results(tmp_path, tmp_path, "."))


def test_what_is_not_measured_is_said(tmp_path):
    text = fill("a\n<!-- results: recall -->\nold\n<!-- end of results -->\nb\n", Results(tmp_path, tmp_path, "."))
    assert text == f"a\n<!-- results: recall -->\n\n{NOT_MEASURED}\n\n<!-- end of results -->\nb\n"
    assert all(make() == NOT_MEASURED for make in Results(tmp_path, tmp_path, ".").parts().values())


def test_the_best_rate_of_the_first_seed_is_shown_with_all_its_seeds():
    rows = rows_of(GDN, {(1e-3, 0): (0.4, 0.2), (2e-3, 0): (0.1, 0.1), (1e-3, 1): (0.3, 0.1)})
    rows += rows_of(MOM, {(1e-3, 0): (0.5, 0.5), (2e-3, 0): (0.95, 0.92), (2e-3, 1): (0.99, 0.91)})
    gdn, mom = recall_summary.trained(rows)
    assert (gdn.mixer, mom.mixer) == (GDN, MOM) and mom.tried == ("0.001", "0.002")
    assert mom.accuracy(16).tolist() == [0.95, 0.99] and gdn.accuracy(32).tolist() == [0.2, 0.1]
    text = recall_summary.table(rows)
    assert "| MoM(GDN) 4/2 shared 1 x 16 x 16 | 256 | 1280 |" in text
    assert "| state of a memory | 97 (95 to 99), other 35 (30 to 40): holds | 92 (91 to 92), other" in text
    assert text.count(": holds |") == 2
    weaker = rows_of(MOM, {(2e-3, 2): (0.89, 0.95)})
    assert recall_summary.table(rows + weaker).count(": does not hold |") == 1


def test_a_model_with_a_convolution_over_the_text_is_compared_with_the_same_memory():
    text = replace(MOM, text_conv=4)
    rows = rows_of(GDN, {(1e-3, 0): (0.4, 0.2)}) + rows_of(MOM, {(1e-3, 0): (0.5, 0.3)})
    rows += rows_of(text, {(1e-3, 0): (0.97, 0.95)})
    (group,) = recall_summary.comparisons(rows)
    shown = recall_summary.table(group)
    assert f"| {text.name} | 256 | 1280 |" in shown and f"| {MOM.name} | 256 | 1280 |" in shown
    assert f"| {text.name} | {GDN.name} | state of a memory | 97, other 40: holds | 95, other 20: holds |" in shown
    assert f"| {MOM.name} | {GDN.name} | state of a memory | 50, other 40: does not hold |" in shown


def test_rows_of_other_steps_are_another_comparison():
    long, short = rows_of(GDN, {(1e-3, 0): (0.4, 0.2)}, 16), rows_of(GDN, {(1e-3, 0): (0.1, 0.1)}, 8)
    assert recall_summary.comparisons(short + long) == [long, short]


def test_ablations_of_small_models_are_no_part_of_the_comparison(tmp_path):
    """However many they are: the models that computed most are the comparison."""
    shape = {"data": "t", "layers": "2", "ffn": "64", "length": "64", "batch": "4", "vocabulary": "512"}

    def row(model, hidden, tokens):
        row = {"model": model, **shape, "hidden": str(hidden), "precision": "bf16", "tokens": str(tokens)}
        return row | {"trained_tokens": str(tokens), "parameters": str(1000 * hidden)}

    rows = [row(name, 32, 500) for name in ("mom", "mom-k1", "mom-k4", "gdn")] + [row("mom-small", 32, 900)]
    rows += [row("mom", 64, 900), row("softmax", 64, 900)]
    records.append(tmp_path / LANGUAGE_MODELS / tables.MODELS, rows)
    found = Results(tmp_path, tmp_path, ".")
    assert found.compared == rows[5:] and found.ablations == [rows[:4]] and found.others == [rows[4:5]]


def test_a_recorded_command_is_shown_as_a_user_repeats_it():
    words = "tools/recall.py --steps 20 --commit abc --time-limit 500 --output /tmp/a --mom 4/2+shared --heads 1"
    assert repeatable(words) == "python tools/recall.py --steps 20 --output runs/recall --mom 4/2+shared --heads 1"
    assert repeatable("tools/recall.py --output=/tmp/a --commit=abc") == "python tools/recall.py --output runs/recall"
    assert repeatable("tools/recall.py --tokens 9", 5).endswith("--tokens 9")


def test_a_command_is_one_line_of_the_origin_and_has_the_tokens_that_were_chosen():
    shared = {"commit": "abc", "device": "CPU", "torch": "2"}
    first = "tools/language_models.py --output /tmp/lm --models mom gdn --tokens 150e6 --fit-time --time-limit 540"
    again = "tools/language_models.py --output /tmp/lm --data /tmp/d --models mom --fit-time"
    rows = [{"command": first, "tokens": tokens, **shared} for tokens in ("88", "120", "88")]
    rows += [{"command": again, "tokens": "88", **shared}, ORIGIN]
    whole = "python tools/language_models.py --output runs/language_models --models mom gdn --tokens 88"
    assert origin_table(rows).splitlines()[2:] == [
        f"| `{whole}` | abc | CPU | 2 | 3 |",
        f"| `{whole.replace('mom gdn', 'mom')}` | abc | CPU | 2 | 1 |",
        "| `python tools/recall.py --steps 8` | abc | CPU | 1 | 1 |",
    ]


def test_rows_are_merged_once(tmp_path):
    rows = rows_of(GDN, {(1e-3, 0): (0.4, 0.2), (1e-3, 1): (0.3, 0.2)})
    records.append(tmp_path / "h1_recall.csv", rows[:1])
    records.append(tmp_path / "recall.csv", rows)
    for _ in range(2):
        merge_rows(sorted(tmp_path.glob("*recall.csv")), tmp_path / "all.csv")
        assert records.read(tmp_path / "all.csv") == rows


@pytest.mark.timeout(900)
def test_the_quick_run_trains_measures_writes_and_does_not_train_again(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tools/results.py"), "--quick", "--output", str(tmp_path / "out")]
    before = (ROOT / "RESULTS.md").read_bytes()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "RESULTS.md").read_bytes() == before

    measured = tmp_path / "out/measured"
    models = {row["model"]: row for row in records.read(measured / "language_models" / tables.MODELS)}
    assert set(models) == {"mom", "softmax"} and len(records.read(measured / "recall.csv")) >= 4
    for row in models.values():
        assert 0 < float(row["bits_per_byte_short"]) < 8 and 0 < float(row["bits_per_byte_long"]) < 10
        assert float(row["training_loss"]) < 6.24  # of uniform guesses among 512 tokens
    text = (tmp_path / "out/RESULTS.md").read_text()
    parts = {found[1]: found[2] for found in PART.findall(text)}
    assert {name for name, part in parts.items() if NOT_MEASURED in part} == {"ablations"}
    pictures = re.findall(r"\]\((pictures/\S+)\)", text)
    assert len(pictures) == 8 and all((tmp_path / "out" / picture).is_file() for picture in pictures)

    # Memories: shares are shares, a routed memory's answers come from its own tokens, the shared memory's do not.
    (held,) = (measured / "language_models").glob("memories_mom*.json")
    for layer in json.loads(held.read_text())["layers"].values():
        assert sum(layer["load"]) == pytest.approx(1) and len(layer["load"]) == 4
        assert max(layer["isolation"]["own"]) < 1e-5 < 1e-2 < min(layer["isolation"]["shared"])
        assert set(layer["without"]) == {"0", "1", "2", "3", "shared"}

    # Rows alone are enough: the same command trains nothing, though the runs are gone.
    shutil.rmtree(tmp_path / "out/recall")
    for path in (tmp_path / "out/language_models").glob("*_seed0"):
        shutil.rmtree(path)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 models, 2 of them finished before" in done.stdout and " models to train for " not in done.stdout
    assert (tmp_path / "out/RESULTS.md").read_text() == text


def test_models_of_full_size_are_not_trained_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--output", str(tmp_path), "--measured", str(tmp_path)]) == 1
    assert "needs a GPU: give --quick, or --document-only" in capsys.readouterr().err


def test_rows_of_another_machine_are_added(tmp_path, capsys):
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    (other / "memories_x.json").write_text("{}")
    words = ["--quick", "--output", str(tmp_path / "out"), "--add", str(other)]
    assert command.main(words) == 1
    assert f"--add {other} has no models.csv" in capsys.readouterr().err
    row = {"key": "k", "data": "d"}
    for name in (tables.POSITIONS, tables.MODELS):
        records.append(other / name, [row])
    for _ in range(2):
        command.add_models(other, tmp_path / "kept")
    assert records.read(tmp_path / "kept" / tables.MODELS) == [row]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "memories_x.json", "models.csv", "positions.csv",
    ]  # fmt: skip


def test_a_tool_that_fails_is_named_after_the_document_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "train", lambda args, deadline: ["recall.py"])
    assert command.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "recall.py ended with an error" in capsys.readouterr().err and (tmp_path / "RESULTS.md").is_file()
