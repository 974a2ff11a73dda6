"""Exports load in flash-linear-attention, and its models in ours: on a GPU where that package is installed."""

import importlib.util

import pytest
import torch

from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.modeling_mom import MomForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not importlib.util.find_spec("fla"), reason="needs a GPU and flash-linear-attention"),
]
# aux_loss_scale: flash-linear-attention adds the balancing loss in evaluation too, ours does in training.
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
    "aux_loss_scale": 0.0,
}
VARIANTS = [
    {},
    {"shared_mem": False},
    {"single_kv_proj": True},
    {"num_memories": 8, "topk": 1},
    {"tie_word_embeddings": True},
]


def in_bf16(model):
    """On the GPU. The rule's own parameters stay in float32, which ours sees to and the other model does not."""
    own = {name: p.data for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    model.to("cuda", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = own[name].cuda()
    return model


def logits_and_loss(model, tokens):
    """In evaluation mode and without a cache, where flash-linear-attention computes what it means to."""
    with torch.no_grad():
        output = in_bf16(model).eval()(input_ids=tokens, labels=tokens, use_cache=False)
    return output.logits.double(), output.loss.item()


def assert_same(ours, theirs):
    """bf16 through three layers; a token whose second choice of memory hangs on rounding may differ by more."""
    (logits, loss), (their_logits, their_loss) = ours, theirs
    error = (logits - their_logits).norm(dim=-1) / their_logits.norm(dim=-1)
    assert error.median() <= 2e-2 and (error > 5e-2).double().mean() <= 0.05
    assert loss == pytest.approx(their_loss, rel=1e-2)


@torch.no_grad()
def decided(model):
    """With larger logits: those of new weights are so small that the loss is the vocabulary's logarithm."""
    model.lm_head.weight.mul_(10)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_computes_the_same_there(variant, tmp_path):
    import fla.models

    torch.manual_seed(0)
    ours = decided(MomForCausalLM(MomConfig(**SIZES, **variant)))
    ours.save_pretrained(tmp_path)
    theirs = fla.models.MomForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(SIZES["vocab_size"], (2, 200), device="cuda")
    assert_same(logits_and_loss(ours, tokens), logits_and_loss(theirs, tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_own_model_computes_the_same_here(variant, tmp_path):
    import fla.models

    torch.manual_seed(0)
    theirs = decided(fla.models.MomForCausalLM(fla.models.MomConfig(**SIZES, **variant)))
    theirs.save_pretrained(tmp_path)
    ours = MomForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(SIZES["vocab_size"], (2, 200), device="cuda")
    assert_same(logits_and_loss(ours, tokens), logits_and_loss(theirs, tokens))
