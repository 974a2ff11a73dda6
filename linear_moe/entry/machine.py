"""What the machine offers, and the settings of Megatron that follow from it."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from linear_moe.entry import chunked_loss, run_checks
from linear_moe.entry.launch import use_loopback_store
from megatron_patches import (
    bucket_types,
    checkpoints,
    coalesced_types,
    dataset_helpers,
    early_gather,
    first_checkpoint,
    float16_optimizer,
    float32_parameters,
    gradient_norm,
    latent_attention,
    layer_wise_optimizer,
    optimizer_shards,
    parameter_groups,
    recomputed_regions,
    releases,
    reshardable_optimizer,
    tensor_strides,
    torch_fsdp2,
    torch_norm,
    trusted_checkpoints,
)
from megatron_patches.child_processes import end_with_parent
from megatron_patches.patch import Patch, PatchError, apply_all


def training_patches() -> tuple[Patch, ...]:
    """Patches of every run with MoM layers, whichever door it came through. Imports megatron.core."""
    return (
        float32_parameters.PATCH,
        float16_optimizer.PATCH,
        layer_wise_optimizer.PATCH,
        parameter_groups.PATCH,
        bucket_types.PATCH,
        coalesced_types.PATCH,
        early_gather.PATCH,
        reshardable_optimizer.PATCH,
        torch_fsdp2.PATCH,
        optimizer_shards.PATCH,
        torch_norm.PATCH,
        latent_attention.PATCH,
        tensor_strides.PATCH,
        gradient_norm.PATCH,
        recomputed_regions.PATCH,
        trusted_checkpoints.PATCH,
        *checkpoints.patches(),
        first_checkpoint.PATCH,
        run_checks.PATCH,
        chunked_loss.PATCH,
    )


def start() -> None:
    """Lets Megatron start on this machine: in one process without torchrun, without a GPU, and from its wheel.

    Raises PatchError for a Megatron that is older than every supported one.
    """
    if reason := releases.why_too_old():
        raise PatchError(reason)
    if "RANK" not in os.environ:  # torchrun did not start this process: a world of one process
        # Port 0 is any free port. No other process connects to it.
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})
    atexit.register(release_cuda_graphs)  # of runs that end by Megatron's exits, or in Megatron-LM's own scripts
    use_loopback_store("torch.distributed.rendezvous")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks whose torchrun was killed would train on beside a restarted job
        end_with_parent()
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from megatron_patches import cpu

        cpu.apply()
    if dataset_helpers.is_needed():
        dataset_helpers.apply()


def prepare_machine() -> None:
    """`start`, and the patches that training with MoM layers needs. Call it before importing ``megatron.training``."""
    start()
    apply_all(training_patches())


def release_cuda_graphs() -> None:
    """Resets every CUDA graph of this process, so that NCCL's communicators can be destroyed.

    NCCL waits without end for a CUDA graph that holds one of its collectives, and Megatron keeps the graphs of layers
    until the process ends.
    """
    for graph in [found for found in gc.get_objects() if issubclass(type(found), torch.cuda.CUDAGraph)]:
        graph.reset()


def end_process_groups() -> None:
    """Destroys torch.distributed's process groups, if there are any."""
    if torch.distributed.is_initialized():
        release_cuda_graphs()
        torch.distributed.destroy_process_group()


@contextmanager
def lone_process(backend: str) -> Iterator[None]:
    """Megatron's process groups of this process alone, for models that are loaded beside a training. No address and no
    port is needed. `prepare_machine` comes first.

    Args:
        backend: of the collectives, "nccl" or "gloo".
    """
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def accelerated_parts() -> dict[str, str | None]:
    """The parts that make training faster or that a run writes to, each with its version or device; None if missing."""
    modules = {"Transformer Engine": "transformer_engine", "Triton": "triton", "wandb": "wandb"}
    parts = {name: version(module.replace("_", "-")) if _found(module) else None for name, module in modules.items()}
    parts["CUDA"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parts["Apex"] = "gradient accumulation fusion" if _found("fused_weight_gradient_mlp_cuda") else None
    return parts


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def add_machine_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Changes defaults of Megatron that cannot work on this machine. The command line still wins."""
    # A NaN loss ends the run with an error. Megatron's default runs the step again, to tell a broken GPU from a broken
    # model, and exits with a checkpoint to be restarted on another machine.
    parser.set_defaults(rerun_mode="disabled")
    # Megatron's own usage has 900 lines, and argparse prints the usage before the message about a wrong argument.
    parser.usage = "linear-moe pretrain --token-mixer mom <Megatron's arguments>   (--help-mom)"
    if not torch.cuda.is_available():
        return parser  # megatron_patches.cpu sets the other defaults
    if not _found("transformer_engine"):
        parser.set_defaults(transformer_impl="local", no_persist_layer_norm=True, masked_softmax_fusion=False)
    if not _found("fused_weight_gradient_mlp_cuda"):  # Apex's extension
        parser.set_defaults(gradient_accumulation_fusion=False)
    return parser
