"""Megatron's own attention product, with the head sizes of multi-latent attention."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patches import cpu, latent_attention

HEADS, KEY, VALUE, LENGTH = 4, 24, 16, 10


@pytest.fixture
def patched():
    cpu.apply()
    latent_attention.PATCH.apply()
    yield
    latent_attention.PATCH.undo()
    cpu.undo()


def build(**sizes):
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * 32, num_attention_heads=HEADS, attention_dropout=0.0, sequence_parallel=False
    )
    group = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    return DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=group, **sizes)


def test_keys_and_values_have_sizes_of_their_own(patched, monkeypatch):
    buffer = SimpleNamespace(get_tensor=lambda shape, dtype, name: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr("megatron.core.parallel_state.get_global_memory_buffer", lambda: buffer)
    attention = build(k_channels=KEY, v_channels=VALUE).eval()
    attention.attention_dropout = torch.nn.Identity()
    attention.config.sequence_parallel = True  # no dropout, and no generator of its own
    query, key = torch.randn(2, LENGTH, 2, HEADS, KEY)
    value = torch.randn(LENGTH, 2, HEADS, VALUE)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    found = attention(query, key, value, mask)
    batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*batch_first, is_causal=True)
    torch.testing.assert_close(found, expected.permute(2, 0, 1, 3).reshape(LENGTH, 2, HEADS * VALUE))


def test_other_attention_is_as_before(patched):
    attention = build()
    assert attention.hidden_size_per_partition == HEADS * 32
    assert attention.softmax_scale == pytest.approx(32**-0.5)
    assert build(k_channels=KEY, v_channels=VALUE, softmax_scale=0.5).softmax_scale == 0.5
