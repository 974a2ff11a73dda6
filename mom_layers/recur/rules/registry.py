"""What a memory update rule is, and the registry of them.

A rule says which gates it wants projected from a token, which per-head parameters it keeps, how the two become the
gates that its recurrence reads, and the recurrence itself. Everything else of a layer (routing, projection,
convolution, mixing) is the same for every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mom_layers.common.kernels import compute_dtype


@dataclass(frozen=True)
class MemoryRule:
    """One row of the MoM paper's table of update rules.

    Attributes:
        name: how a user names it.
        gate_widths: projected gates in the order of the fused projection, and the columns that each has a head.
        parameter_shapes: key size K -> {name: shape of a head's part}; the rule's parameters are [H, *shape].
        init_parameters: (num_heads, K) -> {name: float32 [H, *shape] tensor}; drawn with torch's global generator on
            the CPU.
        gates: ({gate name: [R, H * width]}, {parameter name: [H, *shape]}, kernels) -> what ``recur`` takes as gates.
        recur: (q [R, H, K], k, v [R, H, V], cu_seqlens, gates, initial_state, output_final_state, kernels) ->
            (o [R, H, V], final state [S, H, K, V] or None).
        transition: (k [R, H, K], cu_seqlens, gates, kernels) -> the matrix that a segment multiplies its initial state
            by, [S, H, K, K] in float32 (float64 for float64 keys); [S, H, K] where it is diagonal.
        initial_state_gradient: (q, k [R, H, K], do [R, H, V], cu_seqlens, gates, kernels) -> the gradient of the
            initial state, [S, H, K, V], through the outputs alone, whose gradient is do. They are linear in the state,
            so that no values are needed.
        diagonal_transition: it is.
        decode_step: the arguments of :func:`mom_layers.decode.operation.decode_step`, and what it returns;
            None where a step of one token takes the general path.
        unit_length_keys: q and k are brought to unit length per head.
        head_sizes: key and value sizes that the Triton kernels take.
        recurrence_flops: (rows, heads, key size, value size) -> forward floating-point operations, for MFU.
    """

    name: str
    gate_widths: Mapping[str, int]
    parameter_shapes: Callable[[int], dict[str, tuple[int, ...]]]
    init_parameters: Callable[[int, int], dict[str, torch.Tensor]]
    gates: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor], str], dict[str, torch.Tensor]]
    recur: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    transition: Callable[..., torch.Tensor]
    initial_state_gradient: Callable[..., torch.Tensor]
    diagonal_transition: bool
    unit_length_keys: bool
    head_sizes: tuple[int, ...]
    recurrence_flops: Callable[[int, int, int, int], float]
    decode_step: Callable[..., torch.Tensor] | None = None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Of the rule's parameters."""
        return tuple(self.parameter_shapes(1))


@contextmanager
def kept_exact(parameters: Iterable[torch.nn.Parameter]):
    """Around a module's cast: a rule's own parameters stay in float32, for a rounded decay rate is another model."""
    kept = [(parameter, parameter.data) for parameter in parameters]
    yield
    for parameter, value in kept:
        if parameter.dtype != compute_dtype(parameter.dtype):
            parameter.data = value.to(device=parameter.device, dtype=torch.float32)
            parameter.grad = None


def differentiate_initial_state(recur: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]):
    """``initial_state_gradient`` of a rule that has no shorter way to it than the gradient of its recurrence."""

    def initial_state_gradient(q, k, do, cu_seqlens, gates, kernels):
        shape = (cu_seqlens.shape[0] - 1, *k.shape[1:], do.shape[2])
        state = torch.zeros(shape, dtype=compute_dtype(k.dtype), device=k.device, requires_grad=True)
        with torch.enable_grad():
            o, _ = recur(q, k, do, cu_seqlens, gates, state, False, kernels)
            return torch.autograd.grad(o, state, do)[0]

    return initial_state_gradient


_RULES: dict[str, MemoryRule] = {}


def register_rule(rule: MemoryRule) -> None:
    """Makes a rule available by its name; raises ValueError if the name is taken."""
    if rule.name in _RULES:
        raise ValueError(f"a memory rule named {rule.name!r} is already registered")
    _RULES[rule.name] = rule


def rule_names() -> list[str]:
    """Names of the registered rules."""
    return sorted(_RULES)


def get_rule(name: str) -> MemoryRule:
    """The rule of that name; raises ValueError that lists the registered ones."""
    if name not in _RULES:
        raise ValueError(f"unknown memory rule {name!r}: choose one of {', '.join(rule_names())}")
    return _RULES[name]
