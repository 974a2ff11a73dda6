"""A training script in the shape of Megatron-LM's pretrain_gpt.py and pretrain_hybrid.py: nothing of ours is in it."""

from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from neighbour import provider


def sum_loss(mask, losses):
    mask = mask.flatten().float()
    loss, tokens = (losses.flatten().float() * mask).sum(), mask.sum().int()
    print(f"exact loss {loss.item().hex()}")  # Megatron prints too few digits to compare bits
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.float()))}


def forward_step(data_iterator, model):
    core_transformer_config_from_args(get_args())  # the real script does so for every batch
    batch = next(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(sum_loss, batch["loss_mask"])


def provide_datasets(sample_counts, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sample_counts, lambda: True, config).build()


if __name__ == "__main__":
    assert callable(provider)
    provide_datasets.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model = hybrid_config_from_args(args) if args.hybrid_layer_pattern else gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model), provide_datasets, ModelType.encoder_or_decoder, forward_step
    )
