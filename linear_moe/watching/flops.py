"""Floating-point operations of a model with Mixture-of-Memories layers, and the peak of the device."""

from __future__ import annotations

import copy
import re

import torch

from linear_moe.config import MomTransformerConfig, has_memories
from linear_moe.pattern import MEMORY, main_layers, prediction_layers
from megatron_patches.patch import wrap
from mom_layers.recur.rules import get_rule

FORWARD_AND_BACKWARD = 3
"""A backward pass costs two forward passes: gradients of the inputs, and of the weights."""

# Dense bf16 matrix products, FLOP/s, by a word of the device's name. The first name found counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device in dense bf16 products, FLOP/s, by torch.cuda.get_device_name; None for an unknown device."""
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return flops
    return None


def device_peak_flops() -> float | None:
    """Peak of this process's device; None on a CPU or an unknown device."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def mom_layer_flops(args, tokens: float) -> float:
    """Forward and backward operations of one MoM token mixer, all heads, a multiply-add counted as two.

    Counts matrix products, convolutions and the recurrence; leaves out norms, gates, the routing's sorting and
    gathering. The count depends on the number of tokens only, not on the lengths of the sequences.

    Args:
        args: anything with hidden_size and the mom_* sizes (MomTransformerConfig, Megatron's arguments).
        tokens: of all sequences together.
    """
    rule = get_rule(args.mom_rule)
    hidden, heads, key_dim = args.hidden_size, args.mom_num_heads, args.mom_head_dim
    value_dim = int(key_dim * args.mom_expand_v)
    keys, values = heads * key_dim, heads * value_dim
    rows = tokens * (args.mom_topk + int(args.mom_shared_memory))

    router = 2 * tokens * hidden * args.mom_num_memories
    query_gate_out = 2 * tokens * hidden * (keys + 2 * values)
    projected = tokens if args.mom_single_kv_proj else rows
    memory = 2 * projected * hidden * sum(rule.projection_sizes(heads, key_dim, value_dim))
    convolutions = 2 * rows * args.mom_conv_kernel * (2 * keys + values) + 2 * tokens * args.mom_text_conv * hidden
    recurrence = rule.recurrence_flops(rows, heads, key_dim, value_dim)
    return FORWARD_AND_BACKWARD * (router + query_gate_out + memory + convolutions + recurrence)


def latent_attention_flops(args, tokens: float, squared_lengths: float) -> float:
    """Forward and backward operations of one layer of multi-latent attention, a multiply-add counted as two. Megatron
    counts no such layer in a hybrid model.

    Args:
        args: Megatron's arguments.
        tokens: of all sequences together.
        squared_lengths: sum of the squared lengths of all sequences.
    """
    hidden, heads = args.hidden_size, args.num_attention_heads
    query, value, rank = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim, args.kv_lora_rank
    if args.q_lora_rank is None:
        queries = hidden * heads * query
    else:
        queries = args.q_lora_rank * (hidden + heads * query)
    keys = hidden * (rank + args.qk_pos_emb_head_dim) + rank * heads * (args.qk_head_dim + value)
    projections = 2 * tokens * (queries + keys + heads * value * hidden)
    product = squared_lengths * heads * (query + value)  # 2 operations, and a token sees half of the others
    return FORWARD_AND_BACKWARD * (projections + product)


def count_layers(pattern: str, symbol: str) -> int:
    """Number of layers of a symbol in a pattern, those of every step of multi-token prediction too."""
    prediction, steps = prediction_layers(pattern)
    return main_layers(pattern).count(symbol) + steps * prediction.count(symbol)


def _without_mom_layers(args):
    """A copy of the arguments for which Megatron counts no token mixing in MoM layers, and the number of MoM layers.

    The copy describes MoM layers as Gated DeltaNet layers of no heads. In a hybrid model, where a layer is either mixer
    or MLP, the copy's pattern leaves the `R` layers out.
    """
    rest = copy.copy(args)
    if args.hybrid_layer_pattern is not None:
        rest.hybrid_layer_pattern = args.hybrid_layer_pattern.replace(MEMORY, "")
        return rest, count_layers(args.hybrid_layer_pattern, MEMORY)
    # mom_layer_pattern reads three fields, which the arguments have under the same names.
    pattern = [int(is_mom) for is_mom in MomTransformerConfig.mom_layer_pattern(args)]
    pattern += [0] * (args.mtp_num_layers or 0)  # multi-token prediction has softmax attention layers
    rest.experimental_attention_variant = "gated_delta_net"
    rest.linear_attention_freq = pattern
    rest.linear_num_key_heads = rest.linear_num_value_heads = 0
    rest.linear_key_head_dim = rest.linear_value_head_dim = rest.linear_conv_kernel_dim = 0
    return rest, sum(pattern)


def _count(
    num_floating_point_operations,
    args,
    batch_size,
    seqlen_squared_sum_in_batch=None,
    total_real_tokens_in_batch=None,
):
    lengths = (seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
    if not has_memories(args):
        return num_floating_point_operations(args, batch_size, *lengths)
    tokens = total_real_tokens_in_batch
    if tokens is None:
        tokens = batch_size * args.seq_length
    rest, num_mom_layers = _without_mom_layers(args)
    others = num_floating_point_operations(rest, batch_size, *lengths)
    # Megatron sets this argument while counting. Rank 0's report of memory sets it too: unless every rank has it,
    # Megatron warns at every save that the ranks' arguments differ.
    args.num_query_groups = rest.num_query_groups
    if args.hybrid_layer_pattern is not None and (latent := count_layers(args.hybrid_layer_pattern, "+")):
        squared = (
            batch_size * args.seq_length**2 if seqlen_squared_sum_in_batch is None else seqlen_squared_sum_in_batch
        )
        others += latent * latent_attention_flops(args, tokens, squared)
    return others + num_mom_layers * mom_layer_flops(args, tokens)


FLOPS_TARGET = wrap("megatron.training.training", "num_floating_point_operations", _count)
"""Part of the reporters' patches: Megatron counts a MoM layer as softmax attention."""
