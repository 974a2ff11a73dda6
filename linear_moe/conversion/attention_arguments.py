"""The softmax layers of a model as Megatron's arguments and as the `attn` entry of a Hugging Face configuration."""

from __future__ import annotations

from argparse import Namespace

from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.layers import LayerKinds
from mom_layers.hf.attention_config import AttentionSpec, LatentSpec
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.rotary import RopeScaling, scaling_entry

EXPORTABLE = {
    "position_embedding_type": ("rope", "none"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "window_attn_skip_freq": (None,),
}
"""Megatron arguments, and the values with which softmax layers fit the format."""
LATENT_KEYS = (
    ("num_heads", "num_attention_heads"),
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    ("v_head_dim", "v_head_dim"),
    ("qk_norm", "qk_layernorm"),
)
YARN_KEYS = (
    ("factor", "rotary_scaling_factor"),
    ("original_max_position_embeddings", "original_max_position_embeddings"),
    ("beta_fast", "beta_fast"),
    ("beta_slow", "beta_slow"),
    ("mscale", "mscale"),
    ("mscale_all_dim", "mscale_all_dim"),
)
"""Hugging Face key, Megatron argument: the same value under two names."""
LATENT_DEFAULTS = {
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128,
    "qk_layernorm": False, "rope_type": "yarn", "rotary_scaling_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.0,
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What --use-rope-scaling has beside the factor; Megatron has no arguments for these."""
YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""What multi-latent attention scales the rotary embedding with; Megatron has no arguments for these."""
FLA_ROTARY_BASE = 10000.0


def attention_from_arguments(args: Namespace, kinds: LayerKinds) -> dict | list | None:
    """The `attn` entry for a model that Megatron trained; None without softmax layers.

    Raises ConversionError for softmax layers that the format lacks.
    """
    plain, latent = kinds.of("attention"), kinds.of("latent")
    if plain or latent:
        for name, accepted in EXPORTABLE.items():
            value = getattr(args, name, accepted[0])
            if value not in accepted:
                raise ConversionError(
                    f"the Hugging Face format cannot hold softmax layers with --{name.replace('_', '-')} {value}: "
                    f"they need {' or '.join(map(str, accepted))}"
                )
    entries = [_plain_entry(args, kinds)] if plain else []
    entries += [_latent_entry(args, latent)] if latent else []
    return entries if len(entries) > 1 else next(iter(entries), None)


def _plain_entry(args: Namespace, kinds: LayerKinds) -> dict:
    heads = args.num_attention_heads
    entry = {
        "layers": kinds.of("attention"),
        "num_heads": heads,
        "num_kv_heads": args.num_query_groups if args.group_query_attention else heads,
        "qkv_bias": bool(getattr(args, "add_qkv_bias", False)),
        "rope_theta": float(args.rotary_base),
        "window_size": None,
    }
    # Beside multi-latent attention Megatron makes no rotary embedding for the other softmax layers.
    if getattr(args, "multi_latent_attention", False) or getattr(args, "position_embedding_type", "rope") == "none":
        entry["rope_theta"] = None
    # Further keys only where they say something: FLA does not have them.
    if args.kv_channels * heads != args.hidden_size:
        entry["head_dim"] = args.kv_channels
    if getattr(args, "qk_layernorm", False):
        entry["qk_norm"] = True
    if getattr(args, "use_rope_scaling", False) and entry["rope_theta"] is not None and not kinds.hybrid:
        factor = float(getattr(args, "rope_scaling_factor", 8.0))
        entry["rope_scaling"] = {"rope_type": "llama3", "factor": factor} | LLAMA3
    window = getattr(args, "window_size", None)
    if window is not None:
        left, right = window  # -1 stands for all
        if right != 0:
            raise ConversionError(f"only windows of past tokens can be converted, not --window-size {left} {right}")
        entry["window_size"] = None if left < 0 else left + 1
    return entry


def _latent_entry(args: Namespace, layers: list[int]) -> dict:
    def get(name: str):
        return getattr(args, name, LATENT_DEFAULTS.get(name))

    entry = {"layers": layers} | {ours: get(theirs) for ours, theirs in LATENT_KEYS}
    entry["rope_theta"] = float(args.rotary_base)
    kind = get("rope_type") or "yarn"
    if kind == "yarn" and get("rotary_scaling_factor") != 1.0:
        entry["rope_scaling"] = {"rope_type": "yarn"} | {ours: get(theirs) for ours, theirs in YARN_KEYS}
    elif kind == "rope" and get("mscale_all_dim") and get("rotary_scaling_factor") > 1:
        raise ConversionError(
            f"the Hugging Face format cannot hold --rope-type rope with --mscale-all-dim {get('mscale_all_dim')}: it "
            "needs --rope-type yarn or --mscale-all-dim 0"
        )
    return entry


def arguments_of_attention(config: MomConfig, kinds: LayerKinds) -> dict[str, object]:
    """Megatron's arguments for the softmax layers of a Hugging Face model.

    Raises ConversionError for layers that Megatron lacks.
    """
    specs = config.attention_specs()
    latent = [spec for spec in specs if spec.latent]
    plain = [spec for spec in specs if not spec.latent]
    for found in (latent, plain):
        if len({_without_layers(spec) for spec in found}) > 1:
            raise ConversionError(f"Megatron has one kind of softmax layers, this model {len(found)}: {config.attn}")
    if latent and plain:
        _check_together(latent[0], plain[0])
    # A model without softmax layers needs numbers all the same; Megatron divides them by the tensor-parallel size.
    heads = config.num_heads
    width = config.hidden_size // heads
    first = plain[0] if plain else AttentionSpec((), heads, heads, width, rope_theta=FLA_ROTARY_BASE)
    if latent and not plain:
        count = latent[0].num_heads
        first = AttentionSpec((), count, count, max(1, config.hidden_size // count), rope_theta=latent[0].rope_theta)
    theta = latent[0].rope_theta if latent else first.rope_theta
    arguments = {
        "num_attention_heads": first.num_heads,
        "num_query_groups": first.num_kv_heads,
        "group_query_attention": first.num_kv_heads != first.num_heads,
        "kv_channels": first.head_dim,
        "add_qkv_bias": first.qkv_bias,
        "qk_layernorm": latent[0].qk_norm if latent else first.qk_norm,
        "position_embedding_type": "none" if first.rope_theta is None and not latent else "rope",
        "rotary_base": _short(FLA_ROTARY_BASE if theta is None else theta),
        "window_size": None if first.window_size is None else (first.window_size - 1, 0),
        "multi_latent_attention": bool(latent),
        "use_rope_scaling": first.rope_scaling is not None,
        "linear_attention_freq": None if kinds.hybrid else _frequency(kinds),
    }
    if first.rope_scaling is not None:
        _check_llama3(first.rope_scaling, kinds)
        arguments["rope_scaling_factor"] = first.rope_scaling.factor
    if latent:
        arguments |= _latent_arguments(latent[0])
    return arguments


def _without_layers(spec: AttentionSpec | LatentSpec) -> tuple:
    return tuple(value for name, value in vars(spec).items() if name != "layers")


def _check_together(latent: LatentSpec, plain: AttentionSpec) -> None:
    """Raises ConversionError for two kinds of softmax layers that one HybridModel of Megatron cannot have."""
    if plain.rope_theta is not None:
        raise ConversionError(
            "Megatron gives softmax layers beside multi-latent attention no positions: attn's rope_theta must be null, "
            f"got {plain.rope_theta:g}"
        )
    for name in ("num_heads", "qk_norm"):
        if getattr(latent, name) != getattr(plain, name):
            raise ConversionError(
                f"Megatron has one value of {name} for all softmax layers, this model {getattr(plain, name)} and "
                f"{getattr(latent, name)}"
            )


def _check_llama3(scaling: RopeScaling, kinds: LayerKinds) -> None:
    if kinds.hybrid:
        raise ConversionError(
            "Megatron's HybridModel does not scale the rotary embedding, and this model has rope_scaling: leave out "
            "--hybrid"
        )
    found = scaling_entry(scaling)
    if scaling.rope_type != "llama3" or {key: found[key] for key in LLAMA3} != LLAMA3:
        raise ConversionError(
            "Megatron's softmax layers scale the rotary embedding as Llama 3.1 does, with "
            + ", ".join(f"{key} {value:g}" for key, value in LLAMA3.items())
            + f"; this model has {found}: make every softmax layer a MoM layer, or leave out rope_scaling"
        )


def _latent_arguments(spec: LatentSpec) -> dict[str, object]:
    if spec.qk_norm and spec.q_lora_rank is None:
        raise ConversionError(
            "Megatron has the norm of latent keys only together with latent queries: attn has qk_norm true and no "
            "q_lora_rank"
        )
    arguments = {theirs: getattr(spec, ours) for ours, theirs in LATENT_KEYS}
    scaling = spec.rope_scaling
    if scaling is None:
        return arguments | {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    if scaling.rope_type != "yarn":
        raise ConversionError(f"Megatron's multi-latent attention has rope_type yarn, this model {scaling.rope_type}")
    for ours, value in YARN.items():
        if getattr(scaling, ours) != value:
            raise ConversionError(
                f"Megatron has no argument for rope_scaling's {ours}, which is {value:g} there: this model has "
                f"{getattr(scaling, ours):g}"
            )
    return arguments | {"rope_type": "yarn"} | {theirs: getattr(scaling, ours) for ours, theirs in YARN_KEYS}


def _short(theta: float) -> float | int:
    return int(theta) if theta == int(theta) else theta


def _frequency(kinds: LayerKinds) -> list[int] | int | None:
    """The token mixers (1 = MoM, 0 = softmax attention) as a user of Megatron says it: every N-th layer where it is
    so. None for MoM in every layer, and for softmax attention in every layer, which is no model with memories."""
    pattern = [int(mixer == "mom") for mixer in kinds.mixers[: kinds.num_layers]]
    if len(set(pattern)) == 1:
        return None
    every = pattern.index(0) + 1
    regular = every > 1 and pattern == [int((layer + 1) % every != 0) for layer in range(len(pattern))]
    return every if regular else pattern


def attention_options(args: Namespace) -> list[str]:
    """The options of softmax layers that ``--use-checkpoint-args`` does not restore."""
    options = []
    if args.window_size is not None:
        options.append(f"--window-size {args.window_size[0]},{args.window_size[1]}")
    options += ["--qk-layernorm"] if args.qk_layernorm else []
    if args.use_rope_scaling:
        options.append(f"--use-rope-scaling --rope-scaling-factor {args.rope_scaling_factor:g}")
    if args.multi_latent_attention:
        options.append("--multi-latent-attention")
        names = [theirs for _, theirs in LATENT_KEYS if theirs not in ("num_attention_heads", "qk_layernorm")]
        names += ["rope_type", "rotary_scaling_factor", "mscale_all_dim"]
        names += ["mscale"] if args.rope_type == "yarn" else []
        values = {name: getattr(args, name) for name in names}
        options += [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None]
    return options
