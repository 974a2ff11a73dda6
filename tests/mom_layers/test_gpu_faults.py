"""Head sizes at which a rule's kernels were found wrong on a GPU: refused by name, or computed in PyTorch."""

import logging

import pytest
import torch

from mom_layers import MixtureOfMemories
from mom_layers.kernel_problems import kernel_problem
from mom_layers.recur import channel_delta, checks
from mom_layers.recur.rules import get_rule, rule_names
from mom_layers.settings import MixerSettings

WRONG = [("kda", 256, 64), ("gated_deltanet2", 256, 16)]
RIGHT = [("kda", 256, 256), ("kda", 128, 16), ("gated_deltanet2", 256, 128), ("mamba2", 64, 32), ("retention", 256, 16)]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize(("rule", "key_size", "value_size"), WRONG)
def test_a_fault_is_named(gpu, rule, key_size, value_size):
    settings = MixerSettings(head_dim=key_size, expand_v=value_size / key_size, rule=rule)
    assert not settings.has_kernels()
    with pytest.raises(ValueError, match=f"the {rule} kernels gave .* on an H100.*kernels='torch'"):
        settings.check_head_sizes()
    assert f"the {rule} kernels gave" in kernel_problem(settings, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(("rule", "key_size", "value_size"), RIGHT)
def test_other_sizes_have_kernels(gpu, rule, key_size, value_size):
    assert get_rule(rule).has_kernels(key_size, value_size)


def test_without_a_gpu_nothing_is_known():
    assert all(get_rule(rule).fault(256, 16) is None for rule in rule_names())


def hugging_face_layer():
    from mom_layers.hf.configuration_mom import MomConfig
    from mom_layers.hf.mixer import MomAttention

    return MomAttention(MomConfig(hidden_size=32, num_heads=1, head_dim=256, expand_v=0.25, mom_backend="kda"))


def layer():
    return MixtureOfMemories(32, num_heads=1, head_dim=256, expand_v=0.25, rule="kda")


@pytest.mark.parametrize("make", [layer, hugging_face_layer])
def test_layers_compute_in_pytorch_and_say_so_once(gpu, caplog, monkeypatch, make):
    monkeypatch.setattr("mom_layers.recur.rules.rule._WARNED", set())
    with caplog.at_level(logging.WARNING, logger="mom_layers"):
        layers = [make(), make()]
    assert [layer.kernels for layer in layers] == ["torch", "torch"]
    assert caplog.text.count("kda computes in PyTorch, slowly") == 1


def _operations(key_size, value_size):
    """Every public function of the family with a fault, without kernels' name."""
    q, g = torch.randn(5, 1, key_size, dtype=torch.bfloat16), -torch.rand(5, 1, key_size)
    v, beta = torch.randn(5, 1, value_size, dtype=torch.bfloat16), torch.rand(5, 1)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    return [
        lambda **kernels: channel_delta.kimi_delta_attention(q, q, v, g, beta, ends, **kernels)[0],
        lambda **kernels: channel_delta.initial_state_gradient(q, q, g, beta, v, ends, **kernels),
    ]


@pytest.mark.parametrize("number", range(2))
def test_an_operation_computes_in_pytorch_and_says_so_once(monkeypatch, caplog, number):
    monkeypatch.setattr(checks, "resolve_kernels", lambda kernels, q: "triton" if kernels == "auto" else kernels)
    monkeypatch.setattr("mom_layers.recur.channel_delta.autograd.ChannelDeltaRule", None)  # nothing may launch a kernel
    monkeypatch.setattr("mom_layers.recur.channel_delta.autograd.initial_state_gradient", None)
    checks._warn_of_fault.cache_clear()
    operation = _operations(256, 32)[number]
    with caplog.at_level(logging.WARNING, logger="mom_layers"):
        assert torch.equal(operation(), operation(kernels="torch")) and operation().shape
    assert caplog.text.count("keys of 256 and values of 32 run in PyTorch, slowly: the kernels gave") == 1
    for kernels, sizes in (({"kernels": "triton"}, (256, 32)), ({}, (256, 256))):
        with pytest.raises((TypeError, AttributeError), match="None"):
            _operations(*sizes)[number](**kernels)
