"""The few lines at the start of a run: what is trained, on what, and where the rest is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from linear_moe.config import describe_memories, has_memories, has_router
from linear_moe.entry.log import QuietStreams, found_parts
from megatron_patches.patch import applied
from mom_layers.recur.rules import get_rule

TRACKER = "latest_checkpointed_iteration.txt"


def show(streams: QuietStreams, args, model: Sequence[torch.nn.Module], tokens: dict[str, int]) -> None:
    """Opens the log file, if the command line has named none, and prints the banner once a run. Every process of the
    run must call this function.

    Args:
        model: the parts of the model that this process holds.
        tokens: number of tokens of every data path.
    """
    parameters = count_parameters(args, model)
    folder = args.save or args.tensorboard_dir
    if streams.log.path is None and folder and "://" not in str(folder):
        streams.log.open(Path(folder) / "log.txt")
    if os.environ.get("RANK", "0") == "0":
        for name, text in facts(args, parameters, tokens, streams.log.path).items():
            streams.show(f"{name:9} {text}")


def count_parameters(args, model: Sequence[torch.nn.Module]) -> int:
    """Number of parameters of the whole model, in every process. A parameter that two pipeline stages share counts
    once.
    """
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    total = 0.0
    for parameter in (parameter for part in model for parameter in part.parameters()):
        if getattr(parameter, "shared_embedding", False) and args.pipeline_model_parallel_size > 1:
            share = 0.5  # the first stage and the last
        else:
            share = 1.0
        if getattr(parameter, "tensor_model_parallel", False):
            share *= tensor
        if not getattr(parameter, "allreduce", True):  # split over the expert-parallel ranks
            share *= args.expert_model_parallel_size
        total += share * parameter.numel()
    total *= pipeline / args.world_size
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    summed = torch.tensor(total, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(summed)
    return round(summed.item())


def facts(args, parameters: int, tokens: dict[str, int], log: Path | None) -> dict[str, str]:
    """The banner's lines, by their first words."""
    sizes = {
        "TP": args.tensor_model_parallel_size, "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size, "EP": args.expert_model_parallel_size, "DP": args.data_parallel_size,
    }  # fmt: skip
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if has_memories(args) and (memories := describe_memories(args)):
        layout += f"; {memories}"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    step = args.global_batch_size * args.seq_length
    return {
        "model": f"{_mixer(args)}; {_layers(args)} of hidden size {args.hidden_size}, vocabulary "
        f"{args.padded_vocab_size}",
        "size": f"{short(parameters)} parameters, {precision}",
        "layout": f"{args.world_size} process{'es' if args.world_size > 1 else ''}" + (f": {layout}" if layout else ""),
        "data": _data(args, tokens),
        "training": f"{args.train_iters} steps of {args.global_batch_size} sequences of {args.seq_length} "
        f"({short(step)} tokens), {args.optimizer}, learning rate {args.lr:g} {args.lr_decay_style}",
        "start": _start(args),
        "saves": f"every {args.save_interval} steps to {args.save}" if args.save else "nothing: no --save",
        "machine": found_parts(),
        "patches": f"{len(applied())} changes to Megatron, named in the log",
        "log": str(log) if log else "in memory, and shown if the run fails: give --log-file or --save",
        **_cost(args),
    }


def _cost(args) -> dict[str, str]:
    """A line about a rule whose recurrence has no kernels."""
    cost = get_rule(args.mom_rule).cost_without_kernels if has_memories(args) else None
    return {} if cost is None else {"slow": f"the update rule {args.mom_rule} has no kernels: {cost}"}


def _mixer(args) -> str:
    if not has_memories(args):
        return "softmax attention"
    heads = f"{args.mom_num_heads} heads of {args.mom_head_dim}"
    if not has_router(args):
        return f"{args.token_mixer}, one memory, {heads}"
    shared = " and a shared one" if args.mom_shared_memory else ""
    return f"MoM ({args.mom_rule}), {args.mom_num_memories} memories{shared}, top-{args.mom_topk}, {heads}"


def _layers(args) -> str:
    pattern = args.hybrid_layer_pattern
    return f"{args.num_layers} layers" + ("" if pattern is None else f" ({pattern})")


def _data(args, tokens: dict[str, int]) -> str:
    if not tokens:
        return "mock data" if args.mock_data else "as --sft says"
    names = list(tokens)
    listed = ", ".join(f"{name} ({short(tokens[name])} tokens)" for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _start(args) -> str:
    """Where the weights come from, once Megatron has loaded them."""
    if getattr(args, "iteration", 0):
        return f"step {args.iteration} of {args.load}"
    if args.load and Path(args.load, TRACKER).is_file():
        return f"weights of {args.load}"
    return "random weights"


def short(value: float) -> str:
    """A number with three digits: 4.36M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
