"""The command-line group, and what keeps it with a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from dataclasses import fields

from linear_moe.config import MOM_REFUSES, TOKEN_MIXERS, MomTransformerConfig, refuse
from linear_moe.entry import core_v018
from megatron_patches.patch import Patch, wrap
from mom_layers.common.kernels import KERNELS
from mom_layers.recur.rules import rule_names

OURS = [f.name for f in fields(MomTransformerConfig) if f.name == "token_mixer" or f.name.startswith("mom_")]
SHAPE = [
    "token_mixer", "mom_rule", "mom_num_memories", "mom_topk", "mom_shared_memory", "mom_num_heads", "mom_head_dim",
    "mom_expand_v", "mom_conv_kernel", "mom_single_kv_proj", "linear_attention_freq",
]  # fmt: skip
"""Arguments that a checkpoint fixes: the weights mean nothing under other values."""
OUR_SPEC = "linear_moe.layer_specs mom_layer_spec"


def add_mom_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the group to Megatron's parser. Every default is None: the configuration's own apply, or a checkpoint's."""
    default = {f.name: f.default for f in fields(MomTransformerConfig)}
    group = parser.add_argument_group("mixture of memories")

    def add(name, help, **kwargs):
        shown = default[name.strip("-").replace("-", "_")]
        group.add_argument(name, default=None, help=f"{help} Default: {shown}.", **kwargs)

    add("--token-mixer", "Token mixer of the decoder's layers.", choices=TOKEN_MIXERS)
    add("--mom-rule", "Memory update rule.", choices=rule_names())
    add("--mom-num-memories", "Memories a layer keeps, without the shared one.", type=int)
    add("--mom-topk", "Memories that a token goes to.", type=int)
    add("--mom-shared-memory", "Keep a memory that sees every token.", action=argparse.BooleanOptionalAction)
    add("--mom-num-heads", "Heads of a memory.", type=int)
    add("--mom-head-dim", "Key size of a head.", type=int)
    add("--mom-expand-v", "Value size of a head over its key size.", type=float)
    add("--mom-conv-kernel", "Width of the causal convolutions.", type=int)
    add("--mom-single-kv-proj", "One key, value and gate projection for all memories.",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--mom-aux-loss-coeff", "Coefficient of the memories' load-balancing loss.", type=float)
    add("--mom-z-loss-coeff", "Coefficient of the memory router's z-loss.", type=float)
    add("--mom-kernels", "Implementation of the mixer's operations.", choices=KERNELS)
    return parser


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escapes the percent signs of Megatron's help texts that argparse would read as formats, and fail on."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def fill_mom_arguments(args: argparse.Namespace) -> None:
    """Gives every argument of ours that neither the command line nor a checkpoint set its default."""
    for f in fields(MomTransformerConfig):
        if f.name in OURS and getattr(args, f.name, None) is None:
            setattr(args, f.name, f.default)


def check_optimizer(args: argparse.Namespace) -> None:
    """Refuses what Megatron cannot save: its plain optimizer numbers 16-bit parameters only, and a MoM layer's decay
    rates stay float32.
    """
    saves = args.save is not None and not args.no_save_optim
    if args.token_mixer == "mom" and (args.bf16 or args.fp16) and saves and not args.use_distributed_optimizer:
        raise ValueError(
            "--token-mixer mom in 16 bits cannot save the state of Megatron's plain optimizer: "
            "add --use-distributed-optimizer (or --no-save-optim)"
        )


def check_model(args: argparse.Namespace) -> None:
    """Refuses what would build another model than the one that --token-mixer mom asks for, or replay another batch's
    documents.
    """
    spec = None if args.spec is None else " ".join(args.spec)
    packed = args.sft or getattr(args, "dataloader_inter_document_masking", False)  # not in core_v0.18
    graphs = args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
    refuse(MOM_REFUSES, [
        (args.multi_latent_attention, "--multi-latent-attention", "use plain or grouped-query attention layers"),
        (args.heterogeneous_layers_config_path, "--heterogeneous-layers-config-path", "use --linear-attention-freq"),
        (spec and not args.hybrid_layer_pattern and spec != OUR_SPEC, f"--spec {spec}", f"leave it out, or {OUR_SPEC}"),
        (args.hybrid_layer_pattern and "G" not in args.hybrid_layer_pattern,
         f"--hybrid-layer-pattern {args.hybrid_layer_pattern}", "write G where a MoM layer is to be"),
        ((args.reset_attention_mask or args.reset_position_ids) and not packed,
         "--reset-attention-mask" if args.reset_attention_mask else "--reset-position-ids",
         "memories know documents by --dataloader-inter-document-masking"),
        (packed and args.pipeline_model_parallel_size > 1 and args.micro_batch_size not in (None, 1),
         f"packed documents, --pipeline-model-parallel-size {args.pipeline_model_parallel_size} and "
         f"--micro-batch-size {args.micro_batch_size}", "stages take packed rows one by one: --micro-batch-size 1"),
        (args.hybrid_layer_pattern and core_v018.is_running(),
         f"--hybrid-layer-pattern {args.hybrid_layer_pattern} in core_v0.18",
         "use pretrain_gpt.py with --linear-attention-freq, or core_v0.19"),
        (args.moe_router_enable_expert_bias and core_v018.is_running(),
         "--moe-router-enable-expert-bias in core_v0.18",
         "it would count the memories among the experts there: leave it out, or use core_v0.19"),
        # Seen failing on GPUs, in the middle of start-up.
        (args.use_megatron_fsdp, "--use-megatron-fsdp", "use --use-distributed-optimizer"),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", "use --use-distributed-optimizer"),
        (getattr(args, "cpu_offloading_num_layers", 0), "--cpu-offloading-num-layers",
         "use --fine-grained-activation-offloading"),
        (packed and graphs, "CUDA graphs of packed documents",
         "their number changes from batch to batch: leave out one of the two"),
    ])  # fmt: skip


def check_context_parallel(args: argparse.Namespace) -> None:
    """Refuses packed documents where they are not cut as the layers want them: MoM layers take a row of documents cut
    as a whole, softmax attention (multi-token prediction's too, and ``--sft``) cuts every document by itself.
    """
    if args.token_mixer != "mom" or args.context_parallel_size == 1:
        return
    split = f"--context-parallel-size {args.context_parallel_size}"
    packed = getattr(args, "dataloader_inter_document_masking", False)
    freq = args.linear_attention_freq
    softmax = "*" in (args.hybrid_layer_pattern or "") or not (freq is None or (isinstance(freq, list) and all(freq)))
    softmax = softmax or bool(getattr(args, "mtp_num_layers", None))
    refuse(MOM_REFUSES, [
        (getattr(args, "sft", False), f"--sft and {split}",
         "every document is cut by itself there: use another layout"),
        (packed and softmax, f"--dataloader-inter-document-masking, {split} and softmax attention layers",
         "these want every document cut by itself: make every layer MoM, without --mtp-num-layers, or leave out one "
         "of the two"),
    ])  # fmt: skip


def compare_with_checkpoint(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Raises ValueError, naming the first difference, where a checkpoint's memories have another shape than ours."""
    default = {f.name: f.default for f in fields(MomTransformerConfig)}
    for name in SHAPE:
        theirs, mine = getattr(saved, name, default[name]), getattr(args, name, default[name])
        if theirs != mine:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"the checkpoint was written with {option} {theirs}, the command line says {mine}: "
                "give the same value, or --use-checkpoint-args"
            )


def check_run(args: argparse.Namespace) -> None:
    """Refuses what cannot be saved, and a --load whose checkpoint, if there is one, holds another model."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    check_optimizer(args)
    if args.load is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it tells every argument that it would set on the copy
        found = load_args_from_checkpoint(copy.copy(args))
    if isinstance(found, tuple):
        compare_with_checkpoint(args, found[1])


def _add_group(add_megatron_arguments, parser):
    return repair_help(add_mom_arguments(add_megatron_arguments(parser)))


def _validate(validate_args, args, *positional, **keywords):
    """Megatron's checks and ours. Memories may be the only experts: Megatron's then see no expert parallelism."""
    fill_mom_arguments(args)
    if args.token_mixer != "mom":
        return validate_args(args, *positional, **keywords)
    check_model(args)
    check_context_parallel(args)
    size = args.expert_model_parallel_size
    if not args.num_experts:
        args.expert_model_parallel_size = 1
    result = validate_args(args, *positional, **keywords)
    args.expert_model_parallel_size = size
    check_run(args)
    return result


def _restore(load_args_from_checkpoint, args, *positional, **keywords):
    """Our part of --use-checkpoint-args: what the command line leaves open comes from the checkpoint."""
    result = load_args_from_checkpoint(args, *positional, **keywords)
    if isinstance(result, tuple):
        saved = result[1]
        for name in [*OURS, "linear_attention_freq"]:
            if getattr(args, name, None) is None and getattr(saved, name, None) is not None:
                setattr(args, name, getattr(saved, name))
        if getattr(saved, "token_mixer", None) == "mom":  # part of every MoM layer, and not None by default
            args.layernorm_epsilon = saved.layernorm_epsilon
    return result


def _compare(check_checkpoint_args, saved, *positional, **keywords):
    """The same where Megatron compares its own list."""
    from megatron.training import get_args

    check_checkpoint_args(saved, *positional, **keywords)
    compare_with_checkpoint(get_args(), saved)


PATCH = Patch(
    name="arguments",
    reason="which arguments exist, are checked, come back from a checkpoint and are compared with it is a fixed list; "
    "--expert-model-parallel-size needs --num-experts there",
    removed_when="megatron.training takes arguments and their checks from the model's configuration",
    targets=(
        wrap("megatron.training.arguments", "add_megatron_arguments", _add_group),
        wrap("megatron.training.arguments", "validate_args", _validate),
        wrap("megatron.training.checkpointing", "load_args_from_checkpoint", _restore),
        wrap("megatron.training.checkpointing", "check_checkpoint_args", _compare),
    ),
)
