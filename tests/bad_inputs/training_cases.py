"""Bad values for the arguments of training, for the settings in MOM_CONFIG and MOM_*, and for the launcher's words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import warm_python
from judge import Case, names

ROOT = Path(__file__).parents[2]
WORDS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 2 --vocab-size 127 --make-vocab-size-divisible-by 64 --swiglu "
    "--tokenizer-type NullTokenizer --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --log-interval 1 --eval-iters 1 --eval-interval 100 "
    "--no-create-attention-mask-in-dataloader --mock-data --train-iters 1 --token-mixer mom --mom-num-heads 2 "
    "--mom-head-dim 16"
).split()
OURS = {
    "--token-mixer": str, "--mom-rule": str, "--mom-num-memories": int, "--mom-topk": int, "--mom-num-heads": int,
    "--mom-head-dim": int, "--mom-expand-v": float, "--mom-conv-kernel": int, "--mom-text-conv": int,
    "--mom-aux-loss-coeff": float, "--mom-z-loss-coeff": float, "--mom-kernels": str,
}  # fmt: skip
MEGATRONS = {
    "--num-layers": int, "--hidden-size": int, "--num-attention-heads": int, "--ffn-hidden-size": int,
    "--seq-length": int, "--max-position-embeddings": int, "--micro-batch-size": int, "--global-batch-size": int,
    "--train-iters": int, "--vocab-size": int, "--make-vocab-size-divisible-by": int, "--lr": float, "--min-lr": float,
    "--lr-warmup-iters": int, "--lr-warmup-fraction": float, "--lr-decay-iters": int, "--lr-decay-style": str,
    "--weight-decay": float, "--clip-grad": float, "--adam-beta1": float, "--adam-beta2": float, "--adam-eps": float,
    "--norm-epsilon": float, "--init-method-std": float, "--seed": int, "--log-interval": int, "--eval-interval": int,
    "--eval-iters": int, "--save-interval": int, "--attention-dropout": float, "--hidden-dropout": float,
    "--tensor-model-parallel-size": int, "--pipeline-model-parallel-size": int, "--context-parallel-size": int,
    "--expert-model-parallel-size": int, "--linear-attention-freq": str, "--num-workers": int, "--load": Path,
    "--save": Path, "--data-path": Path, "--tokenizer-model": Path, "--tensorboard-dir": Path, "--split": str,
}  # fmt: skip


def values(kind: type, inputs: Path) -> Iterator[tuple[str, str]]:
    yield "empty", ""
    if kind is Path:
        yield "missing path", f"{inputs}/nowhere"
        yield "unreadable path", f"{inputs}/loop"
        yield "path through a file", f"{inputs}/file/deep"
        yield "wrong type", f"{inputs}/file"
        yield "huge", f"{inputs}/{'x' * 300}"
    else:
        yield "wrong type", "nonsense"
        yield "negative", "-1"
        yield "zero", "0"
        yield "huge", "9" * 18
        yield "NaN", "nan"
        if kind is not str:
            yield "fraction", "1.5"


NOT_TOO_LARGE = {"zero", "fraction"}
ALLOWED = {
    "--mom-aux-loss-coeff": {"zero", "fraction", "huge"}, "--mom-z-loss-coeff": {"zero", "fraction", "huge"},
    "--mom-text-conv": {"zero"},
    "--norm-epsilon": NOT_TOO_LARGE, "--weight-decay": {"zero", "fraction"}, "--adam-beta1": {"zero"},
    "--adam-beta2": {"zero"}, "--adam-eps": {"zero", "fraction", "huge"}, "--clip-grad": {"zero", "fraction", "huge"},
    "--max-position-embeddings": {"huge"}, "--tensorboard-dir": {"empty", "missing path"}, "--save": {"missing path"},
    "--split": {"empty", "huge"}, "--lr": {"zero", "fraction"},
    "--min-lr": {"zero"}, "--lr-warmup-iters": {"zero"}, "--lr-warmup-fraction": {"zero"}, "--seed": {"zero"},
    "--lr-decay-iters": {"huge"}, "--log-interval": {"huge"}, "--eval-interval": {"huge"}, "--eval-iters": {"zero"},
    "--save-interval": {"huge"}, "--attention-dropout": {"zero"}, "--hidden-dropout": {"zero"},
    "--init-method-std": {"zero", "fraction"}, "--num-workers": {"zero"}, "--linear-attention-freq": {"huge"},
}  # fmt: skip
"""By option: values that are bad in general and that work here. A run must print a finite loss."""
NOT_A_NUMBER = {("--lr", "huge"), ("--weight-decay", "huge"), ("--init-method-std", "huge")}
"""Values that work for a step, after which Megatron ends the run because the loss is NaN."""


SECONDS = 200


def run_training(words: list[str], folder: Path, **environment: str):
    environment = os.environ | warm_python.ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment
    environment.pop("TRITON_INTERPRET", None)
    return warm_python.run(*words, folder=folder, environment=environment, timeout=SECONDS)


def judge(option: str, value: str, kind: str, inputs: Path) -> str | None:
    words = without(WORDS, option)
    out = inputs.parent / "training"
    out.mkdir()
    if option == "--data-path":
        words.remove("--mock-data")
    if option == "--tokenizer-model":
        words = [
            *without(without(words, "--tokenizer-type"), "--vocab-size"),
            "--tokenizer-type",
            "HuggingFaceTokenizer",
        ]
    if option == "--save":
        words += ["--save-interval", "1"]
    try:
        run = run_training(["-m", "linear_moe.pretrain", *words, f"{option}={value}"], out)
    except subprocess.TimeoutExpired:
        return f"no end in {SECONDS} s"
    else:
        left = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    finally:
        shutil.rmtree(out)
        shutil.rmtree(inputs / "nowhere", ignore_errors=True)
    output = run.stdout
    if run.returncode == 0:
        losses = re.findall(r"^step +\d+/.*? loss ([\d.naif]+)", output, re.M)
        if kind not in ALLOWED.get(option, ()):
            return f"accepted: losses {losses}"
        return None if losses and all(re.fullmatch(r"[\d.]+", loss) for loss in losses) else f"no loss: {losses}"
    if "Traceback" in output:
        return f"traceback: {output.strip().splitlines()[-1]}"
    if run.returncode < 0:
        return f"killed by signal {-run.returncode}"
    if left:
        return f"half-written: {left[:3]}"
    said = output[output.rfind("error:") :] if "error:" in output else ""
    shown = value if 1 < len(value) < 200 else value[:40]
    short = option.removeprefix("--mom-").removeprefix("--").replace("-", "_")
    found = names(said, option, short) or any(word and word in said for word in (shown, repr(value)))
    if not found and "Tokenizer path must be specified" not in said:
        return f"names neither argument nor value: {output.strip()[-250:]}"
    return None


def judge_setting(name: str, value: object, in_file: bool, inputs: Path) -> str | None:
    """The fault of a model's configuration with a bad setting of the environment or of the file."""
    from linear_moe.config import MomTransformerConfig
    from linear_moe.entry.environment import read_settings

    environment = {name.upper(): str(value)}
    if in_file:
        (inputs / "mom.yaml").write_text(f"{name}: {value}\n")
        environment = {"MOM_CONFIG": str(inputs / "mom.yaml")}
    try:
        settings = {"mom_head_dim": 16} | read_settings(environment)
        MomTransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=2, **settings)
    except (ValueError, TypeError) as error:
        text, short = str(error), name.removeprefix("mom_")
        found = names(text, name, short, name.replace("_", "-"), f"--{name.replace('_', '-')}")
        return None if found else f"names neither setting nor value: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def judge_config(content: bytes | None, path: Path) -> str | None:
    """The fault of a MOM_CONFIG that is no file of settings."""
    from linear_moe.entry.environment import read_settings

    if content is not None:
        path.write_bytes(content)
    try:
        read_settings({"MOM_CONFIG": str(path)})
    except (ValueError, OSError) as error:
        return None if any(word in str(error) for word in (str(path), "--mom-topk")) else f"names no file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def judge_launcher(words: list[str]) -> str | None:
    run = run_training(["-m", "linear_moe", *words], Path.cwd())
    if run.returncode == 0 or "Traceback" in run.stdout or words[0] not in run.stdout:
        return f"status {run.returncode}: {run.stdout.strip()[-200:]}"
    return None


def make_inputs(folder: Path) -> Path:
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    (inputs / "loop").symlink_to(inputs / "loop")
    (inputs / "file").write_text("no model, no data\n")
    return inputs


def training_cases(folder: Path) -> list[Case]:
    inputs = make_inputs(folder)
    cases = [
        Case("pretrain", option, kind, partial(judge, option, value, kind, inputs))
        for option, type_ in (OURS | MEGATRONS).items()
        for kind, value in values(type_, inputs)
        if (option, kind) not in NOT_A_NUMBER
    ]
    for words in ([""], [f"{inputs}/nowhere.py"], [f"{inputs}"], [f"{inputs}/loop"], [f"{inputs}/file/x.py"]):
        cases.append(Case("linear_moe", "script", words[0][-8:] or "empty", partial(judge_launcher, words)))
    return cases


def setting_cases(folder: Path) -> list[Case]:
    inputs, cases = make_inputs(folder), []
    for option, type_ in OURS.items():
        if option == "--token-mixer":
            continue
        name = option[2:].replace("-", "_")
        for kind, value in values(type_, inputs):
            if (name, kind) in FINE_SETTINGS:
                continue
            for in_file in (False, True):
                if in_file and kind == "empty":
                    continue  # a name without a value: the default
                target = "MOM_CONFIG" if in_file else "MOM_*"
                cases.append(Case(target, name, kind, partial(judge_setting, name, value, in_file, inputs)))
    for name in ("mom_shared_memory", "mom_single_kv_proj"):
        for kind, value in (("wrong type", "maybe"), ("negative", "-1"), ("huge", "9" * 40), ("empty", "''")):
            cases.append(Case("MOM_CONFIG", name, kind, partial(judge_setting, name, value, True, inputs)))
    contents = {
        "empty list": b"[]", "wrong type": b"text", "wrong type: list": b"- mom_topk: 2", "not UTF-8": b"\xff\xfe\x00",
        "broken": b"mom_topk: [1,", "nested": b"mom_topk: {a: 1}", "code": b"!!python/object/apply:os.system ['true']",
        "alias bomb": b"a: &a [x,x]\nb: &b [*a,*a]\nmom_topk: *b", "number as name": b"3: 4",
    }  # fmt: skip
    for kind, content in contents.items():
        cases.append(Case("MOM_CONFIG", "file", kind, partial(judge_config, content, inputs / "bad.yaml")))
    for kind, path in (
        ("missing path", "nowhere"),
        ("unreadable path", "loop"),
        ("a folder", "."),
        ("huge", "x" * 300),
    ):
        cases.append(Case("MOM_CONFIG", "path", kind, partial(judge_config, None, inputs / path)))
    return cases


FINE_SETTINGS = (
    {("mom_aux_loss_coeff", kind) for kind in ("zero", "huge", "fraction")}
    | {("mom_z_loss_coeff", kind) for kind in ("zero", "huge", "fraction")}
    | {("mom_expand_v", "huge"), ("mom_text_conv", "zero")}
)
"""Values that work."""


def without(words: list[str], option: str) -> list[str]:
    """The words without an option and its value."""
    if option not in words:
        return list(words)
    place = words.index(option)
    return [*words[:place], *words[place + 2 :]]
