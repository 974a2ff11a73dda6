"""Data sets, batches and loss of a GPT-style pretraining run, from Megatron's own pieces."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import _IndexReader
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from linear_moe.config import MomTransformerConfig, has_memories
from linear_moe.entry.hybrid_pattern import all_mixers_are_memories
from linear_moe.parallel.document_order import tokens_of_rank
from linear_moe.tokens import vocabulary_size

logger = logging.getLogger(__name__)
FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids", "cu_seqlens", "cu_seqlens_padded",
          "max_seqlen", "local_cp_size", "hybrid_cp_group")  # fmt: skip
"""Names of the tensors of a batch."""


def check_dataset_files(prefix: str) -> int:
    """The number of tokens in PREFIX.bin. Raises ValueError, with the file, for PREFIX.bin and PREFIX.idx that are
    missing, broken or of two data sets.
    """
    binary, index = Path(prefix + ".bin"), Path(prefix + ".idx")
    for path in (binary, index):
        if not path.is_file():
            raise ValueError(f"data path {prefix!r}: there is no {path}; give the prefix of a .bin and .idx pair")
    try:
        reader = _IndexReader(str(index), multimodal=False)
    except (AssertionError, ValueError, OSError, KeyError) as error:
        raise ValueError(f"data path {prefix!r}: {index} is not a readable index ({error}): write it again") from error
    expected = int(reader.sequence_lengths.sum(dtype="int64")) * reader.dtype_size
    found = binary.stat().st_size
    if found != expected:
        raise ValueError(
            f"data path {prefix!r}: {binary} holds {found} bytes and its index describes {expected}: "
            "the file was cut short or belongs to another index; write both files again"
        )
    return expected // reader.dtype_size


def check_data_paths(args) -> dict[str, int]:
    """Checks every data path of the command line, and returns their numbers of tokens. Raises ValueError for a broken
    data path, and for none.
    """
    if args.mock_data and not args.sft:
        return {}
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [b for b in [blend, *(per_split or [])] if b is not None]
    if not blends:
        raise ValueError("no data: give --data-path, --train-data-path with --valid-data-path, or --mock-data")
    if args.sft:
        for file in (file for files, _ in blends for file in files):
            if not Path(file).is_file():
                raise ValueError(f"data path {file!r}: there is no such file; --sft reads JSON lines with 'messages'")
        return {}
    return {prefix: check_dataset_files(prefix) for prefixes, _ in blends for prefix in prefixes}


def check_vocabulary(args) -> None:
    """Raises ValueError where the tokenizer makes ids that the embedding has no row for: Megatron counts tokens, which
    are fewer than the largest id says where the ids have holes.
    """
    tokenizer = getattr(getattr(get_tokenizer(), "_tokenizer", None), "tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):  # one of Megatron's own, whose ids have no holes
        return
    size = vocabulary_size(tokenizer)
    if size > args.padded_vocab_size:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        raise ValueError(
            f"the largest token id of {args.tokenizer_model} is {size - 1}, and the embedding has "
            f"{args.padded_vocab_size} rows: give --padded-vocab-size {-(-size // multiple) * multiple}, "
            "or the tokenizer that the checkpoint was trained with"
        )


def keep_end_of_document(args) -> None:
    """Keeps the end-of-document token in the loss where the tokenizer pads with that token, as exports' tokenizers do:
    Megatron leaves the padding token out.
    """
    tokenizer = get_tokenizer()
    try:
        pad, end = tokenizer.pad, tokenizer.eod
    except (AttributeError, NotImplementedError):  # a tokenizer without such a token
        return
    if pad is not None and pad == end and not args.allow_ambiguous_pad_tokens:
        args.allow_ambiguous_pad_tokens = True
        logger.info(
            "the tokenizer pads with its end-of-document token: --allow-ambiguous-pad-tokens is on, so that the model "
            "learns where documents end"
        )


def packs_documents(args) -> bool:
    """Whether a row of tokens has borders of documents."""
    return args.dataloader_inter_document_masking or args.sft


def _builds_datasets(vp_stage=None) -> bool:
    args = get_args()
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return packs_documents(args) or _needs_batch(args, vp_stage)


def _needs_batch(args, vp_stage) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or mtp_on_this_rank(
        layout=args.pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def provide_datasets(train_valid_test_num_samples, vp_stage=None):
    """Train, validation and test data sets of next-token samples (``--mock-data`` included)."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    return BlendedMegatronDatasetBuilder(
        SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset,
        train_valid_test_num_samples,
        partial(_builds_datasets, vp_stage=vp_stage),
        config,
    ).build()


provide_datasets.is_distributed = True


def cuts_contiguously(args) -> bool:
    """Whether every context-parallel rank gets one contiguous slice of a sequence: when all layers are MoM, which
    compute on contiguous slices, so that no layer reorders its tokens.

    Softmax attention computes on Megatron's zigzag, which gives every rank the same work. Multi-token prediction has a
    softmax attention layer.
    """
    if args.context_parallel_size == 1 or not has_memories(args) or args.mtp_num_layers:
        return False
    pattern = args.hybrid_layer_pattern
    memories = (
        all(MomTransformerConfig.mom_layer_pattern(args)) if pattern is None else all_mixers_are_memories(pattern)
    )
    return memories and args.seq_length % args.context_parallel_size == 0


def get_batch(data_iterator, vp_stage=None) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next batch: every name of FIELDS, None for tensors that the pipeline stage ignores."""
    args = get_args()
    packed = packs_documents(args)
    if not packed and not _needs_batch(args, vp_stage):
        return dict.fromkeys(FIELDS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        loaded = next(data_iterator)
        batch = {name: loaded.get(name) for name in FIELDS}
        batch = {name: None if value is None else value.cuda(non_blocking=True) for name, value in batch.items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and mpu.is_pipeline_last_stage(ignore_virtual=True),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not _needs_batch(args, vp_stage):
        return batch
    if args.contiguous_context_slices:  # set by linear_moe.pretrain before the layers are built
        ranks, rank = args.context_parallel_size, mpu.get_context_parallel_rank()
        cut = ("tokens", "labels", "loss_mask", "position_ids")
        return batch | {name: batch[name].chunk(ranks, 1)[rank] for name in cut if batch[name] is not None}
    if args.sft and args.context_parallel_size > 1:
        return batch | _cut_every_document(batch)
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=packed,
    )


def _cut_every_document(batch) -> dict[str, torch.Tensor | None]:
    """This rank's chunks of each document, for a row [1, T] of documents whose lengths are multiples of 2 P."""
    ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    cut = {name: batch[name] for name in ("tokens", "labels", "loss_mask", "position_ids") if batch[name] is not None}
    length = next(iter(cut.values())).shape[1]
    here = tokens_of_rank(batch["cu_seqlens"].squeeze(0), length, ranks, rank)
    return {name: value[:, here] for name, value in cut.items()}


def _packed_seq_params(batch, seq_length) -> PackedSeqParams | None:
    if batch["cu_seqlens"] is None:
        return None
    borders = batch["cu_seqlens"].squeeze(0)
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"].squeeze(0)
    update_seqlen_stats_from_cu_seqlens(borders)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders if padded is None else padded,
        cu_seqlens_kv=borders if padded is None else padded,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=seq_length,  # an upper bound; the exact longest length would wait for the GPU
        max_seqlen_kv=seq_length,
        tokens_per_sample=seq_length,
    )


def sum_loss(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Sum of the losses [b, s] of the tokens where the mask [b, s] is 1, the number of these tokens, and the report.

    Raises RuntimeError on every rank with a loss that is not finite (``--check-for-nan-in-loss-and-grad``).
    """
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        for is_wrong, what in [(torch.isnan, "NaN"), (torch.isinf, "infinite")]:
            get_rerun_state_machine().validate_result(
                result=loss, rejection_func=is_wrong, message=f"the training loss is {what}", fatal=True
            )
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.float()))}


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    """One micro-batch through the model, as Megatron's schedules call it.

    Args:
        return_schedule_plan: return the plan of the micro-batch in place of the losses. Megatron's schedule for
            ``--overlap-moe-expert-parallel-comm`` sets it, and computes two plans side by side.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packed_seq_params = _packed_seq_params(batch, args.seq_length)
    timers("batch-generator").stop()
    compute = model.build_schedule_plan if return_schedule_plan else model
    losses = compute(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_seq_params,
    )
    return losses, partial(sum_loss, batch["loss_mask"])
