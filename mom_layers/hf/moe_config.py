"""The experts of a model's MLPs, as the configuration's `moe` entry describes them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mom_layers.hf.attention_config import parse_layers
from mom_layers.hf.fields import SIZE, TRUTH, Kind, number, shown, whole

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def _one_of(values: tuple[str, ...]) -> Kind:
    return Kind(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


@dataclass(frozen=True)
class MoeSpec:
    """Experts in the place of some layers' MLPs.

    Attributes:
        layers: their indices.
        num_experts: experts of a layer, without the shared expert.
        num_experts_per_tok: experts that a token goes to.
        intermediate_size: width of an expert.
        score_function: what turns the router's logits into scores.
        norm_topk_prob: the chosen experts' scores are divided by their sum.
        routed_scaling_factor: what the experts' weights are multiplied by.
        n_group, topk_group: a token chooses among the experts of topk_group of n_group groups; None for all experts.
        expert_bias: the choice, and not the weight, of experts adds a bias to the scores (arXiv 2408.15664).
        shared_expert_intermediate_size: width of the expert that every token goes to; None without such an expert.
        shared_expert_gate: the shared expert's output is multiplied by the sigmoid of a linear map of the token.
        balancing: the name of Megatron's balancing loss.
        aux_loss_scale: weight of the balancing loss of each layer, which is 1 when the experts are balanced.
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    score_function: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None
    expert_bias: bool = False
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    balancing: str = "aux_loss"
    aux_loss_scale: float = 0.0


KEYS = tuple(field.name for field in fields(MoeSpec))
NEEDED = ("layers", "num_experts", "num_experts_per_tok", "intermediate_size")
KINDS = {
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "intermediate_size": SIZE,
    "score_function": _one_of(SCORE_FUNCTIONS),
    "norm_topk_prob": TRUTH,
    "routed_scaling_factor": number(0, 1e6, above=True),
    "n_group": whole(1).or_none(),
    "topk_group": whole(1).or_none(),
    "expert_bias": TRUTH,
    "shared_expert_intermediate_size": SIZE.or_none(),
    "shared_expert_gate": TRUTH,
    "balancing": _one_of(BALANCING),
    "aux_loss_scale": number(0, 1e6),
}


def parse_moe(moe: dict | None, num_layers: int) -> MoeSpec | None:
    """Reads and checks the `moe` entry.

    Args:
        num_layers: those of the model, and the layers of multi-token prediction, which are numbered after them.

    Raises ValueError for an unknown key, a value of the wrong kind, numbers that do not fit together, or a layer that
    does not exist.
    """
    if moe is None:
        return None
    if not isinstance(moe, dict):
        raise ValueError(f"moe must be None or a dictionary, got {shown(moe)}")
    if unknown := sorted(map(str, moe.keys() - set(KEYS))):
        raise ValueError(f"moe has entries that are not supported: {', '.join(unknown)}; known are {', '.join(KEYS)}")
    if missing := [key for key in NEEDED if moe.get(key) is None]:
        raise ValueError(f"moe lacks {' and '.join(missing)}")
    for key, kind in KINDS.items():
        if key in moe and not kind.accepts(moe[key]):
            raise ValueError(f"moe's {key} must be {kind.words}, got {shown(moe[key])}")
    spec = MoeSpec(**(moe | {"layers": parse_layers(moe["layers"], num_layers, "moe's layers")}))
    if not spec.layers:
        raise ValueError("moe's layers are empty: leave moe out of a model without experts")
    if spec.num_experts_per_tok > spec.num_experts:
        raise ValueError(
            f"moe's num_experts_per_tok must be at most num_experts, got {spec.num_experts_per_tok} of "
            f"{spec.num_experts}"
        )
    _check_groups(spec)
    if spec.score_function != "softmax" and spec.num_experts_per_tok > 1 and not spec.norm_topk_prob:
        raise ValueError(f"moe's norm_topk_prob must be true with score_function {spec.score_function}")
    if spec.expert_bias and spec.score_function == "softmax":
        raise ValueError("moe's expert_bias needs the score_function sigmoid or sqrtsoftplus, got softmax")
    if spec.shared_expert_gate and spec.shared_expert_intermediate_size is None:
        raise ValueError("moe's shared_expert_gate needs a shared_expert_intermediate_size")
    return spec


def _check_groups(spec: MoeSpec) -> None:
    if (spec.n_group is None) != (spec.topk_group is None):
        raise ValueError(f"moe has n_group {spec.n_group} and topk_group {spec.topk_group}: give both or neither")
    if spec.n_group is None:
        return
    if spec.num_experts % spec.n_group:
        raise ValueError(f"moe's n_group must divide num_experts, got {spec.n_group} and {spec.num_experts}")
    if spec.topk_group > spec.n_group or spec.num_experts_per_tok % spec.topk_group:
        raise ValueError(
            f"moe's topk_group must be at most n_group and divide num_experts_per_tok, got {spec.topk_group}, "
            f"{spec.n_group} and {spec.num_experts_per_tok}"
        )
    of_a_group = spec.num_experts // spec.n_group
    if spec.num_experts_per_tok > spec.topk_group * of_a_group:
        raise ValueError(
            f"moe's num_experts_per_tok must be at most topk_group * num_experts / n_group, got "
            f"{spec.num_experts_per_tok} and {spec.topk_group * of_a_group}"
        )
