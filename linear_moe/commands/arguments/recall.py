"""Multi-query associative recall: MoM beside baselines of equal state, parameters and time, trained on the spot.

    python tools/recall.py --output runs/recall [--set decisive | all] [--time-limit SECONDS]
    python tools/recall.py --output runs/recall --mom 4/2 8/2+shared gla:8/2 --heads 2
    python tools/recall.py --output runs/recall --mom 4/2+shared+text+1heads 4/2+text+2heads

A MoM model is written memories/top-k, after its rule and a colon where that is not --rule. "+shared" adds the memory
that every token goes to. "+text" adds a convolution over the text, in the place of the memories' own convolutions: a
memory's own convolution sees the tokens that the router sends there, and not a token's neighbour in the text.
"+2heads" gives the model 2 heads instead of --heads. A baseline of one memory keeps its own convolutions, which run
over the text.

Every model trains on the same batches for the same steps, many at once on each GPU. All learning rates are tried on the
first seed and the best goes on to the others (--all-rates: all on all). Steps are doubled, for all models alike, up to
--max-steps until the accuracies are flat. Finished models are rows of recall.csv and are not trained again: a run that
was stopped, by --time-limit or otherwise, goes on with the rest when the same command is given once more. Beside
recall.csv: step_times.csv (steps measured alone), table.md, and pictures. Without a GPU, or with --quick, tiny models
show that the tool runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import between, number, path, whole
from linear_moe.recall.names import MATCHES, MOST_SEEDS

# what a GPU trains, and the tiny sizes that stand in for it
FULL = {
    "vocabulary": 1024, "length": 256, "pairs": [4, 8, 16, 32, 64], "batch": 80, "hidden": 128, "heads": 2,
    "steps": 16000, "rates": [1e-3, 2e-3, 4e-3], "seeds": [0, 1, 2], "evaluations": 32,
}  # fmt: skip
QUICK = {
    "vocabulary": 32, "length": 16, "pairs": [2, 4], "batch": 16, "hidden": 16, "heads": 1,
    "steps": 16, "rates": [3e-3, 1e-2], "seeds": [0, 1], "evaluations": 8,
}  # fmt: skip

_size = whole(1, 1 << 20)
_seconds = number(float, lambda seconds: seconds >= 0, "a number of seconds that is not negative")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings that were not given come from FULL, or from QUICK with --quick and without a GPU."""
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder of rows, table and pictures")
    parser.add_argument(
        "--set", choices=("decisive", "all"), default="decisive", help="set of MoM models to train [%(default)s]"
    )
    parser.add_argument(
        "--mom", nargs="+", metavar="M/K", help="these MoM models instead, as 8/2, gla:4/2, 4/2+shared+text"
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=tuple(MATCHES),
        default=list(MATCHES),
        help="what baseline and MoM have in common, or softmax attention as the baseline [all of them]",
    )
    parser.add_argument(
        "--rule", default="gated_deltanet", help="rule of MoM models whose name has no rule [%(default)s]"
    )
    parser.add_argument("--heads", type=_size, help=f"heads of a MoM model [{FULL['heads']}]")
    parser.add_argument("--head-dim", type=_size, default=16, help="key and value size of a head [%(default)s]")
    parser.add_argument("--layers", type=whole(1, 1000), default=2, help="layers of a model [%(default)s]")
    parser.add_argument("--hidden", type=_size, help=f"hidden size [{FULL['hidden']}]")
    parser.add_argument("--mlp", type=whole(0, 1 << 20), default=0, help="width of SwiGLU layers [%(default)s: none]")
    parser.add_argument("--vocabulary", type=_size, help=f"different tokens of the task [{FULL['vocabulary']}]")
    parser.add_argument("--length", type=_size, help=f"tokens a sequence [{FULL['length']}]")
    parser.add_argument("--pairs", type=_size, nargs="+", help=f"numbers of pairs {FULL['pairs']}")
    parser.add_argument("--batch", type=_size, help=f"sequences a step [{FULL['batch']}]")
    parser.add_argument("--steps", type=whole(1), help=f"training steps [{FULL['steps']}]")
    parser.add_argument(
        "--max-steps",
        type=whole(1),
        help="steps are doubled up to this number until the accuracies are flat [twice --steps]",
    )
    parser.add_argument(
        "--rates",
        type=number(float, lambda rate: 0 < rate <= 1000, "a number above 0, up to 1000"),
        nargs="+",
        help=f"peak learning rates {FULL['rates']}",
    )
    parser.add_argument(
        "--seeds",
        type=whole(0, MOST_SEEDS - 1),
        nargs="+",
        help=f"seeds, of which the first chooses the rate {FULL['seeds']}",
    )
    parser.add_argument("--all-rates", action="store_true", help="try all rates on all seeds")
    parser.add_argument(
        "--balancing", type=between(0, 1000), default=1e-2, help="balancing loss coefficient [%(default)s]"
    )
    parser.add_argument(
        "--weight-decay", type=between(0, 1000), default=0.01, help="weight decay of the optimizer [%(default)s]"
    )
    parser.add_argument(
        "--evaluations", type=whole(1), help=f"measurements of the accuracy along a training [{FULL['evaluations']}]"
    )
    parser.add_argument(
        "--group-size", type=whole(1), default=16, help="models that a GPU trains at once [%(default)s]"
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=float("inf"),
        metavar="SECONDS",
        help="stop after this time; the same command goes on from there",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device [cuda where there is a GPU]")
    parser.add_argument("--quick", action="store_true", help="tiny models, as on a machine without a GPU")
    parser.add_argument("--commit", help="commit to write into the rows [that of the git checkout]")
    args = parser.parse_args(argv)
    import torch  # after --help, which needs no PyTorch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (QUICK if args.quick or args.device == "cpu" else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.max_steps is None:
        args.max_steps = args.steps if args.quick or args.device == "cpu" else 2 * args.steps
    return args
