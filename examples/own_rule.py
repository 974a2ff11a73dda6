"""A memory update rule of your own, from its equation to a trained model: this file is all of it.

    python examples/own_rule.py pretrain --token-mixer leaky <the arguments of linear-moe pretrain>
    python examples/own_rule.py convert-to-hf --load CHECKPOINTS --save FOLDER

The program has every command of linear-moe, which so know the rule.

The rule: a state that forgets at a rate that each token chooses, S <- (1 - f) S + f k v^T with f = sigmoid(x Wf + b).
"""

import sys

import torch

from mom_layers import RawGate, register_rule, rule_from_equation


def step(state, k, v, gates):
    """[N, H, K, V], [N, H, K], [N, H, V], {"f": [N, H]} -> the new state, of N sequences at once."""
    f = gates["f"][..., None, None]
    return (1 - f) * state + f * torch.einsum("nhk,nhv->nhkv", k, v)


def gates(raw, parameters):
    """The projected numbers [R, H] and the rule's parameters [H] to what ``step`` takes, [R, H]."""
    return {"f": torch.sigmoid(raw["f"].float() + parameters["f_bias"])}


register_rule(
    rule_from_equation(
        "leaky",
        step,
        gates=gates,
        raw_gates=(RawGate("f", columns=1, hf="f"),),
        parameter_shapes=lambda head_dim: {"f_bias": ()},
        init_parameters=lambda num_heads, head_dim: {"f_bias": torch.linspace(-4.0, 0.0, num_heads)},
    )
)

if __name__ == "__main__":
    from linear_moe.cli import main

    sys.exit(main())
