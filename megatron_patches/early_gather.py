"""Gathers no parameter before its optimizer has stepped.

With --overlap-param-gather-with-optimizer-step Megatron gathers the parameters of the first virtual stage as soon as
the stage's own optimizer has stepped. Among these parameters are those that are reduced as experts' are, in models with
experts and in models with memories. A later optimizer of the chain updates them, and the ranks would train on with
different parameters. Here their gather waits for the forward pass, which starts every gather that has not started.
"""

from megatron_patches.patch import Patch, wrap


def _without_experts(start_param_sync, ddp, *unused, force_sync=False, force_dispatch=False):
    if not force_dispatch:
        return start_param_sync(ddp, *unused, force_sync=force_sync)
    groups, ddp.expert_parallel_bucket_groups = ddp.expert_parallel_bucket_groups, []
    try:
        return start_param_sync(ddp, *unused, force_sync=force_sync, force_dispatch=True)
    finally:
        ddp.expert_parallel_bucket_groups = groups


PATCH = Patch(
    name="early-gather",
    reason="--overlap-param-gather-with-optimizer-step gathers the first stage's experts before their optimizer steps",
    removed_when="the chained optimizer gathers after the last optimizer of a model chunk",
    targets=(
        wrap(
            "megatron.core.distributed.distributed_data_parallel",
            "DistributedDataParallel.start_param_sync",
            _without_experts,
        ),
    ),
)
