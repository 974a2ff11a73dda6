"""Exports load in flash-linear-attention, and its models in ours: on a GPU where that package is installed."""

import importlib.util

import pytest
import torch

from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.modeling_mom import MomForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not importlib.util.find_spec("fla"), reason="needs flash-linear-attention"
    ),
]
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
}
VARIANTS = [{}, {"shared_mem": False}, {"single_kv_proj": True}, {"num_memories": 8, "topk": 1}]


def logits_of(model, tokens):
    """In evaluation mode and without a cache, where flash-linear-attention computes what it means to."""
    with torch.no_grad():
        return model.to("cuda", torch.bfloat16).eval()(input_ids=tokens, use_cache=False).logits.double()


def assert_close(ours, theirs):
    """bf16 through three layers; a token whose second choice of memory hangs on rounding may differ by more."""
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.median() <= 2e-2 and (error > 5e-2).double().mean() <= 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_gives_the_same_logits_there(variant, tmp_path):
    import fla.models

    torch.manual_seed(0)
    ours = MomForCausalLM(MomConfig(**SIZES, **variant))
    ours.save_pretrained(tmp_path)
    theirs = fla.models.MomForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(SIZES["vocab_size"], (2, 200), device="cuda")
    assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_own_model_gives_the_same_logits_here(variant, tmp_path):
    import fla.models

    torch.manual_seed(0)
    theirs = fla.models.MomForCausalLM(fla.models.MomConfig(**SIZES, **variant))
    theirs.save_pretrained(tmp_path)
    ours = MomForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(SIZES["vocab_size"], (2, 200), device="cuda")
    assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))
