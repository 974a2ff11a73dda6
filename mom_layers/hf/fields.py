"""The fields of a Hugging Face configuration, one row a field: the only list of these names.

`MomConfig` takes its arguments, defaults and checks from the table; the conversion both ways reads from the table which
argument of Megatron has the same value, and what to write where Megatron has no such argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One key of config.json.

    Attributes:
        name: the key, as in `fla.models.mom`.
        default: the value where a configuration does not name the key.
        megatron: Megatron's argument with the same value; None where there is no such argument.
        setting: the field of :class:`mom_layers.settings.MixerSettings` with the same value, if any.
        accepted: the only values with which a model computes what the key says; None where every value is accepted.
        refusal: why other values are refused.
        exported: the value that the conversion writes where ``megatron`` is None; ``default`` if not given.
        meaning: what the documentation of the configuration says.
    """

    name: str
    default: Any
    meaning: str
    megatron: str | None = None
    setting: str | None = None
    accepted: tuple | None = None
    refusal: str = ""
    exported: Any = ...

    @property
    def export(self) -> Any:
        return self.default if self.exported is ... else self.exported

    def check(self, value: Any) -> None:
        """Raises ValueError for a value that is not accepted."""
        if self.accepted is None or value in self.accepted:
            return
        if self.accepted == (True,):
            raise ValueError(f"{self.name}={value!r} is not supported: {self.refusal}")
        only = f"one of {', '.join(self.accepted)}" if len(self.accepted) > 1 else repr(self.accepted[0])
        raise ValueError(f"{self.name} must be {only}, got {value!r}: {self.refusal}")


_KERNEL_CHOICE = "chooses FLA's kernels; without effect here"

FIELDS = (
    Field("vocab_size", 32000, "tokens of the vocabulary"),
    Field("hidden_size", 2048, "D", megatron="hidden_size"),
    Field("num_hidden_layers", 24, "layers", megatron="num_layers"),
    Field("num_heads", 4, "H of a MoM layer", megatron="mom_num_heads", setting="num_heads"),
    Field("head_dim", 256, "key size K of a head", megatron="mom_head_dim", setting="head_dim"),
    Field("expand_v", 1.0, "value size over key size", megatron="mom_expand_v", setting="expand_v"),
    Field("conv_size", 4, "width of the convolutions on q, k and v", megatron="mom_conv_kernel", setting="conv_kernel"),
    Field("num_memories", 4, "memories a layer has, without the shared memory", megatron="mom_num_memories",
          setting="num_memories"),
    Field("topk", 2, "memories a token goes to", megatron="mom_topk", setting="topk"),
    Field("shared_mem", True, "whether there is a memory that every token goes to", megatron="mom_shared_memory",
          setting="shared_memory"),
    Field("single_kv_proj", False, "one key, value and gate projection for all memories",
          megatron="mom_single_kv_proj", setting="single_kv_proj"),
    Field("mom_backend", "gated_deltanet", "name of the memory update rule", megatron="mom_rule", setting="rule"),
    Field("attn", None, "None, or which layers are softmax attention instead: {\"layers\": [indices], \"num_heads\", "
          "\"num_kv_heads\", \"qkv_bias\", \"window_size\", \"rope_theta\"}, or a list of such entries"),
    Field("hidden_ratio", 4, "width of the MLP over D, times 3 / 2", exported=None),
    Field("intermediate_size", None, "width of the MLP; without it the multiple of 256 at or above D * hidden_ratio "
          "* 2 / 3", megatron="ffn_hidden_size"),
    Field("hidden_act", "swish", "activation of the MLP", accepted=("swish", "silu"),
          refusal="the MLP is down(SiLU(gate x) * up x)"),
    Field("norm_eps", 1e-6, "of every norm", megatron="layernorm_epsilon", setting="norm_eps"),
    Field("initializer_range", 0.02, "standard deviation of new weights", megatron="init_method_std"),
    Field("max_position_embeddings", 2048, "sequence length of training; nothing in a MoM layer depends on the length",
          megatron="max_position_embeddings"),
    Field("aux_loss_scale", 0.01, "weight of the load-balancing loss in the training loss"),
    Field("use_layer_wise_balance", True, "balance the memories of every layer, instead of all layers' choices taken "
          "together"),
    Field("use_output_gate", True, "whether the output norm is gated", accepted=(True,),
          refusal="the layer's output norm is gated"),
    Field("use_short_conv", True, "whether q, k and v are convolved", accepted=(True,),
          refusal="q, k and v go through a short convolution"),
    Field("attn_mode", "chunk", _KERNEL_CHOICE),
    Field("capacity", 1.0, "without effect, in FLA too: no token is dropped"),
    Field("fuse_norm", True, _KERNEL_CHOICE),
    Field("fuse_swiglu", True, _KERNEL_CHOICE),
    Field("fuse_cross_entropy", True, _KERNEL_CHOICE),
    Field("attnres_block_size", None, "blocks of residual attention", accepted=(None,),
          refusal="residual attention is not supported"),
    Field("use_cache", True, "whether a forward pass in evaluation returns a cache"),
)  # fmt: skip
