"""What the machine offers, and Megatron's settings that follow from it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket

import torch

from megatron_patches import dataset_helpers, float32_parameters, reshardable_optimizer


def prepare_machine() -> None:
    """Applies the patches that this machine needs; to be called before ``megatron.training`` is imported."""
    if "RANK" not in os.environ:  # not started by torchrun: a world of one process
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from megatron_patches import cpu

        cpu.apply()
    dataset_helpers.apply()
    float32_parameters.apply()
    reshardable_optimizer.apply()


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
