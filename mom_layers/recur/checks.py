"""Checks of a recurrence's inputs, which every kernel family makes once, at its public function."""

from __future__ import annotations

import torch

from mom_layers.common.checks import FLOATING, WHOLE, check_borders, check_number, check_tensors
from mom_layers.common.supported import FLOAT_TYPES, HEAD_SIZES


def check_types(q, k, v, gates: dict[str, object], cu_seqlens, initial_state, scale) -> None:
    """Raises TypeError or ValueError, with the argument's name, for arguments of another type than the operation takes.

    ``gates``: by name.
    """
    check_tensors(FLOATING, q=q)
    check_tensors(FLOATING, q.device, k=k, v=v, **gates)
    check_tensors(WHOLE, q.device, cu_seqlens=cu_seqlens)
    check_borders(cu_seqlens, q.shape[0] if q.dim() else 0)
    if initial_state is not None:
        check_tensors(FLOATING, q.device, initial_state=initial_state)
    if scale is not None:
        check_number(scale=scale)


def check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, initial_state: torch.Tensor | None
) -> None:
    """Raises ValueError unless q and k are [R, H, K], v [R, H, V], the initial state [S, H, K, V] or absent, and
    cu_seqlens [S + 1] never decreasing from 0 to R (`mom_layers.common.checks` says where values are checked)."""
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q and k must be [R, H, K] and v [R, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be [S + 1] integers, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    check_borders(cu_seqlens, q.shape[0])
    if initial_state is not None:
        state_shape = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
        if initial_state.shape != state_shape:
            raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")


def check_for_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: dict[str, torch.Tensor],
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    sizes: tuple[int, ...] = HEAD_SIZES,
) -> None:
    """Raises ValueError where the Triton kernels do not take the inputs' head sizes, types or devices.

    Call :func:`check_shapes` first. ``gates``: by name, as the message should show them. ``sizes``: K and V that the
    family's kernels take.
    """
    for name, size in (("K", q.shape[2]), ("V", v.shape[2])):
        if size not in sizes:
            raise ValueError(f"head size {name} = {size} is not supported: choose one of {sizes}")
    if q.dtype not in FLOAT_TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one type of {FLOAT_TYPES}, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, gate in gates.items():
        if gate.dtype not in FLOAT_TYPES:
            raise ValueError(f"{name} must be of a type in {FLOAT_TYPES}, got {gate.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [S + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"initial_state must be float32, got {initial_state.dtype}")
    others = {"k": k, "v": v, **gates, "cu_seqlens": cu_seqlens, "initial_state": initial_state}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on q's device {q.device}, got {name} on {tensor.device}")
