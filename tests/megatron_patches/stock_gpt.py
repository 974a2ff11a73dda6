"""Pretrains Megatron's own GPT on mock tokens, on the CPU: nothing of ours is in the model, only the patches.

`launch` runs it on several ranks. Every rank is a fork of a process that has imported Megatron: that takes four
seconds, a short run one.
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import warm_python

from megatron_patches import cpu, dataset_helpers
from megatron_patches.patch import Patch, wrap

TINY_MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "vocab_size": 255,
    "make_vocab_size_divisible_by": 64,
    "tokenizer_type": "NullTokenizer",
    "mock_data": True,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 4,
    "lr": 1e-2,
    "lr_decay_iters": 100,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "log_interval": 1,
    "eval_iters": 1,
    "eval_interval": 100,
}


def launch(world_size: int, arguments: list[str], folder: Path, timeout: float = 60.0) -> list[float]:
    """Trains on `world_size` ranks with Megatron's command line `arguments` and returns the loss of every iteration.

    What rank i prints is in `folder/rank_i.txt`, and the end of it in the error when the run fails.
    """
    store, places = warm_python.meeting_place(world_size)
    context = warm_python.server()
    receiver, sender = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_train, args=(rank, place, arguments, folder, sender))
        for rank, place in enumerate(places)
    ]
    for rank in ranks:
        rank.start()
    try:
        if not receiver.poll(timeout):
            raise AssertionError(f"no result after {timeout} s{_last_lines(folder)}")
        losses = receiver.recv()
        if losses is None:
            raise AssertionError(f"a rank failed{_last_lines(folder)}")
        for rank in ranks:
            rank.join(timeout)
        if [rank.exitcode for rank in ranks] != [0] * world_size:
            raise AssertionError(f"exit codes {[rank.exitcode for rank in ranks]}{_last_lines(folder)}")
        return losses
    finally:
        for rank in ranks:
            rank.kill()
        del store


def _last_lines(folder: Path) -> str:
    return "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank_*.txt")))


def _train(rank: int, place: dict[str, str], arguments: list[str], folder: Path, sender) -> None:
    log = os.open(folder / f"rank_{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= place
    sys.argv = ["stock_gpt.py", *arguments]
    torch.set_num_threads(1)
    try:
        losses = main()
        if rank == int(place["WORLD_SIZE"]) - 1:
            sender.send(losses)
    except BaseException:
        traceback.print_exc()
        sender.send(None)
        raise


def main() -> list[float]:
    """Applies the patches and trains. Returns the losses, which only the last pipeline stage knows."""
    dataset_helpers.apply()
    cpu.apply()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

    losses: list[float] = []

    def record(training_log, loss_dict, *args, **kwargs):
        losses.extend(float(value) for name, value in loss_dict.items() if name == "lm loss")
        return training_log(loss_dict, *args, **kwargs)

    Patch(
        name="record-losses",
        reason="Megatron prints the losses and returns none",
        removed_when="never",
        targets=(wrap("megatron.training.training", "training_log", record),),
    ).apply()
    args = parse_and_validate_args(extra_args_provider=_use_tiny_model)
    model = gpt_config_from_args(args, config=core_transformer_config_from_args(args))
    pretrain(
        pretrain_cfg_container_from_args(args, model), _provide_datasets, ModelType.encoder_or_decoder, _forward_step
    )
    torch.distributed.destroy_process_group()
    return losses


def _use_tiny_model(parser):
    parser.set_defaults(**TINY_MODEL)
    return parser


def _provide_datasets(sample_counts, vp_stage=None):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="8,1,1",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sample_counts, lambda: True, config).build()


_provide_datasets.is_distributed = True


def _sum_loss(mask, losses):
    mask = mask.flatten().float()
    loss, tokens = (losses.flatten().float() * mask).sum(), mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.float()))}


def _forward_step(data_iterator, model):
    batch = next(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(_sum_loss, batch["loss_mask"])
