"""Options of a command for GPUs, turned into their counterparts on a machine without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import logging

import torch

from linear_moe.config import has_memories

logger = logging.getLogger(__name__)

COUNTERPARTS = (
    ("distributed_backend", ("nccl",), "gloo"),
    ("transformer_impl", ("transformer_engine",), "local"),
    ("cross_entropy_fusion_impl", ("te",), "native"),
    ("moe_token_dispatcher_type", ("flex",), "alltoall"),
    ("main_grads_dtype", ("bf16",), "fp32"),
    ("main_params_dtype", ("fp16",), "fp32"),
    ("exp_avg_dtype", ("fp16", "bf16", "fp8"), "fp32"),
    ("exp_avg_sq_dtype", ("fp16", "bf16", "fp8"), "fp32"),
    ("cuda_graph_impl", ("local", "transformer_engine", "full_iteration"), "none"),
    ("mom_expert_exchange", ("peer-memory",), "all-gather"),
    ("ckpt_format", ("fsdp_dtensor",), "torch_dist"),
)
"""(argument, values that need a GPU or Transformer Engine, the value on this machine)."""

WITHOUT_COUNTERPART = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "fp8_param_gather": "--fp8-param-gather",
    "moe_grouped_gemm": "--moe-grouped-gemm",
    "moe_permute_fusion": "--moe-permute-fusion",
    "moe_router_fusion": "--moe-router-fusion",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
    "tp_comm_overlap": "--tp-comm-overlap",
    "delay_wgrad_compute": "--delay-wgrad-compute",
    "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute",
    "enable_cuda_graph": "--enable-cuda-graph",
    "external_cuda_graph": "--external-cuda-graph",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "cpu_offloading_num_layers": "--cpu-offloading-num-layers",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "fsdp_manual_registration": "--fsdp-manual-registration",
    "init_model_with_meta_device": "--init-model-with-meta-device",
    "nccl_ub": "--use-nccl-ub",
    "nccl_communicator_config_path": "--nccl-communicator-config-path",
}
"""Arguments that make a run on a GPU faster or smaller, each with its option; on this machine they are off."""

TRANSFORMER_ENGINE_STACKS = (
    "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
    "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
    "megatron.core.models.mamba.mamba_layer_specs hybrid_stack_spec",
)
"""Values of --spec that are Megatron's hybrid stack with Transformer Engine."""


def use_counterparts(args: argparse.Namespace) -> None:
    """Changes the arguments of a run for GPUs to arguments that work on this machine, with a line in the log for each.
    Does nothing on a machine with a GPU. A release of Megatron may lack some of the arguments.
    """
    if torch.cuda.is_available():
        return
    recomputed = getattr(args, "recompute_modules", None) or []
    if getattr(args, "moe_grouped_gemm", False) and "moe_act" in recomputed:
        logger.info("no GPU: --recompute-modules moe_act is left out, which needs --moe-grouped-gemm")
        args.recompute_modules = [name for name in recomputed if name != "moe_act"]
    for name, values, counterpart in COUNTERPARTS:
        given = getattr(args, name, None)
        if given in values:
            logger.info("no GPU: --%s %s becomes %s", name.replace("_", "-"), given, counterpart)
            setattr(args, name, counterpart)
    for name, option in WITHOUT_COUNTERPART.items():
        given = getattr(args, name, None)
        if given:
            logger.info("no GPU: %s is left out", option if given is True else f"{option} {given}")
            setattr(args, name, False if given is True else 0 if isinstance(given, int) else None)
    strategy = getattr(args, "async_strategy", None)
    if args.async_save and strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        logger.info("nvidia-resiliency-ext is not installed: --async-strategy nvrx becomes mcore")
        args.async_strategy = "mcore"
    spec = " ".join(args.spec or [])
    if has_memories(args) and spec in TRANSFORMER_ENGINE_STACKS:
        logger.info("no GPU: --spec %s becomes a stack of the same layers with local modules", spec)
        args.spec = None
