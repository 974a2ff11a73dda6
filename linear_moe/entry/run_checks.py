"""Refuses, before the first step, settings and data with which Megatron would end in an error that names neither.

Megatron divides by an interval of zero, looks for a parameter group by its learning rate, and reads rows of the
embedding that do not exist. The checks here name the argument, its value and what to do.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

from megatron_patches.patch import Patch, wrap

AT_LEAST_ONE = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "num_query_groups",
    "seq_length", "max_position_embeddings", "vocab_size", "make_vocab_size_divisible_by", "micro_batch_size",
    "global_batch_size", "train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples", "log_interval",
    "eval_interval", "save_interval", "tensorboard_log_interval", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "lr", "min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "weight_decay", "clip_grad",
    "num_workers", "attention_dropout", "hidden_dropout", "layernorm_epsilon", "init_method_std", "seed", "adam_eps",
)  # fmt: skip
AT_MOST = dict.fromkeys(
    (
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "num_query_groups",
        "seq_length", "vocab_size", "make_vocab_size_divisible_by", "micro_batch_size", "global_batch_size",
        "train_iters", "eval_iters", "tensor_model_parallel_size", "pipeline_model_parallel_size",
        "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
    ),
    2**31 - 1,
) | {"num_workers": 1024}  # fmt: skip
"""Largest values; a larger one is a slip of the pen, and ends in an overflow or in no end. Intervals have none: a large
one means never."""
INSTEAD = {
    "eval_interval": " (--eval-iters 0 turns validation off)",
    "ffn_hidden_size": ", or leave the argument out for the default",
    "kv_channels": ", or leave the argument out for the default",
    "num_query_groups": ", or leave the argument out for the default",
}

SAMPLE_TOKENS = 1 << 25
"""Tokens of a data file that are looked at: some of the files are too large to be read before every start."""
SAMPLE_PARTS = 64

SCHEDULE_OPTIONS = {
    "learning rate": "--lr",
    "minimum learning rate": "--min-lr",
    "warmup iterations": "--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction (in samples)",
    "total number of iterations": "--train-iters, --lr-decay-iters or --global-batch-size (in samples)",
    "learning rate decay style": "--lr-decay-style",
    "start weight decay": "--start-weight-decay or --weight-decay",
    "end weight decay": "--end-weight-decay or --weight-decay",
    "total number of weight decay iterations": "--train-iters or --global-batch-size (in samples)",
    "weight decay incr style": "--weight-decay-incr-style",
}
"""What Megatron calls a value of the learning rate's schedule -> the options that it comes from."""
GROUP_OPTIONS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
}


def option(name: str) -> str:
    return "--norm-epsilon" if name == "layernorm_epsilon" else "--" + name.replace("_", "-")


def check_values(args) -> None:
    """Raises ValueError for the first number of the command line that cannot work."""
    for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not value >= least:
                kind = "a whole number of at least 1" if least else "a number that is not negative"
                raise ValueError(f"{option(name)} {value}: use {kind}{INSTEAD.get(name, '')}")
    if args.eval_iters is not None and args.eval_iters < -1:
        raise ValueError(f"--eval-iters {args.eval_iters}: use a number of steps, or 0 (or -1) for no validation")
    for name, most in AT_MOST.items():
        if (getattr(args, name, None) or 0) > most:
            raise ValueError(f"{option(name)} {getattr(args, name)}: use a whole number of at most {most}")
    for name in ("load", "save"):
        if getattr(args, name, None) == "":  # as of a variable that is not set
            raise ValueError(f"{option(name)} '': give a folder, or leave {option(name)} out")
    if args.save is not None and args.save_interval is None:
        raise ValueError(f"--save {args.save} needs --save-interval, the number of steps between two checkpoints")
    if (args.eval_iters or 0) > 0 and args.eval_interval is None:
        raise ValueError(
            f"--eval-iters {args.eval_iters} needs --eval-interval, the number of steps between two validations; "
            "--eval-iters 0 turns validation off"
        )
    _check_load(args)
    for name in ("adam_beta1", "adam_beta2", "attention_dropout", "hidden_dropout", "layernorm_epsilon"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{option(name)} {value}: use a number from 0 up to, but not including, 1")
    if args.split and not re.fullmatch(r"[\d.,/ ]+", args.split):  # Megatron reads the digits and skips all else
        raise ValueError(f"--split {args.split}: use shares such as 99,1,0")
    if args.split and not re.search("[1-9]", args.split):
        raise ValueError(f"--split {args.split}: all shares are zero: use shares such as 99,1,0")
    if args.seed is not None and args.seed >= 2**31:  # to which ranks add their numbers, and NumPy takes 32 bits
        raise ValueError(f"--seed {args.seed}: use a whole number below {2**31}")
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr} is larger than --lr {args.lr}: use a value up to --lr")
    if args.lr_warmup_fraction is not None and not args.lr_warmup_fraction < 1:
        raise ValueError(f"--lr-warmup-fraction {args.lr_warmup_fraction}: use a share of the steps below 1")
    steps = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters and steps and args.lr_warmup_iters >= steps:
        source = "--lr-decay-iters" if args.lr_decay_iters else "--train-iters"
        raise ValueError(f"--lr-warmup-iters {args.lr_warmup_iters}: use fewer steps than {source} {steps}")


def _check_load(args) -> None:
    """Megatron starts from random weights where there is no checkpoint: right for the folder that the run will save
    into, and a mistake in the name of any other.
    """
    if args.load is None or args.load == args.save or "://" in str(args.load):
        return
    try:
        Path(args.load).stat()
        problem = None if Path(args.load).is_dir() else "not a folder"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ValueError(
            f"--load {args.load}: {problem}: give the folder of a checkpoint, or leave --load out to start anew"
        )


def _check_values(validate_args, args, *positional, **keywords):
    check_values(args)
    if args.eval_interval is None and (args.eval_iters or 0) <= 0:
        args.eval_interval = args.train_iters or 1  # Megatron divides by the interval where there is no validation, too
    return validate_args(args, *positional, **keywords)


@cache
def token_range(binary: Path, dtype: np.dtype) -> tuple[int, int]:
    """Smallest and largest token of a data file; of a large file, in evenly spaced parts of the file."""
    tokens = np.memmap(binary, dtype=dtype, mode="r")
    if len(tokens) <= SAMPLE_TOKENS:
        return int(tokens.min()), int(tokens.max())
    length = SAMPLE_TOKENS // SAMPLE_PARTS
    starts = np.linspace(0, len(tokens) - length, SAMPLE_PARTS).astype(int)
    parts = [tokens[start : start + length] for start in starts]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


def _files(dataset):
    """The indexed data sets below a data set of Megatron, which may be a blend."""
    below = getattr(dataset, "datasets", None)
    if below is not None:
        for part in below:
            yield from _files(part)
    elif hasattr(getattr(dataset, "dataset", None), "path_prefix"):
        yield dataset.dataset


def _split(dataset) -> str:
    return getattr(getattr(dataset, "index_split", None), "name", "")


def _never_read(dataset, args) -> bool:
    """Whether the run takes no sequence of a data set: of validation and test data with --eval-iters 0 (or -1)."""
    return _split(dataset) in ("valid", "test") and not getattr(args, "full_validation", False) and args.eval_iters <= 0


def check_data(dataset, args) -> None:
    """Raises ValueError where a data set has no sequence, or a token that the model has no embedding for."""
    split = _split(dataset)
    files = list(_files(dataset))
    if len(dataset) == 0:
        where = ", ".join(sorted({file.path_prefix for file in files}))
        raise ValueError(
            f"the {split} data ({where}) hold no sequence of --seq-length {args.seq_length} tokens: use a shorter one, "
            "or more text" + ("" if split == "train" else "; --eval-iters 0 leaves validation out")
        )
    for file in files:
        binary = Path(f"{file.path_prefix}.bin")
        if not binary.is_file() or binary.stat().st_size == 0:  # on another kind of storage
            continue
        least, most = token_range(binary, np.dtype(file.index.dtype))
        if least < 0 or most >= args.padded_vocab_size:
            raise ValueError(
                f"{binary} holds token {least if least < 0 else most}, and the model's vocabulary has "
                f"{args.padded_vocab_size} rows: the data were made with another tokenizer than "
                f"{args.tokenizer_model or f'--vocab-size {args.vocab_size}'}; give that one"
            )


def _check_data(build_pretraining_data_loader, dataset, consumed_samples):
    from megatron.training import get_args

    if dataset is not None:
        args = get_args()
        if len(dataset) == 0 and _never_read(dataset, args):
            return None  # Megatron's samplers refuse an empty data set
        check_data(dataset, args)
    return build_pretraining_data_loader(dataset, consumed_samples)


def _check_documents(get_num_epochs, dataset, tokens: int) -> int:
    """Where Megatron would add epochs of no token for ever."""
    if tokens == 0 and dataset.num_samples is not None and dataset.num_samples <= 0:
        return 1  # no sequence is needed, as of validation data with --eval-iters 0
    if tokens == 0:
        split = dataset.index_split.name
        raise ValueError(
            f"the {split} data ({dataset.dataset.path_prefix}) hold no token: --split leaves no document for "
            "them, or the file is empty: use another --split, or more documents"
        )
    return get_num_epochs(dataset, tokens)


def _check_schedule(check_and_set, scheduler, mine, saved, name):
    """The schedule's own comparison with a checkpoint."""
    try:
        return check_and_set(scheduler, mine, saved, name)
    except AssertionError as error:
        raise ValueError(
            f"the learning rate's schedule of this run is not that of the checkpoint: {name} {mine}, in the checkpoint "
            f"{saved}, from {SCHEDULE_OPTIONS.get(name, 'its options')}: give the saved value, or "
            "--override-opt_param-scheduler for this run's schedule, or --use-checkpoint-opt_param-scheduler"
        ) from error


def _different_group(current: list[dict], saved: list[dict]) -> str | None:
    """Why no saved group of parameters fits one of this run's; None where their options are the same."""
    for name, word in GROUP_OPTIONS.items():
        mine, theirs = ({group.get(name) for group in groups} - {None} for groups in (current, saved))
        if mine != theirs:
            mine, theirs = (" and ".join(map(str, sorted(values))) or "not given" for values in (mine, theirs))
            return (
                f"{word} is {mine} and was {theirs} when the checkpoint was written: the optimizer's state is saved "
                f"under that value. Give {word} {theirs}, or start with a new state: --no-load-optim with "
                "--override-opt_param-scheduler"
            )
    return None


def _check_groups(filter_and_reorder, current, saved):
    """Where optimizers find their saved groups of parameters, by learning rates and weight decays."""
    try:
        return filter_and_reorder(current, saved)
    except ValueError as error:
        if message := _different_group(current, saved):
            raise ValueError(message) from error
        raise


def _load_distributed(load_state_dict, optimizer, state_dict):
    """The same for the distributed optimizer, which has a lookup of its own."""
    try:
        return load_state_dict(optimizer, state_dict)
    except KeyError as error:
        current = optimizer.optimizer.param_groups
        if message := _different_group(current, state_dict["optimizer"]["param_groups"]):
            raise ValueError(message) from error
        raise


PATCH = Patch(
    name="run-checks",
    reason="values and data that cannot work end in a division by zero, an index out of range or a bare tuple",
    removed_when="megatron.training checks its arguments and its data sets by name",
    targets=(
        wrap("megatron.training.arguments", "validate_args", _check_values),
        wrap("megatron.training.datasets.data_samplers", "build_pretraining_data_loader", _check_data),
        wrap("megatron.core.datasets.gpt_dataset", "GPTDataset._get_num_epochs", _check_documents),
        wrap("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler._check_and_set", _check_schedule),
        wrap("megatron.core.optimizer.optimizer", "MegatronOptimizer._filter_and_reorder_param_groups", _check_groups),
        wrap("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_state_dict", _load_distributed),
    ),
)
