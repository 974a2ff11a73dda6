"""A model's shape as Megatron's arguments and as a Hugging Face configuration (FLA's keys), both ways."""

from __future__ import annotations

from argparse import Namespace

import torch

from linear_moe.conversion.attention_arguments import arguments_of_attention, attention_from_arguments
from linear_moe.conversion.expert_arguments import arguments_of_experts, experts_from_arguments
from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.layers import LayerKinds, kinds_of_config
from linear_moe.conversion.names import Layout, rule_dimensions
from linear_moe.tokens import vocabulary_size
from mom_layers.hf.attention_config import LatentSpec
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.fields import FIELDS, shown
from mom_layers.recur.rules import get_rule

# Hugging Face key, Megatron argument: the same value under two names.
KEYS = tuple((field.name, field.megatron) for field in FIELDS if field.megatron)
# Keys without an argument of Megatron, with the value that means what a Megatron model computes.
COMPUTED = ("vocab_size", "aux_loss_scale", "attn", "moe", "num_nextn_predict_layers")
FIXED = {field.name: field.export for field in FIELDS if not field.megatron and field.name not in COMPUTED}
# Megatron arguments, and the values with which a model fits the format.
EXPORTABLE = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope", "none"),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "use_mup": (False,),
    "mtp_use_repeated_layer": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
}
TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Architectures that `linear_moe.conversion.transformer_folders` turns into models with memories."""
OLDER_TYPE = "mom_gated_deltanet"
OLDER_KEYS = {"num_experts": "num_memories", "single_expert": "single_kv_proj", "use_gate": "use_output_gate"}
"""Keys of OpenSparseLLMs/MoM, and what FLA calls them."""
OLDER_DEFAULTS = {
    "expand_v": 2, "num_heads": 6, "num_hidden_layers": 21, "num_experts": 8, "shared_mem": False, "norm_first": False,
    "single_expert": False, "use_gate": True,
}  # fmt: skip
"""Defaults there that are not FLA's."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SIZED_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer")
"""Megatron's tokenizers that take their size from ``--vocab-size``; the others ignore it."""


def config_from_arguments(args: Namespace, kinds: LayerKinds, vocab_size: int, token_ids: dict) -> dict:
    """The content of config.json for a model that Megatron trained.

    Args:
        args: those stored in its checkpoint.
        kinds: its layers.
        vocab_size: without padding.
        token_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
        ConversionError: the model has something that the format lacks, or no layers that the format has.
    """
    mixer = getattr(args, "token_mixer", None) or "attention"
    if (mixer != "attention") != bool(kinds.num_mom_layers):
        found = "has MoM layers" if kinds.num_mom_layers else "has no MoM layer"
        raise ConversionError(f"the checkpoint was written with --token-mixer {mixer}, and {found}: it is not whole")
    if hasattr(args, "mom_rule"):
        try:
            get_rule(args.mom_rule)
        except ValueError as error:
            raise ConversionError(f"the checkpoint has --mom-rule {args.mom_rule}: {error}") from None
    for name, accepted in EXPORTABLE.items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            raise ConversionError(
                f"the Hugging Face format cannot hold a model with --{name.replace('_', '-')} {value}: "
                f"it needs {' or '.join(map(str, accepted))}"
            )
    missing = [theirs for theirs in dict(KEYS).values() if not hasattr(args, theirs)]
    if mixer == "mom" and not hasattr(args, "mom_aux_loss_coeff"):
        missing.append("mom_aux_loss_coeff")
    if missing:
        raise ConversionError(f"the checkpoint's arguments lack {', '.join(missing)}")
    config = {"architectures": ["MomForCausalLM"], "model_type": "mom", "vocab_size": vocab_size}
    config |= {ours: getattr(args, theirs) for ours, theirs in KEYS} | FIXED
    config["num_hidden_layers"], config["num_nextn_predict_layers"] = kinds.num_layers, kinds.num_predictions
    coefficient = getattr(args, "mom_aux_loss_coeff", 0.0)
    config["aux_loss_scale"] = _short(coefficient * kinds.num_mom_layers / max(1, args.mom_topk))
    config["tie_word_embeddings"] = not args.untie_embeddings_and_output_weights
    config["attn"] = attention_from_arguments(args, kinds)
    config["moe"] = experts_from_arguments(args, kinds)
    return config | token_ids


def _short(coefficient: float) -> float:
    """Without the last digits, so that there and back again gives the number that a person wrote.

    The balancing loss of a balanced layer is 1 in Megatron, which adds up the layers', and k in the format, which
    takes their mean: coefficient x layers here is scale x k there.
    """
    return float(f"{coefficient:.12g}")


def arguments_from_config(config: MomConfig, kinds: LayerKinds | None = None) -> Namespace:
    """Megatron's arguments for a Hugging Face model: what ``--use-checkpoint-args`` and its checks read.

    Args:
        kinds: the model's layers, which say whether Megatron's model is a HybridModel; a GPT model where possible when
            None.

    Raises:
        ConversionError: the model has something that Megatron's lacks.
    """
    kinds = kinds or kinds_of_config(config)
    args = Namespace(**{theirs: getattr(config, ours) for ours, theirs in KEYS})
    args.mom_aux_loss_coeff = _short(config.aux_loss_scale * config.topk / max(1, kinds.num_mom_layers))
    args.ffn_hidden_size = config.mlp_size
    mixer = config.mom_backend if config.mixer_settings().alone else "mom"
    args.token_mixer = mixer if kinds.num_mom_layers else "attention"
    args.untie_embeddings_and_output_weights = not config.tie_word_embeddings
    args.vocab_size = config.vocab_size
    args.hf_config = {name: getattr(config, name) for name in ("vocab_size", *TOKEN_IDS)}
    args.seq_length = config.max_position_embeddings
    args.normalization, args.swiglu = "RMSNorm", True
    args.add_position_embedding = True
    args.add_bias_linear = args.squared_relu = args.apply_layernorm_1p = False
    args.use_rotary_position_embeddings = args.rotary_interleaved = args.apply_query_key_layer_scaling = False
    args.rotary_percent = 1.0
    args.attention_dropout = args.hidden_dropout = 0.0
    args.ckpt_format = "torch_dist"
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = args.expert_model_parallel_size = 1
    args.world_size = args.data_parallel_size = 1
    args.iteration = args.consumed_train_samples = args.skipped_train_samples = 0
    args.no_save_optim = args.no_save_rng = True
    args.mtp_num_layers = kinds.num_predictions or None
    args.hybrid_layer_pattern = None
    if kinds.hybrid:
        args.hybrid_layer_pattern, args.num_layers = kinds.pattern(), 2 * kinds.num_layers
    more = arguments_of_attention(config, kinds) | arguments_of_experts(config.moe_spec(), kinds)
    return Namespace(**(vars(args) | more))


def parse_config(content: dict, tensor_names: set[str]) -> MomConfig:
    """A configuration, of FLA or of this package; what an older one does not say is seen from the tensors' names.

    Raises:
        ConversionError: it is not a MoM model's, or has a value that no layer here can honour.
    """
    content = from_older_format(content)
    if content.get("model_type") != "mom":
        found = content.get("model_type")
        raise ConversionError(
            f"not a Mixture-of-Memories model: config.json has model_type {shown(found)}; convert_from_hf.py also "
            f"takes Transformers, {', '.join(TRANSFORMERS)}"
        )
    for key in ("dtype", "torch_dtype"):
        if content.get(key) not in (None, *DTYPES):
            raise ConversionError(f"config.json: {key} must be {', '.join(DTYPES)} or null, got {shown(content[key])}")
    own_projections = any(".attn.k_proj.0." in name for name in tensor_names)
    shared = any(".attn.shared_k." in name for name in tensor_names)
    seen = {"single_kv_proj": shared and not own_projections}
    if own_projections:
        seen["shared_mem"] = shared
    try:
        return MomConfig(**(seen | content))
    except ValueError as error:
        raise ConversionError(f"config.json: {error}") from error
    except Exception as error:  # transformers checks few of its own keys
        raise ConversionError(f"config.json cannot be used: {type(error).__name__}: {error}") from error


def from_older_format(content: dict) -> dict:
    """A configuration of OpenSparseLLMs' MoM repository (`model_type` mom_gated_deltanet) in FLA's keys; any other
    configuration as it is.

    The layers there keep at most ``capacity * T / topk`` tokens of a sequence in a memory, and the layers here all:
    where a memory gets more, outputs differ.
    """
    if content.get("model_type") != OLDER_TYPE:
        return content
    renamed = {OLDER_KEYS.get(key, key): value for key, value in (OLDER_DEFAULTS | content).items()}
    if renamed.pop("norm_first"):
        raise ConversionError("config.json: norm_first must be false, got true: the blocks' norms are in another place")
    return renamed | {"model_type": "mom"}


def layout_of(config: MomConfig, kinds: LayerKinds | None = None) -> Layout:
    """The counts and sizes of a model that decide its tensors' names and shapes.

    Args:
        kinds: the model's layers; a GPT model's where possible when None.
    """
    kinds = kinds or kinds_of_config(config)
    settings, moe = config.mixer_settings(), config.moe_spec()
    dims = {
        "hidden": config.hidden_size,
        "two_hidden": 2 * config.hidden_size,
        "vocabulary": config.vocab_size,
        "intermediate": config.mlp_size,
        "memories": config.num_memories,
        "heads": config.num_heads,
        "keys": settings.key_width,
        "values": settings.value_width,
        "value": settings.value_dim,
        "width": config.conv_size,
        "text_width": config.text_conv_size,
        "one": 1,
        **rule_dimensions(settings.update_rule, config.num_heads, config.head_dim, settings.value_dim),
    }
    options, groups = {"text_conv"} if settings.text_conv else set(), 1
    for spec in config.attention_specs():
        if spec.latent:
            dims |= _latent_dimensions(spec)
            options |= {"plain_query" if spec.q_lora_rank is None else "latent_query"}
            options |= {"latent_norm"} if spec.qk_norm else set()
            options |= {"query_latent_norm"} if spec.qk_norm and spec.q_lora_rank is not None else set()
        else:
            groups = spec.num_kv_heads
            dims |= {
                "head": spec.head_dim, "queries": spec.num_heads * spec.head_dim, "keys_values": groups * spec.head_dim,
            }  # fmt: skip
            options |= {name for name in ("qkv_bias", "qk_norm") if getattr(spec, name)}
    if moe is not None:
        shared = moe.shared_expert_intermediate_size
        dims |= {"experts": moe.num_experts, "expert": moe.intermediate_size, "shared_expert": shared}
        options |= {name for name in ("expert_bias", "shared_expert_gate") if getattr(moe, name)}
        options |= {"shared_expert"} if shared is not None else set()
    return Layout(
        dims=dims,
        num_layers=kinds.num_layers,
        mixers=kinds.mixers,
        mlps=kinds.mlps,
        num_memories=config.num_memories,
        shared_memory=config.shared_mem,
        single_kv_proj=config.single_kv_proj,
        tied=config.tie_word_embeddings,
        num_query_groups=groups,
        memory_rule=settings.rule,
        num_experts=0 if moe is None else moe.num_experts,
        options=frozenset(options),
        hybrid=kinds.hybrid,
    )


def _latent_dimensions(spec: LatentSpec) -> dict[str, int]:
    return {
        "latent": spec.kv_lora_rank,
        "query_latent": spec.q_lora_rank or 0,
        "latent_and_rope": spec.kv_lora_rank + spec.qk_rope_head_dim,
        "latent_queries": spec.num_heads * spec.key_dim,
        "latent_keys_values": spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim),
        "latent_values": spec.num_heads * spec.v_head_dim,
    }


def vocabulary(args: Namespace, rows: int, tokenizer) -> int:
    """Rows of an export's embedding: all that a token id can reach.

    Args:
        args: of the checkpoint.
        rows: of the checkpoint's embedding, padding included.
        tokenizer: of the export, or None.

    Raises ConversionError where the tokenizer has an id without a row.
    """
    known = vocabulary_size(tokenizer) if tokenizer is not None else 0
    if getattr(args, "hf_config", None):
        size = args.hf_config["vocab_size"]
    elif getattr(args, "tokenizer_type", None) in SIZED_TOKENIZERS and args.vocab_size:
        size = args.vocab_size
    else:
        size = known or rows
    if max(size, known) > rows or known > size:
        raise ConversionError(
            f"the tokenizer needs {max(size, known)} rows, one more than its largest id, and the checkpoint's "
            f"embedding has {min(rows, size)}: it was trained with another tokenizer"
        )
    return size


def token_ids(args: Namespace, tokenizer) -> dict[str, int | None]:
    """The special tokens' ids that configurations have, from the tokenizer or the model that was trained further.

    A padding token that is the end-of-sequence token is left out: the embedding of a model's padding token is not
    trained.
    """
    if tokenizer is None:
        ids = {name: (getattr(args, "hf_config", None) or {}).get(name) for name in TOKEN_IDS}
    else:
        ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    return ids | {"pad_token_id": None if ids["pad_token_id"] == ids["eos_token_id"] else ids["pad_token_id"]}


def generation_config(ids: dict[str, int | None]) -> dict:
    """The content of generation_config.json: padding falls back on the end token, so that batches work."""
    pad = ids["pad_token_id"] if ids["pad_token_id"] is not None else ids["eos_token_id"]
    pad = pad[0] if isinstance(pad, list) else pad
    return {key: value for key, value in (ids | {"pad_token_id": pad}).items() if value is not None}


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
