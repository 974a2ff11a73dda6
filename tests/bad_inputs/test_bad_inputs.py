"""Bad inputs are refused by name: a seeded selection, and with MOM_ALL_BAD_INPUTS=1 every case of the generator."""

import os
from pathlib import Path

import pytest
from api_cases import api_cases
from command_cases import command_cases
from judge import Case, draw, run_apart, table, untouched
from script_cases import script_cases
from training_cases import setting_cases, training_cases

EVERY = os.environ.get("MOM_ALL_BAD_INPUTS", "0") not in ("", "0")
SEED = 0


@pytest.mark.timeout(7200 if EVERY else 300)
@pytest.mark.parametrize(
    ("source", "count", "least"),
    [(api_cases, None, 600), (setting_cases, None, 100), (script_cases, 12, 250), (command_cases, 8, 150),
     (training_cases, 4, 300)],
    ids=["api", "settings", "script", "commands", "training"],
)  # fmt: skip
def test_bad_inputs_are_refused_by_name(source, count, least, tmp_path):
    every = source(tmp_path)
    assert len(every) >= least
    drawn = draw(every, None if EVERY else count, SEED)
    with untouched() as appeared:
        faults = {case: fault for case in drawn if (fault := run_apart(case)) is not None}
    assert not faults, f"\n{table(faults)}"
    assert not appeared, f"appeared in the repository: {appeared}"


def test_a_seed_draws_the_same_cases_and_every_target_in_turn():
    every = api_cases()
    drawn = [str(case) for case in draw(every, 40, SEED)]
    assert drawn == [str(case) for case in draw(every, 40, SEED)] != [str(case) for case in draw(every, 40, SEED + 1)]
    assert {case.target for case in draw(every, 40, SEED)} == {case.target for case in every}


def test_a_file_that_a_case_leaves_in_its_working_folder_or_elsewhere_is_a_fault(tmp_path):
    here = Path.cwd()
    write = Case("command", "--output", "negative", lambda: Path("-1").write_text("") or None)
    assert run_apart(write) == "left in the working folder: ['-1']"
    assert run_apart(Case("command", "--output", "zero", lambda: "a fault")) == "a fault"
    assert Path.cwd() == here and not (here / "-1").exists()
    with untouched(tmp_path) as appeared:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "loss.png").touch()
    assert appeared == ["folder", "folder/loss.png"]
