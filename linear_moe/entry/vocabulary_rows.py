"""The rows of a model's embedding where a run starts from a checkpoint.

Megatron pads the vocabulary to a multiple that grows with the tensor-parallel size. Rows that the checkpoint lacks are
new and random, and take part in the softmax of the loss. A run therefore keeps the checkpoint's rows.
"""

from __future__ import annotations

import logging
from argparse import Namespace

logger = logging.getLogger(__name__)


def keep_rows(args: Namespace, saved: Namespace) -> None:
    """Sets ``args.padded_vocab_size`` to that of a checkpoint, unless the command line gives another one.

    Rows that the tensor-parallel ranks cannot share equally are rounded up. `report_rows` says so at loading. Megatron
    pads as it always does where ``--vocab-size`` is more than the checkpoint's rows, and with ``--no-pad-vocab-size``.
    """
    rows, given = (getattr(source, "padded_vocab_size", None) for source in (saved, args))
    if rows is None or given not in (None, rows) or not getattr(args, "pad_vocab_size", True):
        return
    sized = (args.tokenizer_type or "").startswith("Null")  # the tokenizers whose size is --vocab-size
    if sized and args.vocab_size and args.vocab_size > rows:
        return
    ranks = args.tensor_model_parallel_size
    args.padded_vocab_size = -(-rows // ranks) * ranks


def report_rows(args: Namespace, saved: Namespace) -> None:
    """Logs a warning where the model that is loaded into has another number of rows than the checkpoint."""
    there, here = (getattr(source, "padded_vocab_size", None) for source in (saved, args))
    if there is None or here is None or there == here:
        return
    if here > there:
        change = f"rows {there} to {here - 1} are new and random, and enter the loss until they are trained"
    else:
        change = f"rows {here} to {there - 1} are left out, and no longer enter the loss"
    logger.warning(
        "warning: the embedding has %d rows in the checkpoint and %d in this run: %s (--padded-vocab-size %d keeps the "
        "checkpoint's rows, at a --tensor-model-parallel-size that divides the number)", there, here, change, there
    )  # fmt: skip
