"""The experts of a model as Megatron's arguments and as the `moe` entry of a Hugging Face configuration, both ways."""

from __future__ import annotations

from argparse import Namespace

from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.layers import LayerKinds
from mom_layers.hf.moe_config import BALANCING, SCORE_FUNCTIONS, MoeSpec

KEYS = (
    ("num_experts", "num_experts", None),
    ("num_experts_per_tok", "moe_router_topk", 2),
    ("intermediate_size", "moe_ffn_hidden_size", None),
    ("score_function", "moe_router_score_function", "softmax"),
    ("n_group", "moe_router_num_groups", None),
    ("topk_group", "moe_router_group_topk", None),
    ("expert_bias", "moe_router_enable_expert_bias", False),
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", None),
    ("shared_expert_gate", "moe_shared_expert_gate", False),
)
"""Hugging Face key, Megatron argument, and Megatron's default: the same value under two names."""
EXPORTABLE = {
    "moe_router_score_function": SCORE_FUNCTIONS,
    "moe_expert_capacity_factor": (None,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_force_load_balancing": (False,),
}
"""Megatron arguments, and the values with which experts fit the format."""


def experts_from_arguments(args: Namespace, kinds: LayerKinds) -> dict | None:
    """The `moe` entry for a model that Megatron trained; None without experts.

    Raises ConversionError for experts that the format lacks.
    """
    layers = kinds.of("moe")
    if not layers:
        return None
    for name, accepted in EXPORTABLE.items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            raise ConversionError(
                f"the Hugging Face format cannot hold experts with --{name.replace('_', '-')} {value}: it needs "
                f"{' or '.join(map(str, accepted))}"
            )
    if not getattr(args, "num_experts", None):
        raise ConversionError("the checkpoint has experts, and the arguments stored with it have no --num-experts")
    entry = {"layers": layers} | {ours: getattr(args, theirs, default) for ours, theirs, default in KEYS}
    entry["intermediate_size"] = entry["intermediate_size"] or args.ffn_hidden_size
    many = entry["num_experts_per_tok"] > 1 or entry["score_function"] == "softmax"
    entry["norm_topk_prob"] = many and not getattr(args, "moe_router_pre_softmax", False)
    if entry["score_function"] != "softmax":
        entry["norm_topk_prob"] = entry["num_experts_per_tok"] > 1
    entry["routed_scaling_factor"] = getattr(args, "moe_router_topk_scaling_factor", None) or 1.0
    kind = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    coefficient = getattr(args, "moe_aux_loss_coeff", 0.0)
    if isinstance(kind, list):  # several losses, each with a coefficient
        chosen = dict(zip(kind, coefficient if isinstance(coefficient, list) else [coefficient], strict=False))
        kind, coefficient = next(iter(chosen.items()))
    if kind not in BALANCING:
        raise ConversionError(
            f"the Hugging Face format cannot hold experts with --moe-router-load-balancing-type {kind}: it needs "
            f"{' or '.join(BALANCING)}"
        )
    coefficient = coefficient[0] if isinstance(coefficient, list) else coefficient
    return entry | {"balancing": kind, "aux_loss_scale": float(coefficient or 0.0)}


def arguments_of_experts(spec: MoeSpec | None, kinds: LayerKinds) -> dict[str, object]:
    """Megatron's arguments for the experts of a Hugging Face model; without experts, that there are none."""
    if spec is None:
        return {"num_experts": None, "moe_layer_freq": 1}
    decoder = kinds.mlps[: kinds.num_layers]
    frequency = 1 if kinds.hybrid or set(decoder) == {"moe"} else [int(mlp == "moe") for mlp in decoder]
    return {theirs: getattr(spec, ours) for ours, theirs, _ in KEYS} | {
        "moe_layer_freq": frequency,
        "moe_router_pre_softmax": spec.score_function == "softmax" and not spec.norm_topk_prob,
        "moe_router_topk_scaling_factor": None if spec.routed_scaling_factor == 1.0 else spec.routed_scaling_factor,
        "moe_router_load_balancing_type": spec.balancing,
        "moe_aux_loss_coeff": spec.aux_loss_scale,
        "moe_token_dispatcher_type": "alltoall",
    }


def expert_options(args: Namespace) -> list[str]:
    """The options of the experts that ``--use-checkpoint-args`` does not restore."""
    if not args.num_experts:
        return []
    options = [
        f"--moe-router-load-balancing-type {args.moe_router_load_balancing_type}",
        f"--moe-aux-loss-coeff {args.moe_aux_loss_coeff:g}",
    ]
    options += ["--moe-shared-expert-gate"] if args.moe_shared_expert_gate else []
    if args.moe_router_num_groups is not None:
        options.append(f"--moe-router-num-groups {args.moe_router_num_groups}")
        options.append(f"--moe-router-group-topk {args.moe_router_group_topk}")
    return options
