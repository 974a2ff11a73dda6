"""`python -m linear_moe script.py`, and `--spec` without it, on a script in the shape of Megatron-LM's."""

import re
import shutil
from pathlib import Path

import pytest
from pretraining_runs import MOM, TINY, run_python

FOLDER = Path(__file__).parent / "script"
SCRIPT = FOLDER / "pretrain_stand_in.py"
COMMON = [*TINY, "--mock-data", "--train-iters", 6]
SPEC = "--spec linear_moe.layer_specs mom_layer_spec".split()


def launch(*arguments, **options):
    return run_python("-m", "linear_moe", SCRIPT, *arguments, **options)


def without_launcher(*arguments, before=(), **options):
    return run_python(FOLDER / "without_launcher.py", *before, SCRIPT, *arguments, **options)


def losses(run) -> dict[int, str]:
    """Iteration -> training loss with all digits that Megatron prints; 0 -> validation loss at the end."""
    assert run.returncode == 0, run.stdout[-3000:]
    training = re.findall(r"iteration +(\d+)/.* lm loss: (\S+)", run.stdout)
    validation = re.findall(r"on validation set \| lm loss value: (\S+)", run.stdout)
    return {int(step): loss for step, loss in training} | {0: validation[-1]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six iterations with memories, a checkpoint after three and six."""
    checkpoints = tmp_path_factory.mktemp("launcher") / "checkpoints"
    return launch(*COMMON, *MOM, "--save", checkpoints, "--save-interval", 3, new_interpreter=True), checkpoints


def test_loss_falls_and_a_line_about_the_memories_is_added(trained):
    run, _ = trained
    found = losses(run)
    assert float(found[6]) < float(found[1]) - 0.3
    assert "memories at iteration 6 | load " in run.stdout
    assert re.search(r"^found: .*; not found: .*CUDA", run.stdout, re.M)
    assert "patch model applied" not in run.stdout
    assert len(re.findall(r"^Mixture-of-Memories: \d+ changes to Megatron in effect", run.stdout, re.M)) == 1


def test_two_processes_give_the_losses_of_one(trained):
    pair = launch(*COMMON, *MOM, "--use-distributed-optimizer", processes=2)
    assert losses(pair) == losses(trained[0])


def test_resumes_with_arguments_from_the_checkpoint(trained, tmp_path):
    run, checkpoints = trained
    shutil.copytree(checkpoints, tmp_path / "c", ignore=shutil.ignore_patterns("iter_0000006"))
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = losses(launch(*COMMON, "--load", tmp_path / "c", "--use-checkpoint-args"))
    # Megatron averages the first loss that it prints after a start over two iterations.
    assert {step: loss for step, loss in resumed.items() if step != 5} == {
        step: loss for step, loss in losses(run).items() if step in (0, 4, 6)
    }


def test_spec_without_launcher_gives_the_same_losses(trained, tmp_path):
    (tmp_path / "mom.yaml").write_text("mom_num_heads: 2\nmom-head-dim: 32\n")
    environment = {"MOM_CONFIG": str(tmp_path / "mom.yaml"), "MOM_HEAD_DIM": "16"}
    load = ["--load", trained[1], "--train-iters", 8]
    run = without_launcher(*COMMON, *SPEC, environment=environment, new_interpreter=True)
    assert losses(run) == losses(trained[0])
    assert "memories at iteration 6" in run.stdout
    other = without_launcher(*COMMON, *SPEC, *load, environment=environment | {"MOM_NUM_MEMORIES": "2"})
    assert "the checkpoint was written with --mom-num-memories 4, the command line says 2" in other.stdout


def exact_losses(run) -> list[str]:
    """Every micro-batch's loss, of training and of validation, to the bit."""
    found = re.findall(r"exact loss (\S+)", run.stdout)
    assert run.returncode == 0 and len(found) > 12, run.stdout[-3000:]
    return found


def test_without_memories_and_after_uninstall_the_losses_are_the_plain_scripts_to_the_bit():
    alone = exact_losses(without_launcher(*COMMON, new_interpreter=True))
    assert exact_losses(launch(*COMMON)) == alone
    assert exact_losses(without_launcher(*COMMON, before=["--apply-and-undo"])) == alone


def test_letter_g_of_a_hybrid_pattern():
    run = launch(*COMMON, *MOM, "--hybrid-layer-pattern", "G-*-")
    found = losses(run)
    assert float(found[6]) < float(found[1]) - 0.3
    assert "memories at iteration 6 | load " in run.stdout


def test_multi_token_prediction_of_a_hybrid_model_with_memories_in_both():
    run = launch(*COMMON, *MOM, "--hybrid-layer-pattern", "G-*-/G*-")
    assert run.returncode == 0, run.stdout[-3000:]
    lines = [line for line in run.stdout.splitlines() if "mtp_1 loss" in line]
    found = [float(re.search(r"mtp_1 loss: ([\d.E+-]+)", line)[1]) for line in lines]
    assert len(found) == 6 and found[-1] < found[0] - 0.1


def test_the_deprecated_name_of_a_pattern_in_a_command_for_gpus():
    stack = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    gpus = [*stack.split(), "--transformer-impl", "transformer_engine", "--distributed-backend", "nccl"]
    memories = launch(*COMMON, *MOM, *gpus, "--hybrid-override-pattern", "G-")
    assert losses(memories) and "memories at iteration 6 | load " in memories.stdout
    assert "no GPU: --transformer-impl transformer_engine becomes local" in memories.stdout
    softmax = launch(*COMMON, *MOM, "--hybrid-override-pattern", "*-*-", "--log-interval", 100)
    assert softmax.returncode != 0 and "for example --hybrid-layer-pattern 'R-*-'" in softmax.stdout


def test_refuses_what_would_build_another_model():
    run = launch(*COMMON, *MOM, "--spec", "some.module", "some_spec")
    assert run.returncode != 0
    assert "does not work with --spec some.module some_spec: leave --spec out" in run.stdout, run.stdout[-2000:]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere.py"], "there is no script 'nowhere.py'"), ([SCRIPT, "--yaml-cfg", "x.yaml"], "ignores all arguments")],
)
def test_refuses_before_anything_is_imported(words, message):
    run = run_python("-m", "linear_moe", *words, "--token-mixer", "mom", new_interpreter=True)
    assert run.returncode == 2 and message in run.stdout
