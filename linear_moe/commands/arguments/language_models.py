"""Language models on real text that differ in the token mixer alone, trained by Megatron, measured on held-out text.

    python tools/language_models.py --output runs/language_models [--time-limit SECONDS]
    python tools/language_models.py --output DIR --models mom gdn --tokens 300e6 --rates 1e-3 2e-3
    python tools/language_models.py --output DIR --models ablations

The corpus is what every machine has: the sources and documentation of Python and of the installed packages, without
copies, split by package into training and held-out text. Every model is trained by `linear_moe.pretrain` with the same
arguments but the mixer's, on the same tokens in the same order, one on each GPU at a time. Then, on held-out text: bits
per byte, the loss by position up to 16 training lengths, and the loss of tokens that repeat an n-gram of their context.

Finished models are rows of models.csv and are not trained again: a run that was stopped, by --time-limit or otherwise,
goes on from its checkpoints when the same command is given once more. Beside models.csv: positions.csv, repeats.csv,
training.csv, table.md, pictures, and in data/ the corpus with the list of its files. Without a GPU, or with --quick,
tiny models show that the tool runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import fraction, number, positive, whole
from linear_moe.evidence.jobs import ABLATIONS, EQUAL_TOKENS, SMALL, TITLES, Shape, Training

SETS = {"equal-tokens": EQUAL_TOKENS, "ablations": ("mom", *ABLATIONS), "all": (*EQUAL_TOKENS, SMALL, *ABLATIONS)}
QUICK = {
    "layers": 2, "hidden": 32, "ffn": 64, "attention_heads": 2, "heads": 4, "head_dim": 16, "attention_every": 2,
    "length": 64, "vocabulary": 512, "tokens": 20_480, "batch": 16, "micro_batch": 16, "rates": [3e-3],
    "models": ["mom", "mom-hybrid", "softmax"], "max_bytes": 1_500_000, "held_out_share": 0.1, "held_out_tokens": 8192,
    "precision": "fp32", "measure_seconds": 0.0,
}  # fmt: skip
FULL = asdict(Shape()) | asdict(Training()) | {
    "models": ["equal-tokens"], "rates": [Training().rate], "max_bytes": 500_000_000, "held_out_share": 0.02,
    "held_out_tokens": 2_000_000, "measure_seconds": 55.0,
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings that were not given come from FULL, or from QUICK with --quick and without a GPU."""
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of rows, runs and pictures")
    names = ", ".join([*SETS, *TITLES])
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"models and sets of models: {names} [{' '.join(FULL['models'])}]"
    )
    count = number(lambda text: int(float(text)), lambda value: value > 0, "a number of tokens such as 150e6")
    parser.add_argument("--tokens", type=count, help=f"tokens of every training [{FULL['tokens']}]")
    parser.add_argument(
        "--rates", type=positive, nargs="+", help=f"peak learning rates, for every model {FULL['rates']}"
    )
    parser.add_argument(
        "--seeds", type=whole(0, 2**31 - 2), nargs="+", default=[0], help="seeds of weights and batches [0]"
    )
    about = {
        "layers": "layers of every model",
        "hidden": "hidden size",
        "ffn": "width of the SwiGLU layers",
        "attention-heads": "heads of softmax layers",
        "heads": "heads of a memory of MoM",
        "head-dim": "key size of a head of MoM",
        "attention-every": "mom-hybrid has one softmax layer in this many",
        "length": "tokens of a training sequence",
        "vocabulary": "tokens of the tokenizer",
        "batch": "sequences a step",
        "micro-batch": "sequences that a GPU computes at once",
        "gpus": "GPUs that train a model together, by data parallelism",
    }
    for name, text in about.items():
        parser.add_argument(f"--{name}", type=whole(1), help=f"{text} [{FULL[name.replace('-', '_')]}]")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help=f"type of the weights in training [{FULL['precision']}]"
    )
    parser.add_argument(
        "--longest", type=whole(1), default=16, metavar="N", help="longest context to measure, in training lengths [16]"
    )
    parser.add_argument(
        "--held-out-tokens", type=count, help=f"held-out tokens to measure on [{FULL['held_out_tokens']}]"
    )
    parser.add_argument(
        "--held-out-share", type=fraction, help=f"share of the text that is held out [{FULL['held_out_share']}]"
    )
    parser.add_argument("--max-bytes", type=count, help=f"bytes of text that are read [{FULL['max_bytes']}]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the corpus [OUTPUT/data]")
    parser.add_argument(
        "--time-limit",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="stop after this time; the same command goes on from there",
    )
    parser.add_argument(
        "--fit-time",
        action="store_true",
        help="train all models on fewer tokens than --tokens where --time-limit needs that",
    )
    parser.add_argument(
        "--equal-time", choices=tuple(TITLES), metavar="NAME",
        help="then train faster models again, on as many more tokens as take the time of this model",
    )  # fmt: skip
    parser.add_argument(
        "--measure-seconds",
        type=number(float, lambda value: value >= 0, "a number of at least 0"),
        help=f"seconds of --time-limit that are kept for measuring [{FULL['measure_seconds']:g}]",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device [cuda where there is a GPU]")
    parser.add_argument("--corpus-only", action="store_true", help="prepare the corpus, train nothing")
    parser.add_argument("--quick", action="store_true", help="tiny models, as on a machine without a GPU")
    parser.add_argument("--commit", help="commit to write into the rows [that of the git checkout]")
    args = parser.parse_args(argv)
    import torch  # after --help, which needs no PyTorch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (FULL | (QUICK if args.quick or args.device == "cpu" else {})).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.fit_time and args.time_limit == float("inf"):
        parser.error("--fit-time needs --time-limit")
    args.data = args.data or args.output / "data"
    unknown = sorted(set(args.models) - SETS.keys() - TITLES.keys())
    if unknown:
        parser.error(f"--models {' '.join(unknown)}: there are {names}")
    return args
