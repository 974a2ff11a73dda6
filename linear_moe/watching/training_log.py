"""What a run of somebody else's script says about its memories, beside the lines that Megatron prints."""

from __future__ import annotations

import inspect

from linear_moe.watching.flops import flops_patch
from linear_moe.watching.metrics import memory_metrics, scalars, summarize, write
from megatron_patches.patch import Patch, wrap


def memory_line(iteration: int, report: dict) -> str:
    """A report of `summarize` in one line."""
    parts = [f" memories at iteration {iteration}"]
    if report["load"]:
        parts.append(f"load {100 * report['load_min']:.0f}-{100 * report['load_max']:.0f}%")
    if report["load_balancing_loss"] is not None:
        parts.append(f"balance {report['load_balancing_loss']:.2f}")
    if report["z_loss"] is not None:
        parts.append(f"z-loss {report['z_loss']:.3f}")
    return " | ".join(parts)


def _log(training_log, *args, **kwargs):
    from megatron.training import training

    call = inspect.signature(training_log).bind(*args, **kwargs).arguments
    result = training_log(*args, **kwargs)
    settings, iteration = training.get_args(), call["iteration"]
    if getattr(settings, "token_mixer", "attention") != "mom" or iteration % settings.log_interval:
        return result
    layers = settings.num_layers + (settings.mtp_num_layers or 0)
    report = summarize(memory_metrics().collect(layers, settings.mom_num_memories))
    if not report["load"]:
        raise RuntimeError("--token-mixer mom: no layer of the model that this script built has memories")
    training.print_rank_last(memory_line(iteration, report))
    write(scalars(report), iteration, training.get_tensorboard_writer(), training.get_wandb_writer())
    return result


PATCH = Patch(
    name="training-log",
    reason="Megatron's log has no place for the memories' load, and counts a MoM layer as softmax attention in FLOPs",
    removed_when="megatron.training lets a callback log, and num_floating_point_operations asks the layers",
    targets=(*flops_patch.targets, wrap("megatron.training.training", "training_log", _log)),
)
