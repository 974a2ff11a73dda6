"""Hugging Face models whose layers are one memory alone, for every rule."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mom_layers import LinearAttentionLayer, rule_names
from mom_layers.hf import MomConfig, MomForCausalLM, save_remote_code
from mom_layers.hf.sequence import TokenSequence

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "vocab_size": 50, "num_memories": 0, "topk": 0, "initializer_range": 0.2,
}  # fmt: skip


def model(rule, **changes):
    torch.manual_seed(0)
    return MomForCausalLM(MomConfig(**SIZES, mom_backend=rule, **changes)).eval()


@pytest.mark.parametrize("rule", rule_names())
def test_the_layer_is_the_plain_layer(rule):
    attn = model(rule).model.layers[0].attn
    plain = LinearAttentionLayer(32, rule, num_heads=2, head_dim=16)
    weights = dict(attn.named_parameters())
    letters = ["q", *attn.letters, "g"]
    own = {"in_proj.weight": torch.cat([weights[f"{letter}_proj.weight"] for letter in letters])}
    own |= {"out_proj.weight": weights["o_proj.weight"], "norm_weight": weights["o_norm.weight"]}
    own |= {f"{letter}_conv": weights[f"{letter}_conv1d.weight"].squeeze(1) for letter in "qkv"}
    own |= {f"rule_parameters.{name}": weights[name] for name in attn.rule.parameter_names}
    plain.load_state_dict(own)
    x = torch.randn(2, 9, 32)
    sequence = TokenSequence(2, 9, 0, x.device, None, None, None, False, None)
    torch.testing.assert_close(attn(x, sequence)[0], plain(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"conv_size": 1}], ids=str)
@pytest.mark.parametrize("rule", rule_names())
def test_saved_loaded_and_generated_to_the_bit(rule, changes, tmp_path):
    mine = model(rule, **changes)
    mine.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(1, 15).view(2, 7)  # without the padding token
    with torch.no_grad():
        expected = mine(tokens).logits
        assert torch.equal(again(tokens).logits, expected)
        text = again.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        whole = again(text).logits.argmax(-1)
    assert torch.equal(text[:, 7:], whole[:, 6:-1])  # decoding one by one is the whole


@pytest.mark.parametrize("rule", rule_names())
def test_left_padding_changes_nothing(rule):
    mine = model(rule)
    tokens = torch.arange(1, 8)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    with torch.no_grad():
        got = mine(padded, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(got, mine(tokens).logits, rtol=1e-5, atol=1e-5)


def test_trains_without_a_balancing_loss():
    mine = model("gated_deltanet").train()
    tokens = torch.arange(14).view(2, 7)
    out = mine(tokens, labels=tokens)
    assert out.aux_loss is None and not out.router_logits
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())


def test_loads_as_remote_code(tmp_path):
    """In a process that has no mom_layers."""
    mine = model("gla")
    mine.save_pretrained(tmp_path)
    save_remote_code(tmp_path)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        torch.save(mine(tokens).logits, tmp_path / "expected.pt")
    script = f"""
import sys
sys.path = [p for p in sys.path if p not in ("", {str(sys.path[0])!r})]
sys.modules["mom_layers"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    got = model(torch.arange(7)[None]).logits
torch.testing.assert_close(got, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-5, atol=1e-5)
print(type(model).__module__)
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers_modules" in done.stdout


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"topk": 2}, "num_memories=0 makes a layer of one memory.*topk must be 0, got 2"),
        ({"shared_mem": False}, "shared_memory must be True, got False"),
        ({"mom_backend": "softmax"}, "unknown memory rule 'softmax': choose one of"),
        ({"conv_size": 0}, "conv_size must be a whole number between 1 and 8, got 0"),
        ({"use_short_conv": False}, "use_short_conv=False is not supported: give conv_size 1"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        MomConfig(**(SIZES | changes))
