"""From a softmax model to a model with memories: how many tokens until the loss of the softmax model is back.

    python tools/softmax_to_memories.py --output runs/converted
    python tools/softmax_to_memories.py --output runs/converted --scale gpu

Trains a softmax model on the demo's corpus with Megatron, makes MoM layers of all its layers, and of all but every
fourth, trains the new token mixers alone for a moment (linear-moe align-mixers), and trains on with Megatron, for a
tenth of the softmax model's tokens in all. Beside them: the same without the first stage, and MoM from scratch. What is
finished is not run again. Writes curves.png and results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.demo import DemoError, run_to_end
from linear_moe.commands.values import path, whole


@dataclass(frozen=True)
class Scale:
    """Sizes of the models and of their training.

    Attributes:
        steps: of the softmax model, and of MoM from scratch. The converted models have a tenth.
        share: of the converted models' steps for the new token mixers alone.
        rate, later_rate: largest learning rate, of a new model and of a converted one.
        mixer_rate: the same, of the new token mixers alone.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    length: int
    batch: int
    steps: int
    eval_iters: int
    vocabulary: int = 4096
    share: float = 0.5
    rate: float = 2e-3
    later_rate: float = 1e-3
    mixer_rate: float = 3e-3
    more: tuple[str, ...] = ()

    @property
    def tenth(self) -> int:
        return max(2, self.steps // 10)

    def tokens(self, steps: float) -> float:
        return steps * self.batch * self.length


SCALES = {
    "tiny": Scale(layers=4, hidden=128, heads=2, ffn=256, length=128, batch=8, steps=300, eval_iters=32, rate=4e-3),
    "gpu": Scale(
        layers=8, hidden=512, heads=8, ffn=1408, length=1024, batch=32, steps=600, eval_iters=5, rate=1.5e-3,
        later_rate=8e-4, more=("--bf16", "--no-kernel-check"),
    ),
}  # fmt: skip
MEMORIES = ["--mom-num-memories", "4", "--mom-topk", "2", "--mom-shared-memory", "--mom-head-dim", "64"]
EVERY_FOURTH = ["--linear-attention-freq", "4"]


@dataclass(frozen=True)
class Run:
    """A training of the comparison.

    Attributes:
        name: of its folder and its curve.
        title: what the picture says.
        softmax_layers: of a converted model, for --softmax-layers; None for a new model.
        aligned: whether the new token mixers are trained alone first.
    """

    name: str
    title: str
    softmax_layers: str | None = None
    aligned: bool = False


SOFTMAX = Run("softmax", "softmax attention")
RUNS = (
    SOFTMAX,
    Run("scratch", "MoM from scratch"),
    Run("all", "all layers to MoM", "none", aligned=True),
    Run("fourth", "all but every fourth layer to MoM", "every-4", aligned=True),
    Run("all-direct", "all layers to MoM, no first stage", "none"),
    Run("fourth-direct", "all but every fourth layer, no first stage", "every-4"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing. Returns 0, or 1 where a step fails."""
    args = parse_arguments(argv)
    scale = SCALES[args.scale]
    scale = replace(scale, steps=args.steps or scale.steps)
    try:
        for run in RUNS:
            if not args.only or run is SOFTMAX or run.name in args.only:
                carry_out(run, scale, args.output)
        report(scale, args.output)
    except DemoError as error:
        print(f"softmax_to_memories.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--output", type=path, default=Path("runs/converted"), metavar="DIR", help="folder [%(default)s]"
    )
    parser.add_argument(
        "--scale", choices=sorted(SCALES), default="tiny", help="tiny for a CPU, gpu for one H100 [tiny]"
    )
    steps = ", ".join(f"{scale.steps} for {name}" for name, scale in SCALES.items())
    parser.add_argument("--steps", type=whole(20), help=f"of the softmax model [{steps}]")
    names = [run.name for run in RUNS[1:]]
    parser.add_argument("--only", nargs="+", choices=names, metavar="RUN", help=f"of {', '.join(names)} [all]")
    return parser.parse_args(argv)


def carry_out(run: Run, scale: Scale, folder: Path) -> None:
    """Trains one model, unless its folder has a `done` file."""
    own, corpus, done = folder / run.name, folder / "corpus", folder / run.name / "done"
    if done.is_file():
        return
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    prepare_corpus(corpus, scale)
    before, started = 0, time.monotonic()
    words = ["--token-mixer", "attention" if run is SOFTMAX else "mom"]
    if run is not SOFTMAX:
        words += [*MEMORIES, "--mom-num-heads", scale.heads]
        words += EVERY_FOURTH if run.softmax_layers == "every-4" else []
    steps, rate = scale.steps, scale.rate
    if run.softmax_layers is not None:
        before = round(scale.share * scale.tenth) if run.aligned else 0
        steps, rate = scale.tenth - before, scale.later_rate
        words += ["--load", convert(run, scale, folder, before)]
    if run is SOFTMAX:
        words += ["--save", own / "checkpoints", "--save-interval", steps]
    pretrain(words, steps, rate, scale, corpus, own)
    if run is SOFTMAX:
        step("convert-to-hf", "--load", own / "checkpoints", "--save", own / "hf", "--dtype", "float32")
    done.write_text(json.dumps({"before": before, "steps": steps, "seconds": round(time.monotonic() - started, 1)}))


def prepare_corpus(corpus: Path, scale: Scale) -> None:
    """The demo's corpus: texts, tokens and a tokenizer."""
    if Path(f"{corpus}.json").exists():
        return
    step("demo-corpus", "--output", f"{corpus}.jsonl", "--overwrite")
    step(
        "preprocess", "--input", f"{corpus}.jsonl", "--output", corpus, "--train-tokenizer", scale.vocabulary,
        "--validation-fraction", 0.05, "--overwrite",
    )  # fmt: skip


def convert(run: Run, scale: Scale, folder: Path, steps: int) -> Path:
    """The softmax model with MoM layers as a checkpoint. With ``steps`` the new mixers are trained alone first."""
    own, source = folder / run.name, folder / SOFTMAX.name / "hf"
    start = ["--softmax-layers", run.softmax_layers, *MEMORIES[:5]]
    if steps:
        step(
            "align-mixers", "--load", source, "--save", own / "aligned", "--data-path", folder / "corpus-train", *start,
            "--steps", steps, "--batch-size", scale.batch, "--seq-length", scale.length, "--lr", scale.mixer_rate,
        )  # fmt: skip
        source, start = own / "aligned", []
    step("convert-from-hf", "--load", source, "--save", own / "converted", *start)
    return own / "converted"


def pretrain(words: list, steps: int, rate: float, scale: Scale, corpus: Path, folder: Path) -> None:
    """Trains with Megatron, and writes the losses for TensorBoard into the folder."""
    run_to_end(
        "-m", "linear_moe.pretrain", *words, "--num-layers", scale.layers, "--hidden-size", scale.hidden,
        "--ffn-hidden-size", scale.ffn, "--num-attention-heads", scale.heads, "--swiglu", "--disable-bias-linear",
        "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--norm-epsilon", "1e-6",
        "--attention-dropout", 0, "--hidden-dropout", 0, "--seq-length", scale.length,
        "--max-position-embeddings", scale.length, "--micro-batch-size", scale.batch,
        "--global-batch-size", scale.batch,
        "--untie-embeddings-and-output-weights", "--train-iters", steps, "--lr", rate, "--min-lr", rate / 20,
        "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.05, "--optimizer", "adam", "--adam-beta1", 0.9,
        "--adam-beta2", 0.95, "--weight-decay", 0.1, "--clip-grad", 1.0, "--eval-interval", max(1, steps // 10),
        "--eval-iters", scale.eval_iters, "--log-interval", max(1, steps // 20), "--tensorboard-log-interval", 1,
        "--no-create-attention-mask-in-dataloader", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
        f"{corpus}-tokenizer", "--train-data-path", f"{corpus}-train", "--valid-data-path", f"{corpus}-valid",
        "--data-cache-path", folder.parent / "data-cache", "--tensorboard-dir", folder / "tensorboard",
        "--log-file", folder / "log.txt", *scale.more,
    )  # fmt: skip


def step(*words: object) -> None:
    run_to_end("-m", "linear_moe.cli", *words)


def report(scale: Scale, folder: Path) -> None:
    """Prints the validation losses, and writes curves.png and results.json."""
    from linear_moe.watching.headless_matplotlib import plt, save
    from linear_moe.watching.run_plots import VALIDATION_LOSS, read_scalars

    rows, (figure, axes) = [], plt.subplots(figsize=(8, 5))
    for run in RUNS:
        if not (folder / run.name / "done").is_file():
            continue
        facts = json.loads((folder / run.name / "done").read_text())
        losses = read_scalars(folder / run.name / "tensorboard")[VALIDATION_LOSS]
        points = [(scale.tokens(facts["before"] + steps), loss) for steps, loss in losses.items()]
        rows.append({"run": run.name, "title": run.title, "seconds": facts["seconds"], "validation": points})
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run.title)
    best = min(loss for _, loss in rows[0]["validation"])
    axes.axhline(1.01 * best, linestyle=":", color="grey", label="1 % above the softmax model")
    axes.set(xlabel="tokens of the run, the first stage included", ylabel="validation loss", xscale="log")
    axes.legend()
    save(figure, folder / "curves.png")
    print(f"{'run':14} {'tokens':>12} {'loss':>8} {'above softmax':>14} {'seconds':>8}")
    for row in rows:
        tokens, row["last"] = row["validation"][-1]
        row["above_softmax"] = row["last"] / best - 1
        print(f"{row['run']:14} {tokens:12,.0f} {row['last']:8.4f} {row['above_softmax']:14.2%} {row['seconds']:8}")
    flat = [loss for _, loss in rows[0]["validation"]][-3:]
    print(f"the softmax model's last three validation losses: {', '.join(f'{loss:.4f}' for loss in flat)}")
    (folder / "results.json").write_text(json.dumps({"best_softmax": best, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
