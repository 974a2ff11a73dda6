"""Tasks of lm-evaluation-harness on a model: an export, or a Megatron checkpoint by Megatron's own forward pass.

The command line is linear_moe/commands/arguments/evaluate.py.
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
from linear_moe.commands.arguments.evaluate import parse_arguments
from linear_moe.conversion.config import DTYPES
from linear_moe.conversion.files import ConversionError
from linear_moe.evaluation.suites import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a model or a task that cannot be evaluated."""
    args = parse_arguments(argv)
    return run_command("evaluate.py", lambda: evaluate(args), ConversionError, ValueError)


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
