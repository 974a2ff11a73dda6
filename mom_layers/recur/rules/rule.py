"""What a memory update rule is.

A rule says which raw gates a memory projects from a token, which parameters a head has, how the recurrence's inputs
follow from both, and the recurrence itself. Routing, projection, convolution and mixing are the same for every rule.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mom_layers.common.kernel_choice import compute_dtype


@dataclass(frozen=True)
class RawGate:
    """Columns that every memory projects from a token beside its key and value.

    Attributes:
        name: the name by which the rule reads the columns.
        columns: columns of one head; "key" for as many as a key has, "value" for as many as a value has.
        hf: the projection's letter in Hugging Face names: ``{hf}_proj.{memory}.weight`` and ``shared_{hf}.weight``.
    """

    name: str
    columns: int | str
    hf: str

    def width(self, k_dim: int, v_dim: int) -> int:
        """Columns of one head with keys of size K and values of size V."""
        return {"key": k_dim, "value": v_dim}.get(self.columns, self.columns)


@dataclass(frozen=True)
class RuleInputs:
    """What a recurrence reads, row by row.

    Attributes:
        q, k: [R, H, K'], where a feature map may have made K' longer than the projected key.
        v: [R, H, V].
        gates: all other inputs of the recurrence, by name: gates [R, H, ...], and parameters of the rule.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Mapping[str, torch.Tensor]


def key_by_value(k_dim: int, v_dim: int) -> tuple[int, ...]:
    """The state of most rules: a matrix, from which a query reads a value."""
    return k_dim, v_dim


@dataclass(frozen=True)
class MemoryRule:
    """One row of the MoM paper's table of update rules (arXiv 2502.13685, table 1).

    Attributes:
        name: how a user names the rule.
        raw_gates: the columns that a memory projects beside key and value, in the order of the fused projection.
        parameter_shapes: key size K -> {name: shape of a head's part}; the rule's parameters are [H, *shape].
        init_parameters: (H, K) -> {name: float32 [H, *shape] tensor}, drawn with torch's global generator on the CPU.
        prepare: (q, k [R, key heads, K], v [R, H, V] after the convolutions, {name: raw gate [R, H * columns]},
            {name: parameter [H, *shape]}, kernels) -> :class:`RuleInputs`. Here a rule makes keys from a gate, repeats
            keys that heads share, applies a feature map, or hands a parameter to the recurrence.
        recur: (inputs, cu_seqlens [S + 1], initial state or None, whether to return the final state, kernels) ->
            (o [R, H, V], final state [S, H, *state shape] or None).
        transition: (inputs, cu_seqlens, kernels) -> what a segment multiplies its initial state by, in float32 (float64
            for float64 inputs): [S, H, K', K'], or [S, H, K'] where ``diagonal_transition`` says so.
        reference: (q, k, v, raw gates, parameters, cu_seqlens, initial state or None) -> (o, final states): the plain
            loop over tokens, from the arguments of ``prepare`` but with q and k before they are brought to unit length.
            Every faster path is compared with this loop.
        recurrence_flops: (rows, H, K, V) -> floating-point operations of a forward pass, for the utilisation (MFU).
        diagonal_transition: the transition is a diagonal matrix.
        unit_length_keys: the convolutions bring q and k to unit length per head.
        head_sizes: value sizes that the Triton kernels take, and key sizes too where ``key_sizes`` is None.
        key_sizes: key sizes that the Triton kernels take, where a feature map makes keys longer.
        fixed_parameters: names of parameters that are set and not trained.
        layer_parameters: (H, K, number of the layer from 0, number of layers) -> as ``init_parameters``, where the
            parameters depend on the layer; None elsewhere.
        key_heads: heads of q and k, where the value heads share keys; None where every value head has its own key.
        state_shape: (K, V) -> shape of a head's state. A rule with several state tensors lays them side by side.
        linear_in_state: the outputs are linear in the initial state; then the initial state's gradient needs no values.
        initial_state_gradient: (inputs, gradient of o, cu_seqlens, initial state, kernels) -> the gradient of the
            initial state through the outputs alone. ``inputs.v`` and the initial state are None where
            ``linear_in_state``. None differentiates ``recur``.
        check_slices: (K, V, slices of a sequence) -> None; raises ValueError where context parallelism over that many
            slices cannot compose the states. None for a rule with which any number of slices can.
        cost_without_kernels: what a recurrence that PyTorch computes on every device costs, in words, for the warning
            that a layer of such a rule gives; None where Triton kernels compute the recurrence.
        decode_step: the arguments and the result of :func:`mom_layers.decode.operation.decode_step`; None where a
            step of one token takes the general path.
        family: the kernel family that computes the recurrence, a folder of `mom_layers.recur`. The self-test checks
            the kernels of a family with one of its rules. Empty for a rule that shares its kernels with no other.
    """

    name: str
    raw_gates: tuple[RawGate, ...]
    parameter_shapes: Callable[[int], dict[str, tuple[int, ...]]]
    init_parameters: Callable[[int, int], dict[str, torch.Tensor]]
    prepare: Callable[..., RuleInputs]
    recur: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    transition: Callable[..., torch.Tensor]
    reference: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    recurrence_flops: Callable[[int, int, int, int], float]
    diagonal_transition: bool
    unit_length_keys: bool
    head_sizes: tuple[int, ...]
    key_heads: int | None = None
    state_shape: Callable[[int, int], tuple[int, ...]] = key_by_value
    linear_in_state: bool = True
    initial_state_gradient: Callable[..., torch.Tensor] | None = None
    check_slices: Callable[[int, int, int], None] | None = None
    cost_without_kernels: str | None = None
    decode_step: Callable[..., torch.Tensor] | None = None
    family: str = ""
    key_sizes: tuple[int, ...] | None = None
    fixed_parameters: tuple[str, ...] = ()
    layer_parameters: Callable[[int, int, int, int], dict[str, torch.Tensor]] | None = None

    def kernel_sizes(self, of_keys: bool) -> tuple[int, ...]:
        """Key sizes, or value sizes, that the Triton kernels take."""
        return self.key_sizes if of_keys and self.key_sizes is not None else self.head_sizes

    def has_kernels(self, k_dim: int, v_dim: int) -> bool:
        """Whether the Triton kernels take a key size and a value size."""
        return k_dim in self.kernel_sizes(True) and v_dim in self.kernel_sizes(False)

    def parameters_of_layer(self, num_heads: int, head_dim: int, layer: int, num_layers: int):
        """Initial parameters of layer number ``layer`` of ``num_layers``, as ``init_parameters`` returns them."""
        if self.layer_parameters is None:
            return self.init_parameters(num_heads, head_dim)
        return self.layer_parameters(num_heads, head_dim, layer, num_layers)

    @property
    def gate_widths(self) -> dict[str, int | str]:
        """Columns of a head as the rule declares them, by the name of the raw gate."""
        return {gate.name: gate.columns for gate in self.raw_gates}

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the rule's own parameters."""
        return tuple(self.parameter_shapes(1))

    def num_key_heads(self, num_heads: int) -> int:
        """Heads of q and k in a layer of ``num_heads`` value heads."""
        return num_heads if self.key_heads is None else self.key_heads

    def projection_sizes(self, num_heads: int, head_dim: int, value_dim: int) -> list[int]:
        """Widths of the pieces of a memory's fused projection: keys, values, then every raw gate."""
        keys = self.num_key_heads(num_heads) * head_dim
        widths = (gate.width(head_dim, value_dim) for gate in self.raw_gates)
        return [keys, num_heads * value_dim, *(num_heads * width for width in widths)]

    def gradient_of_initial_state(self, inputs, do, cu_seqlens, initial_state, kernels) -> torch.Tensor:
        """The initial state's gradient [S, H, *state shape] through the outputs, whose gradient is ``do`` [R, H, V].

        Args:
            inputs: ``inputs.v`` may be None where ``linear_in_state``.
            initial_state: [S, H, *state shape]; None where ``linear_in_state``.
        """
        if self.initial_state_gradient is not None:
            return self.initial_state_gradient(inputs, do, cu_seqlens, initial_state, kernels)
        if inputs.v is None:
            inputs = RuleInputs(inputs.q, inputs.k, torch.zeros_like(do), inputs.gates)
        if initial_state is None:
            heads, v_dim = do.shape[1:]
            shape = (cu_seqlens.shape[0] - 1, heads, *self.state_shape(inputs.k.shape[2], v_dim))
            initial_state = torch.zeros(shape, dtype=compute_dtype(do.dtype), device=do.device)
        with torch.enable_grad():
            state = initial_state.detach().requires_grad_()
            o, _ = self.recur(inputs, cu_seqlens, state, False, kernels)
            return torch.autograd.grad(o, state, do)[0]


def dense_transition(recur: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]):
    """``transition`` of a rule with a K x K transition: the final state from an identity, with values of zero."""

    def transition(inputs: RuleInputs, cu_seqlens, kernels):
        segments, (_, heads, k_dim) = cu_seqlens.shape[0] - 1, inputs.k.shape
        identity = torch.eye(k_dim, dtype=compute_dtype(inputs.k.dtype), device=inputs.k.device)
        no_values = RuleInputs(inputs.k, inputs.k, torch.zeros_like(inputs.k), inputs.gates)
        return recur(no_values, cu_seqlens, identity.expand(segments, heads, k_dim, k_dim), True, kernels)[1]

    return transition


def warn_without_kernels(rule: MemoryRule) -> None:
    """Warns of what a rule without kernels costs, once a process for each rule."""
    if rule.cost_without_kernels is not None and rule.name not in _WARNED:
        _WARNED.add(rule.name)
        warnings.warn(f"the update rule {rule.name} has no kernels: {rule.cost_without_kernels}", stacklevel=3)


_WARNED: set[str] = set()


@contextmanager
def kept_exact(parameters: Iterable[torch.nn.Parameter]):
    """Around a module's cast: keeps a rule's own parameters in float32, as a rounded decay rate makes another model."""
    kept = [(parameter, parameter.data) for parameter in parameters]
    yield
    for parameter, value in kept:
        if parameter.dtype != compute_dtype(parameter.dtype):
            parameter.data = value.to(device=parameter.device, dtype=torch.float32)
            parameter.grad = None
