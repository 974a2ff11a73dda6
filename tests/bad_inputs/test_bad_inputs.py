"""Bad inputs are refused by name: a seeded selection, and with MOM_ALL_BAD_INPUTS=1 every case of the generator."""

import os

import pytest
from api_cases import api_cases
from command_cases import KNOWN_FAULTS, command_cases
from judge import draw, table
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
    every = [case for case in source(tmp_path) if (case.target, case.argument) not in KNOWN_FAULTS]
    assert len(every) >= least
    faults = {case: fault for case in draw(every, None if EVERY else count, SEED) if (fault := case.run()) is not None}
    assert not faults, f"\n{table(faults)}"


def test_a_seed_draws_the_same_cases_and_every_target_in_turn():
    every = api_cases()
    drawn = [str(case) for case in draw(every, 40, SEED)]
    assert drawn == [str(case) for case in draw(every, 40, SEED)] != [str(case) for case in draw(every, 40, SEED + 1)]
    assert {case.target for case in draw(every, 40, SEED)} == {case.target for case in every}
