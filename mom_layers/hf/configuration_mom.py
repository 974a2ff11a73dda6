"""Configuration of a Mixture-of-Memories language model in the Hugging Face format, `model_type` "mom"."""

from __future__ import annotations

from transformers.configuration_utils import PretrainedConfig

from mom_layers.hf.attention_config import AttentionSpec, parse_attention
from mom_layers.layer import check_sizes

FORMAT_RULES = ("gated_deltanet",)
ACTIVATIONS = ("swish", "silu")
INTERMEDIATE_MULTIPLE = 256


class MomConfig(PretrainedConfig):
    """The keys and defaults of `fla.models.mom`'s configuration, so that one config.json serves both.

    Args:
        hidden_size, num_hidden_layers, vocab_size, max_position_embeddings: sizes of the model. The last is the
            sequence length of training; nothing in a MoM layer depends on it.
        num_heads, head_dim: H and K of a MoM layer.
        expand_v: value size V = head_dim * expand_v.
        conv_size: width of the causal convolutions on q, k and v.
        num_memories, topk, shared_mem: memories a layer has, memories a token goes to, and whether there is one more
            that every token goes to.
        single_kv_proj: one key, value and gate projection for all memories.
        mom_backend: name of the memory update rule.
        hidden_ratio, intermediate_size: width of the MLP. Without ``intermediate_size`` it is the multiple of 256 at
            or above ``hidden_size * hidden_ratio * 2 / 3``.
        attn: None, or which layers are softmax attention instead: {"layers": [indices], "num_heads", "num_kv_heads",
            "qkv_bias", "window_size", "rope_theta"}, or a list of such.
        aux_loss_scale: weight of the load-balancing loss in the training loss.
        use_layer_wise_balance: balance the memories of every layer, instead of all layers' choices taken together.
        attn_mode, capacity, fuse_norm, fuse_swiglu, fuse_cross_entropy: kept because the format has them; they choose
            kernels, or nothing, and do not change what the model computes.

    Raises:
        ValueError: a value that no layer here can honour.
    """

    model_type = "mom"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        head_dim: int = 256,
        expand_v: float = 1.0,
        conv_size: int = 4,
        num_memories: int = 4,
        topk: int = 2,
        shared_mem: bool = True,
        single_kv_proj: bool = False,
        mom_backend: str = "gated_deltanet",
        attn: dict | list | None = None,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        aux_loss_scale: float = 0.01,
        use_layer_wise_balance: bool = True,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        attn_mode: str = "chunk",
        capacity: float = 1.0,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        attnres_block_size: int | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.expand_v = expand_v
        self.conv_size = conv_size
        self.num_memories = num_memories
        self.topk = topk
        self.shared_mem = shared_mem
        self.single_kv_proj = single_kv_proj
        self.mom_backend = mom_backend
        self.attn = attn
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.aux_loss_scale = aux_loss_scale
        self.use_layer_wise_balance = use_layer_wise_balance
        self.use_output_gate = use_output_gate
        self.use_short_conv = use_short_conv
        self.attn_mode = attn_mode
        self.capacity = capacity
        self.fuse_norm = fuse_norm
        self.fuse_swiglu = fuse_swiglu
        self.fuse_cross_entropy = fuse_cross_entropy
        self.attnres_block_size = attnres_block_size
        self.use_cache = use_cache
        self._check()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self) -> None:
        check_sizes(
            rule=self.mom_backend, num_heads=self.num_heads, head_dim=self.head_dim, expand_v=self.expand_v,
            num_memories=self.num_memories, topk=self.topk, conv_kernel=self.conv_size,
        )  # fmt: skip
        if self.mom_backend not in FORMAT_RULES:
            raise ValueError(
                f"mom_backend {self.mom_backend!r} is no part of the format: it has {', '.join(FORMAT_RULES)}"
            )
        if not self.use_output_gate:
            raise ValueError("use_output_gate=False is not supported: the layer's output norm is gated")
        if not self.use_short_conv:
            raise ValueError("use_short_conv=False is not supported: q, k and v go through a short convolution")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        if self.attnres_block_size is not None:
            raise ValueError(
                f"attnres_block_size must be None, got {self.attnres_block_size}: residual attention is not supported"
            )
        self.attention_specs()

    def attention_specs(self) -> list[AttentionSpec]:
        """What kind of softmax attention each group of layers has; an empty list for a model of MoM layers alone."""
        return parse_attention(self.attn, self.hidden_size, self.num_hidden_layers)

    @property
    def mlp_size(self) -> int:
        """Width of the MLP, from ``intermediate_size`` or ``hidden_ratio``."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return -(-int(self.hidden_size * ratio * 2 / 3) // INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE
