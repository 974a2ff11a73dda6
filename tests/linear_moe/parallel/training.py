"""Tiny pretraining runs over several ranks, and the tensors of their checkpoints.

Every rank is a fork of a process that has imported Megatron: the import takes four seconds, a run one or two.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import warm_python

TINY = (
    "--token-mixer mom --mom-num-heads 2 --mom-head-dim 16 --mom-aux-loss-coeff 0.01 --mom-z-loss-coeff 0.001 "
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 32 "
    "--max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--swiglu --vocab-size 127 --make-vocab-size-divisible-by 64 --tokenizer-type NullTokenizer --seed 3 "
    "--init-method-std 0.15 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 4 "
    "--lr 1e-2 --lr-decay-iters 100 --adam-eps 1e-3 --log-interval 1 --eval-iters 0 --eval-interval 1000 "
    "--no-create-attention-mask-in-dataloader --dist-ckpt-optim-fully-reshardable --save-interval 1000 --split 1,0,0"
).split()
"""Adam's epsilon is large so that a gradient of rounding errors makes no step."""

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
WHOLE = ["--mom-expert-parallel", "off"]
EP4 = ["--expert-model-parallel-size", "4"]
ALL_GATHER = ["--mom-expert-exchange", "all-gather"]
CP2 = ["--context-parallel-size", "2"]
CP4 = ["--context-parallel-size", "4"]
DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer"]


def launch(
    world_size: int,
    arguments: list,
    folder: Path,
    save_at: tuple[int, ...] = (),
    prepare: Callable[[], None] | None = None,
    timeout: float = 100.0,
) -> dict[int, float]:
    """Trains on ``world_size`` ranks and returns the loss of every iteration.

    Rank i prints into ``folder/rank_i.txt``; when the run fails, the error has the end of that file.

    Args:
        arguments: of ``linear_moe.pretrain``, after TINY.
        save_at: iterations after which a checkpoint goes to ``folder``, besides the last iteration.
        prepare: a function of a module, called on every rank before it trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store, places = warm_python.meeting_place(world_size)
    context = warm_python.server()
    receiver, sender = context.Pipe(duplex=False)
    command = [*TINY, *map(str, arguments), *(["--save", str(folder)] if save_at else [])]
    ranks = [
        context.Process(target=_train, args=(rank, place, command, folder, save_at, prepare, sender))
        for rank, place in enumerate(places)
    ]
    for rank in ranks:
        rank.start()
    try:
        losses, end = None, time.monotonic() + timeout
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
            if receiver.poll(0.05):
                losses = receiver.recv()
            if any(rank.exitcode for rank in ranks):  # the other ranks would wait for this rank
                break
        losses = receiver.recv() if receiver.poll() else losses
        if losses is None or [rank.exitcode for rank in ranks] != [0] * world_size:
            raise AssertionError(f"exit codes {[rank.exitcode for rank in ranks]}{_last_lines(folder)}")
        return losses
    finally:
        for rank in ranks:
            rank.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)  # its checkpoint writers too
        del store


def _last_lines(folder: Path) -> str:
    return "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank_*.txt")))


def _train(rank, place, arguments, folder, save_at, prepare, sender) -> None:
    os.setsid()
    log = os.open(folder / f"rank_{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= place
    sys.argv = ["pretrain", *arguments]
    torch.set_num_threads(1)
    try:
        if prepare:
            prepare()
        losses = _pretrain(save_at)
        if rank == int(place["WORLD_SIZE"]) - 1:
            sender.send(losses)
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sender.send(None)
        raise


def _pretrain(save_at: tuple[int, ...]) -> dict[int, float]:
    """`linear_moe.pretrain` with the losses recorded, which only the last pipeline stage computes."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from linear_moe import pretrain
    from linear_moe.entry.log import QuietStreams
    from linear_moe.entry.machine import prepare_machine

    prepare_machine()
    # The process that collects what was written would be a new interpreter, which imports torch and Megatron.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    losses, _ = record_steps(save_at)
    os.environ["MOM_VERBOSE"] = "1"  # everything into rank_i.txt
    pretrain.main(QuietStreams())
    return losses


def record_steps(save_at: tuple[int, ...] = ()) -> tuple[dict[int, float], dict[int, float]]:
    """The loss and the gradient norm of every iteration, which training in this process fills in. A rank that
    computes no loss records none.

    save_at: iterations after which a checkpoint is saved; without, --save-interval says so.
    """
    from megatron_patches.patch import Patch, wrap

    losses: dict[int, float] = {}
    norms: dict[int, float] = {}

    def record(training_log, loss_dict, total, rate, iteration, scale, memory, skipped, norm, *args, **kwargs):
        from megatron.training import get_args

        if "lm loss" in loss_dict:
            losses[iteration] = float(loss_dict["lm loss"])
        if norm is not None:
            norms[iteration] = float(norm)
        if save_at:  # read by the training loop after this call
            get_args().save_interval = 1 if iteration in save_at else 1000
        return training_log(loss_dict, total, rate, iteration, scale, memory, skipped, norm, *args, **kwargs)

    Patch(
        name="record-losses",
        reason="Megatron prints the losses and returns none",
        removed_when="never",
        targets=(wrap("megatron.training.training", "training_log", record),),
    ).apply()
    return losses, norms


def muon_of_torch():
    """Lets Megatron build torch's Muon. Its own is in a package that is not installed with Megatron."""
    from megatron.core import optimizer
    from megatron.core.optimizer import emerging_optimizers

    def start(muon, config=None):
        for group in muon.param_groups:
            for parameter in group["params"]:
                muon.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    entry = emerging_optimizers.EmergingOptimizerEntry(
        optimizer_cls=torch.optim.Muon,
        init_state_fn=start,
        config_to_kwargs=lambda config, chunks, groups: {"lr": config.lr, "weight_decay": config.weight_decay},
    )
    emerging_optimizers._EMERGING_OPTIMIZERS["muon"] = entry
    optimizer.HAVE_EMERGING_OPTIMIZERS = True


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name, whole, whatever layout wrote it."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder / f"iter_{iteration:07d}")
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and entry.properties.dtype.is_floating_point
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def parameters(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every parameter of the model."""
    return {name: tensor for name, tensor in checkpoint_tensors(folder, iteration).items() if "optimizer" not in name}


def gradients_of_first_step(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter's gradient of step one (times a constant): Adam's first moment after that step."""
    prefix = re.compile(r"^.*exp_avg\.")
    return {
        prefix.sub("", name): tensor for name, tensor in checkpoint_tensors(folder, 1).items() if prefix.match(name)
    }


def write_documents(prefix: Path) -> Path:
    """Documents of one to twenty tokens that count upwards, most from small numbers. Returns the prefix."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(127))
    random = np.random.default_rng(0)
    for _ in range(200):
        length = int(random.integers(1, 21))
        builder.add_document(int(random.exponential(15)) % 100 + np.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix
