"""Argument sets are read from test cases, shell scripts and our own file, and shrunk to few processes."""

from pathlib import Path

import pytest

from linear_moe.trials import argument_sets
from linear_moe.trials.argument_sets import ArgumentSet, to_options
from linear_moe.trials.shrink import shrink

PUBLIC = Path(argument_sets.__file__).with_name("public_scripts.yaml")

CASE = """
ENV_VARS: {CUDA_DEVICE_MAX_CONNECTIONS: 1}
MODEL_ARGS:
  --num-layers: 12
  --bf16: true
  --fp16: false
  --moe-layer-freq: ([0]*3+[1]*9)
  --recompute-modules: "[moe_act mlp]"
  --seed: ${REPEAT}
  --save: ${CHECKPOINT_SAVE_PATH}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def clone(tmp_path):
    cases = tmp_path / argument_sets.TEST_CASES
    write(cases / "gpt" / "dense" / "model_config.yaml", CASE)
    write(cases / "hybrid" / "mamba" / "model_config.yaml", CASE + "  --hybrid-layer-pattern: M-*-\n")
    write(cases / "gpt" / "serving" / "model_config.yaml", "MODE: inference\n" + CASE)
    write(cases / "gpt" / "empty" / "model_config.yaml", "MODEL_ARGS:\n")
    write(cases / "t5" / "dense" / "model_config.yaml", CASE)
    return tmp_path


def test_training_commands_of_test_cases(clone):
    dense, hybrid = argument_sets.from_test_cases(clone)
    assert (dense.name, dense.script) == ("tests/gpt/dense", "pretrain_gpt.py")
    assert (hybrid.name, hybrid.script) == ("tests/hybrid/mamba", "pretrain_hybrid.py")
    assert dense.options == {
        "--num-layers": ("12",),
        "--bf16": (),
        "--moe-layer-freq": ("([0]*3+[1]*9)",),
        "--recompute-modules": ("moe_act", "mlp"),
        "--seed": ("1",),
        "--save": ("${CHECKPOINT_SAVE_PATH}",),
    }


def test_a_folder_without_test_cases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a clone of Megatron-LM"):
        argument_sets.from_test_cases(tmp_path)


def test_commands_of_shell_scripts(tmp_path):
    """The shell computes the words; programs that are no part of the shell do nothing."""
    write(
        tmp_path / "examples" / "gpt" / "train.sh",
        'LAYERS=$((6 * 4))\nARGS=(--num-layers $LAYERS "--fp8-format hybrid")\nmkdir -p "$1"\n'
        "[[ -f pretrain_gpt.py ]] || exit 1\ntorchrun --nproc_per_node 8 ../../pretrain_gpt.py ${ARGS[@]} --bf16\n",
    )
    write(
        tmp_path / "examples" / "moe" / "options.sh",
        'if [[ "$1" != --checkpoint-path ]]; then exit 1; fi\n'
        'srun bash -c "python $PWD/pretrain_hybrid.py --num-layers 2 --bf16"\n',
    )
    write(tmp_path / "examples" / "bert" / "train.sh", "torchrun pretrain_bert.py --num-layers 2\n")
    write(tmp_path / "examples" / "gpt" / "fails.sh", "exit 1; torchrun pretrain_gpt.py --num-layers 2\n")
    first, second = argument_sets.from_examples(tmp_path)
    assert first == ArgumentSet(
        "examples/gpt/train", "pretrain_gpt.py", {"--num-layers": ("24",), "--fp8-format": ("hybrid",), "--bf16": ()}
    )
    assert second == ArgumentSet(
        "examples/moe/options", "pretrain_hybrid.py", {"--num-layers": ("2",), "--bf16": ()}
    )  # fmt: skip


def test_public_scripts_name_their_source():
    sets = argument_sets.from_file(PUBLIC)
    assert len(sets) >= 10
    assert PUBLIC.read_text().count("source: github.com/") == len(sets)
    assert all(shrink(given).processes <= 4 for given in sets)


def test_a_file_of_another_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected name"):
        argument_sets.from_file(write(tmp_path / "scripts.yaml", "a: [1]\n"))


def test_an_option_that_is_given_twice_has_its_last_value():
    assert to_options(["--lr", "1", "--spec", "a", "b", "--lr=2"]) == {"--spec": ("a", "b"), "--lr": ("2",)}
    with pytest.raises(ValueError, match="before the first option"):
        to_options(["word", "--lr", "1"])


def shrunk(text: str):
    trial = shrink(ArgumentSet("set", "pretrain_gpt.py", to_options(text.split())))
    return trial, to_options(list(trial.words))


AXES = "--tensor-model-parallel-size {} --pipeline-model-parallel-size {} --context-parallel-size {} "


@pytest.mark.parametrize(
    ("given", "processes", "sizes"),
    [
        ((1, 1, 1), 2, (1, 1, 1)),
        ((8, 1, 1), 4, (2, 1, 1)),
        ((4, 4, 1), 4, (2, 2, 1)),
        ((2, 2, 2), 4, (2, 1, 2)),
        ((1, 2, 4), 4, (1, 2, 2)),
    ],
)
def test_axes_above_1_become_2_where_four_processes_hold_them(given, processes, sizes):
    trial, options = shrunk(AXES.format(*given) + "--num-layers 24")
    assert trial.processes == processes
    names = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
    assert tuple(int(options[name][0]) for name in names) == sizes


def test_expert_parallelism_divides_the_processes():
    trial, options = shrunk(
        AXES.format(2, 8, 1) + "--expert-model-parallel-size 64 --expert-tensor-parallel-size 1 --num-experts 64"
    )
    assert (trial.processes, options["--expert-model-parallel-size"]) == (4, ("2",))
    assert options["--num-experts"] == ("4",)


def test_a_virtual_pipeline_keeps_its_chunks():
    _, options = shrunk(AXES.format(2, 4, 2) + "--num-layers 24 --num-layers-per-virtual-pipeline-stage 3")
    assert options["--num-layers-per-virtual-pipeline-stage"] == ("1",)
    assert (options["--pipeline-model-parallel-size"], options["--num-layers"]) == (("2",), ("4",))
    _, options = shrunk(
        AXES.format(1, 8, 1) + "--num-layers 61 --mtp-num-layers 1 --pipeline-model-parallel-layout Et|(tt|)*30mL"
    )
    assert (options["--pipeline-model-parallel-layout"], options["--num-layers"]) == (("Et|t|t|tmL",), ("4",))


@pytest.mark.parametrize(("given", "steps"), [("", "1"), ("--eval-iters 100", "1"), ("--eval-iters -1", "-1")])
def test_validation_is_short(given, steps):
    assert shrunk(f"--num-layers 2 {given}")[1]["--eval-iters"] == (steps,)


def test_kinds_of_layers_stay():
    _, options = shrunk("--num-layers 12 --moe-layer-freq ([0]*3+[1]*9) --num-experts 8 --linear-attention-freq 3")
    assert options["--moe-layer-freq"] == ("([0]*1+[1]*2)",)
    assert options["--num-layers"] == ("3",)
    _, options = shrunk("--hybrid-layer-pattern MEM*EM-EM|E*M-/*E --pipeline-model-parallel-size 2")
    assert options["--hybrid-layer-pattern"] == ("ME*-|ME*-|ME*-|ME*-/*E",)


def test_the_schedule_fits_the_steps():
    trial, options = shrunk("--train-samples 1000 --lr 1e-5 --lr-warmup-samples 900 --micro-batch-size 4 --fp16")
    assert trial.steps == 40
    assert options["--train-samples"] == (str(40 * 8),)
    assert int(options["--lr-warmup-samples"][0]) <= 8
    with pytest.raises(ValueError, match="--hidden-size wide: expected a number"):
        shrunk("--hidden-size wide")
