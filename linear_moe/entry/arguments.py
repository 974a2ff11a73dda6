"""The command-line group of Mixture-of-Memories, its checks, and its part of Megatron's checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import io
import logging
import os
from dataclasses import fields

from linear_moe.config import (
    OUR_SPEC,
    MomTransformerConfig,
    check_expert_parallel,
    describe_memories,
    expert_exchange,
    has_memories,
    refuse_beside_mixer,
    settle_token_mixer,
    splits_memories,
)
from linear_moe.entry import attention_options, cpu_options, hybrid_pattern
from linear_moe.entry.kernel_check import check_kernels
from linear_moe.entry.run_checks import check_values
from linear_moe.entry.vocabulary_rows import keep_rows, report_rows
from linear_moe.pattern import pairs
from megatron_patches import releases
from megatron_patches.patch import Patch, wrap

logger = logging.getLogger(__name__)

FIELDS = {f.name: f for f in fields(MomTransformerConfig)}
DEFAULTS = {name: f.default for name, f in FIELDS.items()}
OURS = [name for name, f in FIELDS.items() if "help" in f.metadata]
SHAPE = [name for name in OURS if FIELDS[name].metadata["fixed"]]
"""Arguments that a checkpoint fixes: other values give the weights another meaning. So does the order of layers."""
OLD_NAMES = {"mom_backend": "mom_kernels"}
"""Earlier names of arguments, which commands, settings and checkpoints may still use."""
OUR_PREFIXES = ("--mom-", "--no-mom-", "--token-mixer")


def option(name: str) -> str:
    """The command line's spelling of an argument."""
    return "--" + name.replace("_", "-")


def is_switch(name: str) -> bool:
    """Whether an argument of ours is given as ``--name`` and ``--no-name``."""
    return FIELDS[name].metadata["kind"] is bool


def add_mom_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the group to Megatron's parser. Every default is None: a checkpoint or the configuration fills the value."""
    group = parser.add_argument_group("mixture of memories")
    group.add_argument("--help-mom", action=_OurHelp, nargs=0, help="show these arguments alone")

    for name in OURS:
        about, old = FIELDS[name].metadata, [option(before) for before, now in OLD_NAMES.items() if now == name]
        choices = about["choices"]() if callable(about["choices"]) else about["choices"]
        kind = {"choices": choices} if choices else {"type": about["kind"]}
        if is_switch(name):
            kind = {"action": argparse.BooleanOptionalAction}
        help = f"{about['help']} Default: {DEFAULTS[name]}."
        group.add_argument(option(name), *old, default=None, help=help, **kind)
    group.add_argument(
        "--no-kernel-check", dest="kernel_check", action="store_false", default=None,
        help="Skip the check of the Triton kernels that a run makes where a chip, a version of Triton or head sizes "
        "are new.",
    )  # fmt: skip
    return parser


class _OurHelp(argparse.Action):
    """`--help-mom`: prints the arguments of this project alone, and ends the program."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        (group,) = (group for group in parser._action_groups if self in group._group_actions)
        formatter = parser._get_formatter()
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        print(formatter.format_help(), end="")
        parser.exit()


def suggest_names(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds to the parser's message about unknown arguments, for each of ours with a typing error, the name meant."""
    fail = parser.error

    def error(message: str):
        hints = []
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ").split()
            known = [name for name in parser._option_string_actions if name.startswith(OUR_PREFIXES)]
            for word in words:
                close = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.75)
                if word.startswith("--") and close:
                    hints.append(f"{word.partition('=')[0]}: did you mean {close[0]}?")
            if not hints and any(word.startswith(OUR_PREFIXES) for word in words):
                hints.append("--help-mom shows the arguments of Mixture-of-Memories")
        fail("\n  ".join([message, *hints]))

    parser.error = error
    return parser


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escapes the percent signs in Megatron's help texts that argparse cannot format."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def fill_mom_arguments(args: argparse.Namespace) -> None:
    """Sets every argument of ours that neither the command line nor a checkpoint set: to its default, or to what a
    token mixer of one memory has.

    Raises ValueError for an argument that the chosen token mixer does not have.
    """
    args.token_mixer = getattr(args, "token_mixer", None) or DEFAULTS["token_mixer"]
    settle_token_mixer(args, {})
    for name in OURS:
        if getattr(args, name, None) is None:
            setattr(args, name, DEFAULTS[name])


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that our token mixers do not work with: they would build another model, stop
    in the middle of start-up, or replay the documents of another batch.
    """
    spec = None if args.spec is None else " ".join(args.spec)
    pattern = args.hybrid_layer_pattern
    packed = args.sft or releases.argument(args, "dataloader_inter_document_masking")
    graphs = args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
    refuse_beside_mixer(args, [
        (spec and not pattern and spec != OUR_SPEC, f"--spec {spec}", f"leave --spec out, or give {OUR_SPEC}"),
        ((args.reset_attention_mask or args.reset_position_ids) and not packed,
         "--reset-attention-mask" if args.reset_attention_mask else "--reset-position-ids",
         "use --dataloader-inter-document-masking, which tells the memories where documents end"),
        (pattern and args.mom_loss_chunk, f"--hybrid-layer-pattern and --mom-loss-chunk {args.mom_loss_chunk}",
         "Megatron's hybrid models compute all logits at once: leave out --mom-loss-chunk"),
        *releases.running().refusals(args),
        (packed and graphs, "CUDA graphs of packed documents",
         "the number of documents changes from batch to batch: leave out one of the two"),
    ])  # fmt: skip
    hybrid_pattern.check_pattern(args)
    attention_options.check_attention(args)


def send_shapes(args: argparse.Namespace) -> None:
    """Lets pipeline stages send the shapes of hidden states, where Megatron flattens the packed rows of a micro-batch
    into one row and its stages would expect the rows apart.
    """
    packed = args.sft or releases.argument(args, "dataloader_inter_document_masking")
    if packed and args.pipeline_model_parallel_size > 1 and args.micro_batch_size > 1:
        if args.moe_token_dispatcher_type == "allgather":
            refuse_beside_mixer(args, [(
                args.num_experts,
                f"packed documents, --pipeline-model-parallel-size {args.pipeline_model_parallel_size}, "
                f"--micro-batch-size {args.micro_batch_size} and --moe-token-dispatcher-type allgather",
                "Megatron's TransformerConfig refuses rows of another length there (transformer_config.py:2644): "
                "use --moe-token-dispatcher-type alltoall, or --micro-batch-size 1",
            )])  # fmt: skip
            args.moe_token_dispatcher_type = "alltoall"  # of experts, which are none
        args.variable_seq_lengths = True
        logger.info("pipeline stages send shapes: a micro-batch of packed rows is one row of hidden states")


def check_context_parallel(args: argparse.Namespace) -> None:
    """Raises ValueError for softmax attention that cannot cut sequences, and for packed documents that softmax
    attention (multi-token prediction's too) cannot cut: it cuts every document into equal chunks, for which only the
    rows of ``--sft`` are padded.
    """
    if not has_memories(args) or args.context_parallel_size == 1:
        return
    split = f"--context-parallel-size {args.context_parallel_size}"
    packed = releases.argument(args, "dataloader_inter_document_masking")
    softmax = hybrid_pattern.has_softmax_layers(args)
    refuse_beside_mixer(args, [
        (softmax and args.transformer_impl == "local",
         f"softmax attention layers, --transformer-impl local and {split}",
         "local attention cannot split a sequence: make every layer MoM, or use --transformer-impl "
         "transformer_engine"),
        (packed and not args.sft and softmax,
         f"--dataloader-inter-document-masking, {split} and softmax attention layers",
         "softmax attention cuts every document into equal chunks, and Megatron pads documents for that with --sft "
         "alone (pretrain_gpt.py, use_per_sequence_balancing): make every layer MoM, without --mtp-num-layers, or "
         "leave out one of the two"),
    ])  # fmt: skip


def compare_layers(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Raises ValueError where a checkpoint's layers are not those of the command line. A GPT model and a hybrid model
    may have the same layers.
    """
    if not has_memories(args) and (getattr(saved, "token_mixer", None) or "attention") == "attention":
        return
    if getattr(args, "hybrid_layer_pattern", None) is None and getattr(saved, "hybrid_layer_pattern", None) is None:
        _compare_values(args, saved, "linear_attention_freq", None)
        return
    theirs, mine = hybrid_pattern.layers_of(saved), hybrid_pattern.layers_of(args)
    if theirs != mine:
        raise ValueError(
            f"the checkpoint has the layers {theirs}, the command line's model {mine}: give --hybrid-layer-pattern "
            f"'{theirs}', or --use-checkpoint-args in place of the layers"
        )


def _compare_values(args: argparse.Namespace, saved: argparse.Namespace, name: str, default: object) -> None:
    theirs, mine = getattr(saved, name, default), getattr(args, name, default)
    if theirs != mine:
        raise ValueError(
            f"the checkpoint was written with {option(name)} {theirs}, the command line says {mine}: "
            + (
                "leave the argument out, and --use-checkpoint-args takes the checkpoint's value"
                if getattr(args, "use_checkpoint_args", False)
                else "give the same value, or --use-checkpoint-args"
            )
        )


def compare_with_checkpoint(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Raises ValueError, naming the first difference, where a checkpoint's memories have another shape than ours."""
    compare_layers(args, saved)
    for name in SHAPE:
        _compare_values(args, saved, name, DEFAULTS[name])
    theirs, mine = (getattr(holder, "tensor_model_parallel_size", 1) for holder in (saved, args))
    if has_memories(args) and getattr(args, "use_megatron_fsdp", False) and theirs != mine:
        raise ValueError(
            f"--tensor-model-parallel-size {mine}: the checkpoint was written with {theirs}, and Megatron FSDP's "
            f"checkpoints hold the memories' projections as the ranks had them: give {theirs}"
        )


def check_peers(args: argparse.Namespace) -> None:
    """Raises ValueError where --mom-expert-exchange peer-memory would read the memory of another machine's GPU."""
    if expert_exchange(args) != "peer-memory" or args.expert_model_parallel_size == 1 or not splits_memories(args):
        return
    ranks = args.expert_model_parallel_size * args.tensor_model_parallel_size
    here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    if here % ranks:
        raise ValueError(
            f"--mom-expert-exchange peer-memory reads the other GPUs of one machine, and {here} processes a machine do "
            f"not hold whole expert-parallel groups: --expert-model-parallel-size {args.expert_model_parallel_size} x "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} = {ranks} must divide {here}, or use "
            "--mom-expert-exchange all-to-all"
        )


def place_memories(args: argparse.Namespace) -> None:
    """Logs where the memories are, in a run with expert parallelism. A model without experts whose memories are whole
    has nothing to split: the size becomes 1, and so the optimizer's checkpoint is that of any run without a split.

    Raises ValueError where --mom-expert-parallel on asks for a split that cannot be.
    """
    check_expert_parallel(args)
    check_peers(args)
    line = describe_memories(args)
    if line is None:
        return
    if not args.num_experts and not splits_memories(args):
        line += f"; the model has no experts: --expert-model-parallel-size {args.expert_model_parallel_size} becomes 1"
        args.expert_model_parallel_size = 1
    logger.info(line)


def check_run(args: argparse.Namespace) -> None:
    """Raises ValueError where --load names a checkpoint of another model."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.load is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints every argument that it sets on the copy
        found = load_args_from_checkpoint(copy.copy(args))
    if isinstance(found, tuple):
        compare_with_checkpoint(args, found[1])
        keep_rows(args, found[1])


def restore_from_checkpoint(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Our part of --use-checkpoint-args: sets the arguments that the command line leaves open as the checkpoint says,
    which may have them under an old name.
    """
    held = {now: getattr(saved, before) for before, now in OLD_NAMES.items() if hasattr(saved, before)} | vars(saved)
    restored = OURS if getattr(args, "hybrid_layer_pattern", None) is not None else [*OURS, "linear_attention_freq"]
    for name in restored:
        mine, theirs = getattr(args, name, None), held.get(name)
        if mine is None and theirs is not None:
            setattr(args, name, theirs)
        elif theirs is not None and mine != theirs and name not in SHAPE:
            logger.info("%s %s, of the command line, wins over the checkpoint's %s", option(name), mine, theirs)
    if (
        held.get("token_mixer", "attention") != "attention"
    ):  # every such layer has a norm, and the argument's default is a number
        args.layernorm_epsilon = saved.layernorm_epsilon


def _add_group(add_megatron_arguments, parser):
    return suggest_names(repair_help(add_mom_arguments(add_megatron_arguments(parser))))


def _validate(validate_args, args, *positional, **keywords):
    """Megatron's checks and ours. In a model without experts Megatron's checks see no expert parallelism."""
    hybrid_pattern.choose_token_mixer(args)
    fill_mom_arguments(args)
    cpu_options.use_counterparts(args)
    if not has_memories(args):
        return validate_args(args, *positional, **keywords)
    check_values(args)  # before the checks that compute with the values
    hybrid_pattern.use_present_name(args)
    hybrid_pattern.use_memory_symbol(args)
    check_model(args)
    check_context_parallel(args)
    attention_options.drop_unused_attention(args)
    size = args.expert_model_parallel_size
    if not args.num_experts:
        args.expert_model_parallel_size = 1
    result = validate_args(args, *positional, **keywords)
    args.expert_model_parallel_size = size
    send_shapes(args)
    place_memories(args)
    check_run(args)
    check_kernels(args)
    return result


def _restore(load_args_from_checkpoint, args, *positional, **keywords):
    result = load_args_from_checkpoint(args, *positional, **keywords)
    if isinstance(result, tuple):
        restore_from_checkpoint(args, result[1])
    return result


def _compare(check_checkpoint_args, saved, *positional, **keywords):
    from megatron.training import get_args

    args = get_args()
    compare_with_checkpoint(args, saved)
    seen = saved
    if is_of_other_class(args, saved):  # a layer of a GPT model is two of a hybrid model
        seen = copy.copy(saved)
        seen.num_layers = args.num_layers
    check_checkpoint_args(seen, *positional, **keywords)
    report_rows(args, saved)


def is_of_other_class(args: argparse.Namespace, saved: argparse.Namespace) -> bool:
    """Whether a checkpoint with memories is of a GPT model and the run of a hybrid model, or the other way round."""
    classes = [getattr(holder, "hybrid_layer_pattern", None) is None for holder in (args, saved)]
    return has_memories(args) and classes[0] != classes[1]


def _load_other_class(set_up, args, saved, model):
    """Megatron's decision how a GPT model's checkpoint comes into a hybrid model, for models without memories."""
    if not has_memories(args) or not hasattr(saved, "num_layers"):
        return set_up(args, saved, model)
    if is_of_other_class(args, saved):
        layers = hybrid_pattern.layers_of(args)
        if pairs(layers) is None:
            raise ValueError(
                f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: the checkpoint {args.load} is a GPT model's, "
                "whose layers are a mixer and an MLP in turn: give a pattern such as R-*-"
            )
        kind = "GPT" if args.hybrid_layer_pattern is not None else "hybrid"
        logger.info("the checkpoint in %s is a %s model's with the same layers, %s", args.load, kind, layers)
    return None, False


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
        wrap("megatron.training.checkpointing", "_maybe_setup_gpt_to_hybrid_load", _load_other_class),
    ),
)
