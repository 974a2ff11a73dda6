"""The scripts for several nodes, with stand-ins for Slurm's commands and for the main script."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs the command once a node, as the tasks of a step, and exits with the highest status.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$RECORDS/commands"
while [[ "$1" == --* ]]; do shift; done
worst=0
for ((node = 0; node < SLURM_NNODES; node++)); do
    status=0
    SLURM_NODEID=$node "$@" || status=$?
    if [ "$status" -gt "$worst" ]; then worst=$status; fi
done
exit "$worst"
"""

SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$RECORDS/commands"
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' gpu07 gpu08 gpu09; fi
"""

# Writes down what reached it. SIGNALLED: every process of the step gets SIGTERM, as from Slurm.
MAIN = """#!/usr/bin/env bash
"$MOM_PYTHON" -c 'import json, os, sys; json.dump([dict(os.environ), sys.argv[2:]], open(sys.argv[1], "w"))' \\
    "$RECORDS/node-$NODE_RANK.json" "$@"
if [ -n "${SIGNALLED:-}" ]; then kill -TERM $$ $PPID; fi
exit "${MAIN_STATUS:-0}"
"""

JOB = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_NNODES": "3"}
DATA = {"DATA_PATH": "/data/a text", "TOKENIZER": "/data/tokenizer"}
NODE = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu07"}


class Site:
    """A copy of the repository's scripts with a stand-in for the main one, and a folder of commands."""

    def __init__(self, folder: Path):
        self.root, self.records, commands = folder / "repository", folder / "records", folder / "bin"
        for directory in (self.root / "examples", self.root / "tools", self.records, commands):
            directory.mkdir(parents=True)
        for script in ("examples/pretrain_mom_slurm.sh", "examples/pretrain_mom_multinode.sh", "tools/environment.sh"):
            shutil.copy(ROOT / script, self.root / script)
        (self.root / "examples/pretrain_mom_a100.sh").write_text(MAIN)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}", "RECORDS": str(self.records), "MOM_PYTHON": sys.executable
        }  # fmt: skip

    def run(self, script, *arguments, cwd=None, **settings):
        return subprocess.run(
            ["bash", str(self.root / "examples" / f"pretrain_mom_{script}.sh"), *arguments],
            cwd=cwd or self.root, env=self.environment | settings, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def nodes(self):
        """Of every node that ran the main script: its environment and arguments."""
        return [json.loads(path.read_text()) for path in sorted(self.records.glob("node-*.json"))]

    def commands(self):
        return (self.records / "commands").read_text()


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_slurm_tells_every_node_its_place(site):
    run = site.run(
        "slurm", "--wandb-exp-name", "two words", NODE_RANK="5", MASTER_ADDR="elsewhere", TP="2", **JOB, **DATA
    )
    assert run.returncode == 0, run.stderr
    nodes = site.nodes()
    assert [environment["NODE_RANK"] for environment, _ in nodes] == ["0", "1", "2"]
    for environment, arguments in nodes:
        expected = {"NNODES": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24567", "TP": "2", **DATA}
        assert expected.items() <= environment.items()
        assert "SIGTERM" not in environment["PET_SIGNALS_TO_HANDLE"]
        assert arguments == ["--wandb-exp-name", "two words"]
    assert "scontrol show hostnames gpu[07-09]" in site.commands()
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1" in site.commands()
    assert "requeue" not in site.commands()


def test_slurm_job_that_was_asked_to_stop_is_queued_again(site):
    run = site.run("slurm", SIGNALLED="1", **JOB, **DATA)
    assert run.returncode == 0, run.stderr
    assert len(site.nodes()) == 3
    assert site.commands().splitlines()[-1] == "scontrol requeue 1234567"


@pytest.mark.parametrize("signalled", ["", "1"])
def test_slurm_job_that_failed_is_not(site, signalled):
    run = site.run("slurm", SIGNALLED=signalled, MAIN_STATUS="3", **JOB, **DATA)
    assert run.returncode == 3
    assert "requeue" not in site.commands()


def test_slurm_script_wants_a_job(site):
    run = site.run("slurm", **DATA)
    assert run.returncode == 2
    assert "not in a Slurm job" in run.stderr and "pretrain_mom_multinode.sh" in run.stderr
    assert not site.nodes()


def test_slurm_script_wants_the_repository(site, tmp_path):
    run = site.run("slurm", cwd=tmp_path, **JOB, **DATA)
    assert run.returncode == 2
    assert f"{tmp_path} is not the repository's folder" in run.stderr


def test_slurm_job_without_data_says_what_to_set(site):
    run = site.run("slurm", **JOB)
    assert run.returncode == 2
    assert "set DATA_PATH" in run.stderr and "set TOKENIZER" in run.stderr
    assert not site.nodes()


@pytest.mark.parametrize("missing", sorted(NODE | DATA))
def test_node_without_its_place_says_what_to_set(site, missing):
    run = site.run("multinode", **{name: value for name, value in (NODE | DATA).items() if name != missing})
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: set {missing}: ") and run.stderr.count("\n") == 1
    assert not site.nodes()


@pytest.mark.parametrize("place", [("2", "2"), ("2", "-1"), ("two", "0"), ("0", "0"), ("2", "01")])
def test_node_with_an_impossible_place(site, place):
    nodes, rank = place
    run = site.run("multinode", **(NODE | DATA | {"NNODES": nodes, "NODE_RANK": rank}))
    assert run.returncode == 2
    assert f"NODE_RANK={rank} with NNODES={nodes}" in run.stderr


@pytest.mark.parametrize("model", ["380m", "1.3b", "7b"])
def test_the_model_and_the_arguments_reach_the_main_script(site, model):
    run = site.run("multinode", "--seed", "2", **NODE, **DATA, MODEL=model)
    assert run.returncode == 0, run.stderr
    [(environment, arguments)] = site.nodes()
    assert environment["MODEL"] == model and (NODE | DATA).items() <= environment.items()
    assert arguments == ["--seed", "2"]


def test_unknown_preset(site):
    run = site.run("multinode", **NODE, **DATA, MODEL="13b")
    assert run.returncode == 2
    assert "MODEL=13b: use 380m, 1.3b or 7b" in run.stderr
