"""Lets Megatron's own attention product take the head sizes of multi-latent attention.

There keys have a part for positions, and values have a size of their own.
"""

from megatron_patches.patch import Patch, wrap


def _with_head_sizes(build, attention, config, *args, k_channels=None, v_channels=None, **kwargs):
    """k_channels, v_channels: sizes of a head's key and value; None where both are config.kv_channels."""
    build(attention, config, *args, **kwargs)
    if k_channels is not None and kwargs.get("softmax_scale") is None:
        attention.softmax_scale *= (attention.hidden_size_per_attention_head / k_channels) ** 0.5
    if v_channels is not None:  # the product's output has the size of the values
        attention.hidden_size_per_partition = v_channels * config.num_attention_heads // attention.tp_group.size()


PATCH = Patch(
    name="local-latent-attention",
    reason="MLASelfAttention gives the head sizes to DotProductAttention, which takes none: multi-latent attention "
    "would need Transformer Engine",
    removed_when="DotProductAttention takes k_channels and v_channels",
    targets=(
        wrap("megatron.core.transformer.dot_product_attention", "DotProductAttention.__init__", _with_head_sizes),
    ),
)
