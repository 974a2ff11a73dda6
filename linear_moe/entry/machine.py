"""What the machine offers, and Megatron's settings that follow from it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from importlib.metadata import version

import torch

from megatron_patches import checkpoints, dataset_helpers, float32_parameters, reshardable_optimizer
from megatron_patches.child_processes import end_with_parent
from megatron_patches.patch import apply_all

logger = logging.getLogger(__name__)
OUR_PACKAGES = ("linear_moe", "megatron_patches")


def prepare_machine() -> None:
    """Applies the patches that training with MoM layers needs here; to be called before ``megatron.training`` is
    imported.
    """
    start()
    float32_parameters.apply()
    reshardable_optimizer.apply()
    from linear_moe.entry import checks

    apply_all((*checkpoints.patches(), checks.PATCH))


def start() -> None:
    """Lets Megatron start here: alone where torchrun did not start this process, without a GPU, from its wheel."""
    if "RANK" not in os.environ:  # not started by torchrun: a world of one process
        # Port 0 is any free one: nobody else has to know it.
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks whose torchrun was killed would train on beside a restarted job
        end_with_parent()
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from megatron_patches import cpu

        cpu.apply()
    if dataset_helpers.is_needed():
        dataset_helpers.apply()


def show_log() -> None:
    """Prints what our packages log, once and not on every rank, however the script around them logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in OUR_PACKAGES:
        ours = logging.getLogger(package)
        ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        ours.propagate = False
        ours.handlers = [handler]


def accelerated_parts() -> dict[str, str | None]:
    """What makes training faster or is written to, with its version or device; None where it is missing."""
    modules = {"Transformer Engine": "transformer_engine", "Triton": "triton", "wandb": "wandb"}
    parts = {name: version(module.replace("_", "-")) if _found(module) else None for name, module in modules.items()}
    parts["CUDA"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parts["Apex"] = "gradient accumulation fusion" if _found("fused_weight_gradient_mlp_cuda") else None
    return parts


def announce() -> None:
    """Logs which accelerated parts were found and which were not, in one line."""
    parts = accelerated_parts()
    found = ", ".join(f"{name} ({detail})" for name, detail in parts.items() if detail)
    missing = ", ".join(name for name, detail in parts.items() if not detail)
    logger.info("found: %s; not found: %s", found or "nothing", missing or "nothing")


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def add_machine_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Changes defaults of Megatron that cannot work here; what the command line says still wins."""
    # A NaN loss ends the run with an error. Megatron's default tells a broken GPU from a broken model by running the
    # step again, and exits with a checkpoint to be restarted elsewhere.
    parser.set_defaults(rerun_mode="disabled")
    if not torch.cuda.is_available():
        return parser  # megatron_patches.cpu has set the rest
    if not _found("transformer_engine"):
        parser.set_defaults(transformer_impl="local", no_persist_layer_norm=True, masked_softmax_fusion=False)
    if not _found("fused_weight_gradient_mlp_cuda"):  # Apex's extension
        parser.set_defaults(gradient_accumulation_fusion=False)
    return parser
