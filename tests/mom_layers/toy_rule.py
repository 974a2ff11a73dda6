"""A rule that says everything that a rule may say, in plain PyTorch: the rules of the papers need each part.

Keys that all heads share (Mamba2), made longer by a feature map (Taylor); a parameter that the recurrence reads
(RWKV6); two states side by side, and outputs that are not linear in them (normalised attention).
"""

import torch

from mom_layers.common.reference import bounds
from mom_layers.recur.rules import MemoryRule, RawGate, RuleInputs


def feature_map(x):
    """x and its squares, all positive."""
    return torch.cat([x.sigmoid(), x * x], dim=-1)


def prepare(q, k, v, raw, parameters, kernels):
    heads = v.shape[1]
    q, k = (feature_map(x).expand(-1, heads, -1) for x in (q, k))
    return RuleInputs(q, k, v, {"g": -raw["decay"].sigmoid(), "bonus": parameters["bonus"]})


def recur(inputs, cu_seqlens, initial_state, output_final_state, kernels):
    """[S | z] <- exp(g) [S | z] + k [v | 1]^T;  o = (q^T S + (bonus q^T k) v) / (q^T z + 1)."""
    q, k, v, gates = inputs.q, inputs.k, inputs.v, inputs.gates
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(*v.shape[1:2], k.shape[2], v.shape[2] + 1)
        state = state if initial_state is None else initial_state[segment]
        for t in range(first, last):
            values = torch.cat([v[t], torch.ones_like(v[t, :, :1])], dim=-1)
            state = gates["g"][t].exp()[:, None, None] * state + k[t][:, :, None] * values[:, None]
            read = torch.einsum("hk,hkv->hv", q[t], state)
            seen = (gates["bonus"] * (q[t] * k[t]).sum(-1))[:, None] * v[t]
            out.append((read[:, :-1] + seen) / (read[:, -1:] + 1))
        states.append(state)
    o = torch.stack(out) if out else torch.zeros_like(v)
    return o, torch.stack(states) if output_final_state else None


def transition(inputs, cu_seqlens, kernels):
    decays = [inputs.gates["g"][first:last].sum(0).exp() for first, last in bounds(cu_seqlens)]
    return torch.stack(decays)[..., None].expand(-1, -1, inputs.k.shape[2])


RULE = MemoryRule(
    name="everything",
    raw_gates=(RawGate("decay", columns=1, hf="f"),),
    parameter_shapes=lambda head_dim: {"bonus": ()},
    init_parameters=lambda num_heads, head_dim: {"bonus": torch.linspace(0.5, 1.5, num_heads)},
    prepare=prepare,
    recur=recur,
    transition=transition,
    reference=lambda q, k, v, raw, parameters, ends, state=None: recur(
        prepare(q, k, v, raw, parameters, "torch"), ends, state, True, "torch"
    ),
    recurrence_flops=lambda rows, heads, k_dim, v_dim: 8.0 * rows * heads * k_dim * v_dim,
    diagonal_transition=True,
    unit_length_keys=False,
    head_sizes=(),
    key_heads=1,
    state_shape=lambda k_dim, v_dim: (k_dim, v_dim + 1),
    linear_in_state=False,
)
