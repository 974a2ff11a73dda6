"""A model's shape as Megatron's arguments and as a Hugging Face configuration (FLA's keys), both ways."""

from __future__ import annotations

from argparse import Namespace

import torch

from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.names import Layout, rule_dimensions
from linear_moe.tokens import vocabulary_size
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.fields import FIELDS, shown
from mom_layers.recur.rules import rule_names

# Hugging Face key, Megatron argument: the same value under two names.
KEYS = tuple((field.name, field.megatron) for field in FIELDS if field.megatron)
# Keys without an argument of Megatron, with the value that means what a Megatron model computes.
COMPUTED = ("vocab_size", "aux_loss_scale", "attn")
FIXED = {field.name: field.export for field in FIELDS if not field.megatron and field.name not in COMPUTED}
# Megatron arguments, and the values with which a model fits the format.
EXPORTABLE = {
    "mom_rule": tuple(rule_names()),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope", "none"),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "use_mup": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
}
EXPORTABLE_ATTENTION = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "window_attn_skip_freq": (None,),
}
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
FLA_ROTARY_BASE = 10000.0


def config_from_arguments(args: Namespace, attention_layers: list[int], vocab_size: int, token_ids: dict) -> dict:
    """The content of config.json for a model that Megatron trained.

    Args:
        args: those stored in its checkpoint.
        attention_layers: indices of its softmax layers.
        vocab_size: without padding.
        token_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
        ConversionError: the model is not MoM, or has something that the format lacks.
    """
    mixer = getattr(args, "token_mixer", "attention")
    if mixer not in ("mom", *rule_names()):
        raise ConversionError(f"not a Mixture-of-Memories checkpoint: it was written with --token-mixer {mixer}")
    for name, accepted in (EXPORTABLE | (EXPORTABLE_ATTENTION if attention_layers else {})).items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            raise ConversionError(
                f"the Hugging Face format cannot hold a model with --{name.replace('_', '-')} {value}: "
                f"it needs {' or '.join(map(str, accepted))}"
            )
    missing = [theirs for theirs in (*dict(KEYS).values(), "mom_aux_loss_coeff") if not hasattr(args, theirs)]
    if missing:
        raise ConversionError(f"the checkpoint's arguments lack {', '.join(missing)}")
    config = {"architectures": ["MomForCausalLM"], "model_type": "mom", "vocab_size": vocab_size}
    config |= {ours: getattr(args, theirs) for ours, theirs in KEYS} | FIXED
    layers = args.num_layers - len(attention_layers)
    config["aux_loss_scale"] = _short(args.mom_aux_loss_coeff * layers / max(1, args.mom_topk))
    config["tie_word_embeddings"] = not args.untie_embeddings_and_output_weights
    config["attn"] = _attention_config(args, attention_layers) if attention_layers else None
    return config | token_ids


def _short(coefficient: float) -> float:
    """Without the last digits, so that there and back again gives the number that a person wrote.

    The balancing loss of a balanced layer is 1 in Megatron, which adds up the layers', and k in the format, which
    takes their mean: coefficient x layers here is scale x k there.
    """
    return float(f"{coefficient:.12g}")


def _attention_config(args: Namespace, layers: list[int]) -> dict:
    heads = args.num_attention_heads
    if args.kv_channels * heads != args.hidden_size:
        raise ConversionError(
            f"the Hugging Face format has softmax heads of hidden size / heads = {args.hidden_size} / {heads}: "
            f"--kv-channels {args.kv_channels} does not fit"
        )
    config = {
        "layers": layers,
        "num_heads": heads,
        "num_kv_heads": args.num_query_groups if args.group_query_attention else heads,
        "qkv_bias": False,
        "rope_theta": float(args.rotary_base),
        "window_size": None,
    }
    window = getattr(args, "window_size", None)
    if window is not None:
        left, right = window  # -1 stands for all
        if right != 0:
            raise ConversionError(f"only windows of past tokens can be converted, not --window-size {left} {right}")
        config["window_size"] = None if left < 0 else left + 1
    return config


def arguments_from_config(config: MomConfig) -> Namespace:
    """Megatron's arguments for a Hugging Face model: what ``--use-checkpoint-args`` and its checks read.

    Raises:
        ConversionError: the model has something that Megatron's lacks.
    """
    args = Namespace(**{theirs: getattr(config, ours) for ours, theirs in KEYS})
    layers = config.num_hidden_layers - sum(len(spec.layers) for spec in config.attention_specs())
    args.mom_aux_loss_coeff = _short(config.aux_loss_scale * config.topk / max(1, layers))
    args.ffn_hidden_size = config.mlp_size
    args.token_mixer = config.mom_backend if config.mixer_settings().alone else "mom"
    args.untie_embeddings_and_output_weights = not config.tie_word_embeddings
    args.vocab_size = config.vocab_size
    args.hf_config = {name: getattr(config, name) for name in ("vocab_size", *TOKEN_IDS)}
    args.seq_length = config.max_position_embeddings
    args.normalization, args.swiglu, args.position_embedding_type = "RMSNorm", True, "rope"
    args.add_position_embedding = True
    args.add_bias_linear = args.add_qkv_bias = args.squared_relu = args.apply_layernorm_1p = False
    args.use_rotary_position_embeddings = args.rotary_interleaved = args.apply_query_key_layer_scaling = False
    args.rotary_percent = 1.0
    args.attention_dropout = args.hidden_dropout = 0.0
    args.ckpt_format = "torch_dist"
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = args.expert_model_parallel_size = 1
    args.world_size = args.data_parallel_size = 1
    args.iteration = args.consumed_train_samples = args.skipped_train_samples = 0
    args.no_save_optim = args.no_save_rng = True
    _attention_arguments(args, config)
    return args


def _attention_arguments(args: Namespace, config: MomConfig) -> None:
    specs = config.attention_specs()
    kinds = {(s.num_heads, s.num_kv_heads, s.qkv_bias, s.window_size, s.rope_theta) for s in specs}
    if len(kinds) > 1:
        raise ConversionError(f"Megatron has one kind of softmax layers, this model {len(kinds)}: {config.attn}")
    if any(spec.qkv_bias for spec in specs):
        raise ConversionError("qkv_bias is not supported: FLA's MoM has no such parameters")
    # A model without softmax layers needs a number all the same; Megatron divides it by the tensor-parallel size.
    heads, groups, _, window, theta = (
        next(iter(kinds)) if kinds else (config.num_heads, config.num_heads, False, None, FLA_ROTARY_BASE)
    )
    args.num_attention_heads, args.num_query_groups = heads, groups
    args.group_query_attention = groups != heads
    args.kv_channels = config.hidden_size // heads
    args.rotary_base = int(theta) if theta == int(theta) else theta
    args.window_size = None if window is None else (window - 1, 0)
    args.linear_attention_freq = _attention_frequency(
        [int(all(layer not in spec.layers for spec in specs)) for layer in range(config.num_hidden_layers)]
    )


def _attention_frequency(pattern: list[int]) -> list[int] | int | None:
    """A pattern (1 = MoM, 0 = softmax attention) as a user of Megatron says it: every N-th layer where it is so."""
    if all(pattern):
        return None
    every = pattern.index(0) + 1
    regular = every > 1 and pattern == [int((layer + 1) % every != 0) for layer in range(len(pattern))]
    return every if regular else pattern


def parse_config(content: dict, tensor_names: set[str]) -> MomConfig:
    """A configuration, of FLA or of this package; what an older one does not say is seen from the tensors' names.

    Raises:
        ConversionError: it is not a MoM model's, or has a value that no layer here can honour.
    """
    content = from_older_format(content)
    if content.get("model_type") != "mom":
        found = content.get("model_type")
        raise ConversionError(f"not a Mixture-of-Memories model: config.json has model_type {shown(found)}")
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


def layout_of(config: MomConfig) -> Layout:
    """The counts and sizes of a model that decide its tensors' names and shapes."""
    specs = config.attention_specs()
    head = config.hidden_size // specs[0].num_heads if specs else 0
    groups = specs[0].num_kv_heads if specs else 1
    settings = config.mixer_settings()
    dims = {
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "intermediate": config.mlp_size,
        "memories": config.num_memories,
        "heads": config.num_heads,
        "keys": settings.key_width,
        "values": settings.value_width,
        "value": settings.value_dim,
        "width": config.conv_size,
        "keys_values": groups * head,
        "one": 1,
        **rule_dimensions(settings.update_rule, config.num_heads, config.head_dim, settings.value_dim),
    }
    return Layout(
        dims=dims,
        num_layers=config.num_hidden_layers,
        attention_layers=frozenset(layer for spec in specs for layer in spec.layers),
        num_memories=config.num_memories,
        shared_memory=config.shared_mem,
        single_kv_proj=config.single_kv_proj,
        tied=config.tie_word_embeddings,
        num_query_groups=groups,
        memory_rule=settings.rule,
    )


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
