"""Tasks of lm-evaluation-harness on a model: an export, or a Megatron checkpoint by Megatron's own forward pass.

    python tools/evaluate.py --load runs/demo/hf --suite recall
    python tools/evaluate.py --load runs/demo/checkpoints --tasks wikitext --output runs/demo/evaluation.json
    torchrun --nproc-per-node 2 tools/evaluate.py --load runs/demo/checkpoints --suite commonsense \\
        --tensor-model-parallel-size 2

A checkpoint of any layout runs in any other: words that are none of the options below are arguments of Megatron. The
tasks' data come from the Hugging Face hub or its cache (HF_HOME; HF_HUB_OFFLINE=1 without a network). A context follows
the end-of-document token, as in training; a context that is too long loses its beginning. Prints a table, for a suite
beside the MoM paper's averages.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from linear_moe.commands import run_command
from linear_moe.commands.values import path, whole
from linear_moe.conversion.config import DTYPES
from linear_moe.conversion.files import ConversionError
from linear_moe.evaluation.suites import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a model or a task that cannot be evaluated."""
    args = parse_arguments(argv)
    return run_command("evaluate.py", lambda: evaluate(args), ConversionError, ValueError)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """``words`` of the result holds what is left for Megatron."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--load", type=path, required=True, help="folder of an export or of Megatron checkpoints")
    model.add_argument("--iteration", type=whole(0), help="Megatron checkpoint to use [the latest]")
    model.add_argument("--tokenizer", type=path, help="folder of the tokenizer [the model's]")
    model.add_argument("--dtype", choices=DTYPES, help="type to compute in [as stored; checkpoints: float32 on a CPU, "
                       "bfloat16 on a GPU]")  # fmt: skip
    model.add_argument("--device", choices=("cuda", "cpu"), help="of an export [cuda where there is one]")
    model.add_argument(
        "--trust-checkpoint", action="store_true", help="run whatever code a Megatron checkpoint's files name"
    )
    tasks = parser.add_argument_group("tasks")
    which = tasks.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", choices=tuple(SUITES), help="a named suite")
    which.add_argument("--tasks", nargs="+", metavar="TASK", help="names of lm-evaluation-harness")
    tasks.add_argument("--include-path", type=path, metavar="DIR", help="folder with further tasks")
    tasks.add_argument("--num-fewshot", type=whole(0, 1000), help="examples before a question [as the task says]")
    tasks.add_argument("--limit", type=whole(1), help="questions of a task [all]")
    tasks.add_argument("--max-length", type=whole(16), help="tokens read at once [the suite's; 2048]")
    tasks.add_argument("--no-document-start", action="store_true", help="no end-of-document token before a context")
    tasks.add_argument("--batch-size", type=whole(1), default=8, help="rows side by side on a process [%(default)s]")
    tasks.add_argument("--output", type=path, metavar="FILE", help="JSON with all results")
    args, args.words = parser.parse_known_args(argv)
    return args


def evaluate(args: argparse.Namespace) -> None:
    """Loads, evaluates, prints and writes.

    Raises:
        EvaluationError: a task's data are not there, or the model or the layout cannot be evaluated.
        ConversionError: the model or its tokenizer cannot be read.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"evaluation needs lm-evaluation-harness ({error}): pip install lm_eval") from error
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from linear_moe.evaluation.harness import EvaluationError, HarnessModel
    from linear_moe.evaluation.report import table, write

    suite = SUITES.get(args.suite)
    names = list(suite.tasks) if suite else args.tasks
    if args.include_path and not args.include_path.is_dir():
        raise EvaluationError(f"--include-path {args.include_path}: give the folder that holds the tasks' files")
    if args.output:  # an evaluation may take hours, and its results go there
        if args.output.is_dir():
            raise EvaluationError(f"--output {args.output} is a folder: give a file")
        args.output.parent.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(include_path=str(args.include_path) if args.include_path else None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        places = "lm-evaluation-harness" + (f" and --include-path {args.include_path}" if args.include_path else "")
        raise EvaluationError(f"no task {', '.join(unknown)} in {places}: see `lm_eval ls tasks`")
    length = args.max_length or (suite.max_length if suite else 2048)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet():
        backend, tokenizer_folder = load(args)
    model = HarnessModel(backend, length, args.batch_size, not args.no_document_start)
    with silent_unless(backend.is_first):
        try:
            results = simple_evaluate(
                model=model,
                tasks=names,
                task_manager=manager,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                log_samples=False,
                bootstrap_iters=1000,
                metadata={"tokenizer": str(tokenizer_folder), "max_seq_lengths": [length]},
            )
        except data_errors() as error:
            raise EvaluationError(
                f"the data of {', '.join(names)} are not to be had: {' '.join(str(error).split())}; they come from the "
                "Hugging Face hub or its cache (HF_HOME)"
            ) from error
    if not backend.is_first:
        return
    measured = {name: values for name, values in results["results"].items()}
    print(table(measured, suite))
    if args.output:
        write(args.output, {
            "load": str(args.load), "tasks": names, "suite": args.suite, "max_length": length,
            "documents_started": not args.no_document_start, "limit": args.limit, "results": measured,
            "versions": results.get("versions"), "samples": results.get("n-samples"),
        })  # fmt: skip
        print(args.output)


def load(args: argparse.Namespace):
    """The backend for ``args.load``, and the tokenizer's folder. Raises ConversionError and EvaluationError."""
    from linear_moe.evaluation.harness import EvaluationError

    if (args.load / "config.json").is_file():
        from linear_moe.evaluation.export_backend import ExportBackend

        if args.iteration is not None:
            raise EvaluationError(f"--iteration {args.iteration}: --load {args.load} is an export, not checkpoints")
        if args.words:
            raise EvaluationError(f"--load {args.load} is an export, and takes no {' '.join(args.words)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise EvaluationError(f"--load {args.load} is an export, and runs in one process: leave out torchrun")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = args.tokenizer or args.load
        return ExportBackend(args.load, device, DTYPES.get(args.dtype), folder), folder
    from linear_moe.conversion.checkpoint import find_checkpoint
    from linear_moe.evaluation.megatron_backend import MegatronBackend

    find_checkpoint(args.load, args.iteration)  # says what is wrong with the folder before Megatron starts
    if args.trust_checkpoint:
        os.environ["MOM_TRUST_CHECKPOINT"] = "1"
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    backend = MegatronBackend(args.load, args.batch_size, args.words, dtype, args.tokenizer, args.iteration)
    return backend, Path(backend.tokenizer.name_or_path)


def data_errors() -> tuple[type[Exception], ...]:
    """What the data sets' libraries raise where data are missing."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    return (ConnectionError, FileNotFoundError, DatasetsError, HfHubHTTPError)


@contextlib.contextmanager
def quiet():
    """What libraries say while a model is loaded: their lines go to stderr, and their warnings nowhere."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def silent_unless(speaks: bool):
    """Standard output goes nowhere in processes that do not speak for all."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


if __name__ == "__main__":
    sys.exit(main())
