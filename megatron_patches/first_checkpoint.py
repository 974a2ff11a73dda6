"""Lets a run save a checkpoint before its optimizer has made a step.

fp16 training skips its first steps, until the loss scale is small enough. An optimizer makes its state in its first
step. The distributed optimizer cannot be saved without state, and no optimizer can be loaded without.
"""

import torch

from megatron_patches.patch import Patch, wrap


def _start(optimizer) -> None:
    """Gives every parameter that has no state the state before the first step."""
    for part in getattr(optimizer, "chained_optimizers", ()):
        _start(part)
    start = getattr(optimizer, "init_state_fn", None)
    if start is None or getattr(optimizer, "is_stub_optimizer", False):
        return
    inner = optimizer.optimizer
    start(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam):  # which counts steps in each parameter's state
        for state in inner.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _with_state(save, iteration, model, optimizer, *args, **kwargs):
    _start(optimizer)
    return save(iteration, model, optimizer, *args, **kwargs)


PATCH = Patch(
    name="first-checkpoint",
    reason="an optimizer that has made no step, as in fp16 runs whose first steps are skipped, has no state to save",
    removed_when="save_checkpoint calls init_state_fn, as load_checkpoint does",
    targets=(wrap("megatron.training.checkpointing", "save_checkpoint", _with_state),),
)
