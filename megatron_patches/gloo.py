"""Collectives in forms that gloo lacks: split sizes in tensors, and parts of different lengths."""

import torch
import torch.distributed


def split_sizes_as_numbers(all_to_all_single, output, input, *sizes, **kwargs):
    """``torch.distributed.all_to_all_single`` whose split sizes may be tensors."""
    sizes = tuple(size.tolist() if isinstance(size, torch.Tensor) else size for size in sizes)
    kwargs = {
        name: value.tolist() if name.endswith("_sizes") and isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    return all_to_all_single(output, input, *sizes, **kwargs)


def gather_different_lengths(all_gather, outputs, tensor, group=None, async_op=False):
    """``torch.distributed.all_gather`` whose parts may differ in their first dimension: they travel padded."""
    if all(output.shape == outputs[0].shape for output in outputs):
        return all_gather(outputs, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(max(output.shape[0] for output in outputs), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in outputs]
    all_gather(parts, padded, group=group)
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part[: output.shape[0]])
    return Done() if async_op else None


def scatter_different_lengths(reduce_scatter, output, parts, op=None, group=None, async_op=False):
    """``torch.distributed.reduce_scatter`` whose parts may differ in their first dimension: every rank sums all of
    them and keeps its own."""
    op = torch.distributed.ReduceOp.SUM if op is None else op
    if all(part.shape == parts[0].shape for part in parts):
        return reduce_scatter(output, parts, op=op, group=group, async_op=async_op)
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, op=op, group=group)
    rank = torch.distributed.get_rank(group)
    output.copy_(whole.split([part.shape[0] for part in parts])[rank])
    return Done() if async_op else None


class Done:
    """The handle of a collective that has ended."""

    def wait(self, timeout=None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True
