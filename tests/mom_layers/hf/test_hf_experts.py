"""Experts, latent attention and multi-token prediction in a Hugging Face model."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import HYBRID, random_tokens, tiny_model
from test_hf_remote_code import load_elsewhere

from mom_layers.hf import MomForCausalLM, save_remote_code
from mom_layers.hf.attention_and_mlp import LatentAttention
from mom_layers.hf.cache import CACHE_NAME
from mom_layers.hf.experts import SparseMLP
from mom_layers.hf.moe_config import parse_moe

EXPERTS = {"layers": [0, 1], "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
SHARED = EXPERTS | {"layers": [1], "shared_expert_intermediate_size": 20, "shared_expert_gate": True}
BIASED = EXPERTS | {"score_function": "sigmoid", "expert_bias": True, "routed_scaling_factor": 2.5}
GROUPED = EXPERTS | {"n_group": 2, "topk_group": 1}
LATENT = {
    "layers": [2], "num_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 0.7},
}  # fmt: skip
SOFTMAX = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "qk_norm": True}
EVERY_KIND = {"num_hidden_layers": 4, "attn": [SOFTMAX, LATENT], "moe": SHARED | {"layers": [0, 3]}}
PREDICTING = {"num_nextn_predict_layers": 1, "attn": SOFTMAX | {"layers": [2]}, "moe": EXPERTS | {"layers": [1, 2]}}
MODELS = {"dense": HYBRID, "experts": {"moe": EXPERTS}, "shared": {"moe": SHARED}, "every kind": EVERY_KIND,
          "predicting": PREDICTING}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_an_export_loads_with_torch_and_transformers_alone(name, tmp_path):
    model = tiny_model(**MODELS[name])
    model.save_pretrained(tmp_path / "export")
    save_remote_code(tmp_path / "export")
    tokens = random_tokens(2, 12)
    torch.save(tokens, tmp_path / "tokens.pt")
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.equal(load_elsewhere(tmp_path / "export", tmp_path)[0], expected)


def expected_experts(x, mlp: SparseMLP, spec):
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        logits = mlp.gate.weight @ token
        scores = logits.softmax(0) if spec.score_function == "softmax" else logits.sigmoid()
        by_logits = spec.score_function == "softmax" and spec.norm_topk_prob  # as Megatron chooses groups
        choice = logits if by_logits else scores + (mlp.gate.e_score_correction_bias if spec.expert_bias else 0)
        if spec.n_group:
            best = choice.view(spec.n_group, -1).topk(2 // spec.topk_group, 1).values.sum(1).topk(spec.topk_group)
            kept = torch.zeros(spec.n_group).index_fill(0, best.indices, 1.0).repeat_interleave(4 // spec.n_group)
            choice = choice.masked_fill(kept == 0, -torch.inf)
        ids = choice.topk(2).indices
        weights = scores[ids] / scores[ids].sum() if spec.norm_topk_prob else scores[ids]
        for id, weight in zip(ids, weights * spec.routed_scaling_factor, strict=True):
            out[t] += weight * mlp.experts[id](token)
        if spec.shared_expert_intermediate_size:
            out[t] += mlp.shared_expert(token) * mlp.shared_expert_gate(token).sigmoid()
    return out


@pytest.mark.parametrize("moe", [EXPERTS, EXPERTS | {"norm_topk_prob": False}, SHARED, BIASED, GROUPED])
@torch.no_grad()
def test_experts_are_a_weighted_sum(moe):
    torch.manual_seed(0)
    spec = parse_moe(moe, 2)
    mlp = SparseMLP(32, spec)
    torch.nn.init.normal_(mlp.gate.weight)
    if spec.expert_bias:
        mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0]))
    x = torch.randn(2, 7, 32)
    out, logits = mlp(x)
    torch.testing.assert_close(out.flatten(0, 1), expected_experts(x.flatten(0, 1), mlp, spec))
    torch.testing.assert_close(logits, x.flatten(0, 1) @ mlp.gate.weight.T)


def test_the_training_loss_has_the_experts_balance():
    """A balanced layer's loss is 1, so that two layers add 2 times the scale."""
    tokens = random_tokens(2, 20)
    model = tiny_model(moe=EXPERTS | {"aux_loss_scale": 0.25}, aux_loss_scale=0.0)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # equal scores, whatever the choices are
    with torch.no_grad():
        evaluated = model(tokens, labels=tokens).loss
        trained = model.train()(tokens, labels=tokens).loss
    assert (trained - evaluated).item() == pytest.approx(2 * 0.25, rel=1e-4)


@torch.no_grad()
def test_decoding_continues_and_documents_are_apart():
    model, tokens = tiny_model(**EVERY_KIND), random_tokens(2, 14)
    whole = model(tokens).logits
    first = model(tokens[:, :9])
    cache = first.get(CACHE_NAME)
    parts = [first.logits, *(model(tokens[:, t : t + 1], **{CACHE_NAME: cache}).logits for t in range(9, 14))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    packed = model(tokens.view(1, -1), cu_seqlens=torch.tensor([0, 14, 28])).logits
    torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_latent_attention_is_softmax_attention_of_its_projections():
    """Rotation by neighbouring pairs, as complex numbers."""
    model = tiny_model(num_hidden_layers=3, attn=LATENT | {"rope_scaling": None})
    layer, x = model.model.layers[2].attn, torch.randn(1, 6, 32)
    assert isinstance(layer, LatentAttention)
    found = []
    layer.register_forward_hook(lambda module, inputs, output: found.append((inputs[0], output[0])))
    model(random_tokens(1, 6))
    (x, out) = found[0]
    q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))).view(6, 4, 24)
    latent, k_rope = layer.kv_a_proj_with_mqa(x).split([16, 8], -1)
    kv = layer.kv_b_proj(layer.kv_a_layernorm(latent)).view(6, 4, 28)
    angles = torch.arange(6)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)

    def turned(rows):  # [6, heads, 8]
        pairs = torch.view_as_complex(rows.unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    q = torch.cat([q[..., :16], turned(q[..., 16:])], -1)
    k = torch.cat([kv[..., :16], turned(k_rope.view(6, 1, 8)).expand(-1, 4, -1)], -1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 24**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    expected = layer.o_proj(torch.einsum("hij,jhd->ihd", scores, kv[..., 16:]).flatten(1))
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


def test_predictions_are_kept_and_frozen(tmp_path):
    model, tokens = tiny_model(**PREDICTING), random_tokens(2, 12)
    model(tokens, labels=tokens).loss.backward()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(name.startswith("model.mtp.0.") for name in frozen)
    assert all(p.grad is not None for n, p in model.named_parameters() if ".experts." not in n and n not in frozen)
    model.save_pretrained(tmp_path)
    again = MomForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_adapters_reach_the_experts():
    import peft

    tokens = random_tokens(2, 12)
    model = tiny_model(moe=SHARED)
    with torch.no_grad():
        before = model(tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    loss = F.cross_entropy(adapted(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    assert any(".experts." in name and p.grad is not None for name, p in adapted.named_parameters() if p.requires_grad)
    torch.testing.assert_close(adapted(input_ids=tokens).logits, before)
