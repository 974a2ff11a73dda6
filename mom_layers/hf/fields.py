"""The fields of a Hugging Face configuration, one row a field: the only list of these names.

`MomConfig` takes its arguments, defaults and checks from the table; the conversion both ways reads from the table which
argument of Megatron has the same value, and what to write where Megatron has no such argument.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

LARGEST = 2**31 - 1
"""The largest size that a configuration may name. Tensors of a larger size cannot be indexed by 32-bit numbers."""


def shown(value: Any) -> str:
    """A value of a configuration for a message, with its middle left out where it is long."""
    return _REPR.repr(value)


_REPR = reprlib.Repr(maxstring=60, maxlong=24, maxother=60, maxlevel=3)


@dataclass(frozen=True)
class Kind:
    """Which values a key takes.

    Attributes:
        accepts: whether a value is among them.
        words: what a message says they are.
    """

    accepts: Callable[[Any], bool]
    words: str

    def or_none(self) -> Kind:
        """The same values and None."""
        return Kind(lambda value: value is None or self.accepts(value), f"{self.words}, or null")


def whole(least: int, most: int = LARGEST) -> Kind:
    """Whole numbers from ``least`` to ``most``."""

    def accepts(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most

    return Kind(accepts, f"a whole number between {least} and {most}")


def number(least: float, most: float, *, above: bool = False) -> Kind:
    """Numbers from ``least`` to ``most``; ``above`` leaves out ``least``. NaN is not among them."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        return (least < value if above else least <= value) and value <= most

    return Kind(accepts, f"a number {'above' if above else 'from'} {least:g} {'and up ' if above else ''}to {most:g}")


TRUTH = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a string")
ANY = Kind(lambda value: True, "anything")  # for keys with a check of their own
SIZE = whole(1)


@dataclass(frozen=True)
class Field:
    """One key of config.json.

    Attributes:
        name: the key, as in `fla.models.mom`.
        kind: the values that the key takes.
        default: the value where a configuration does not name the key.
        megatron: Megatron's argument with the same value; None where there is no such argument.
        setting: the field of :class:`mom_layers.settings.MixerSettings` with the same value, if any.
        accepted: the only values with which a model computes what the key says; None where every value is accepted.
        refusal: why other values are refused.
        exported: the value that the conversion writes where ``megatron`` is None; ``default`` if not given.
        meaning: what the documentation of the configuration says.
    """

    name: str
    kind: Kind
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

    def check_kind(self, value: Any) -> None:
        """Raises ValueError for a value of another kind or out of the range."""
        if not self.kind.accepts(value):
            raise ValueError(f"{self.name} must be {self.kind.words}, got {shown(value)}")

    def check(self, value: Any) -> None:
        """Raises ValueError for a value that is not accepted."""
        if self.accepted is None or value in self.accepted:
            return
        if self.accepted == (True,):
            raise ValueError(f"{self.name}={shown(value)} is not supported: {self.refusal}")
        only = f"one of {', '.join(self.accepted)}" if len(self.accepted) > 1 else repr(self.accepted[0])
        raise ValueError(f"{self.name} must be {only}, got {shown(value)}: {self.refusal}")


_KERNEL_CHOICE = "chooses FLA's kernels; without effect here"

FIELDS = (
    Field("vocab_size", SIZE, 32000, "tokens of the vocabulary"),
    Field("hidden_size", SIZE, 2048, "D", megatron="hidden_size"),
    Field("num_hidden_layers", SIZE, 24, "layers", megatron="num_layers"),
    Field("num_heads", SIZE, 4, "H of a MoM layer", megatron="mom_num_heads", setting="num_heads"),
    Field("head_dim", SIZE, 256, "key size K of a head", megatron="mom_head_dim", setting="head_dim"),
    Field("expand_v", number(0, 1e6, above=True), 1.0, "value size over key size", megatron="mom_expand_v",
          setting="expand_v"),
    Field("conv_size", whole(1, 8), 4, "width of the convolutions on q, k and v; 1 for no convolution",
          megatron="mom_conv_kernel", setting="conv_kernel"),
    Field("num_memories", whole(0), 4, "memories a layer has, without the shared memory; 0 for one memory alone, which "
          "every token goes to, without a router", megatron="mom_num_memories", setting="num_memories"),
    Field("topk", whole(0), 2, "memories a token goes to; 0 for one memory alone", megatron="mom_topk", setting="topk"),
    Field("shared_mem", TRUTH, True, "whether there is a memory that every token goes to", megatron="mom_shared_memory",
          setting="shared_memory"),
    Field("single_kv_proj", TRUTH, False, "one key, value and gate projection for all memories",
          megatron="mom_single_kv_proj", setting="single_kv_proj"),
    Field("text_conv_size", whole(0, 8), 0, "width of a convolution over the text, before the router; 0 for none",
          megatron="mom_text_conv", setting="text_conv"),
    Field("mom_backend", TEXT, "gated_deltanet", "name of the memory update rule", megatron="mom_rule",
          setting="rule"),
    Field("attn", ANY, None, "None, or which layers are softmax attention instead: {\"layers\": [indices], "
          "\"num_heads\", \"num_kv_heads\", \"qkv_bias\", \"window_size\", \"rope_theta\", ...}, the "
          "keys of AttentionSpec or LatentSpec; or a list of such entries"),
    Field("moe", ANY, None, "None, or which layers have experts in the place of the MLP: {\"layers\": [indices], "
          "\"num_experts\", \"num_experts_per_tok\", \"intermediate_size\", ...}, the keys of MoeSpec"),
    Field("num_nextn_predict_layers", whole(0, 64), 0, "layers of multi-token prediction, which are kept and never "
          "computed; attn and moe number them after the others"),
    Field("hidden_ratio", number(0, 1e6, above=True).or_none(), 4, "width of the MLP over D, times 3 / 2",
          exported=None),
    Field("intermediate_size", SIZE.or_none(), None, "width of the MLP; without it the multiple of 256 at or above D * "
          "hidden_ratio * 2 / 3", megatron="ffn_hidden_size"),
    Field("hidden_act", TEXT, "swish", "activation of the MLP", accepted=("swish", "silu"),
          refusal="the MLP is down(SiLU(gate x) * up x)"),
    Field("norm_eps", number(0, 1), 1e-6, "of every norm", megatron="layernorm_epsilon", setting="norm_eps"),
    Field("initializer_range", number(0, 1e6), 0.02, "standard deviation of new weights", megatron="init_method_std"),
    Field("max_position_embeddings", SIZE, 2048, "sequence length of training; nothing in a MoM layer depends on the "
          "length", megatron="max_position_embeddings"),
    Field("aux_loss_scale", number(0, 1e6), 0.01, "weight of the load-balancing loss in the training loss"),
    Field("use_layer_wise_balance", TRUTH, True, "balance the memories of every layer, instead of all layers' choices "
          "taken together"),
    Field("use_output_gate", TRUTH, True, "whether the output norm is gated", accepted=(True,),
          refusal="the layer's output norm is gated"),
    Field("use_short_conv", TRUTH, True, "whether q, k and v are convolved", accepted=(True,),
          refusal="give conv_size 1 for layers without convolutions"),
    Field("attn_mode", TEXT, "chunk", _KERNEL_CHOICE),
    Field("capacity", number(0, 1e6).or_none(), 1.0, "without effect, in FLA too: no token is dropped"),
    Field("fuse_norm", TRUTH, True, _KERNEL_CHOICE),
    Field("fuse_swiglu", TRUTH, True, _KERNEL_CHOICE),
    Field("fuse_cross_entropy", TRUTH, True, _KERNEL_CHOICE),
    Field("attnres_block_size", ANY, None, "blocks of residual attention", accepted=(None,),
          refusal="residual attention is not supported"),
    Field("use_cache", TRUTH, True, "whether a forward pass in evaluation returns a cache"),
)  # fmt: skip
