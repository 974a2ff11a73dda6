"""Exports load in flash-linear-attention (FLA), and FLA's models load here: on a GPU, where FLA is installed.

Not on a CPU: there FLA 0.6.0 sorts tokens by memory with an unstable sort, and mixes up their order.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from linear_moe.commands import convert_from_hf
from linear_moe.conversion.checkpoint import find_checkpoint
from linear_moe.conversion.verify import compare
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
# In bf16 with as many memories as choices: its router rounds its logits, and a token that changes memory changes all
# later tokens of both.
CASES = [(variant, torch.float32) for variant in VARIANTS] + [({"num_memories": 2, "topk": 2}, torch.bfloat16)]


def logits(model, tokens, dtype):
    """Logits in evaluation mode and without a cache, where FLA's computation is right.

    The rule's own parameters stay in float32: a cast of FLA's model would round them, so they are set again here.
    """
    own = {name: p.data for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    model.to("cuda", dtype).eval()
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = own[name].cuda()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double()


MEGATRON_LOGITS = """
import sys, torch
from pathlib import Path
from linear_moe.conversion.verify import megatron_logits
folder, tokens, logits = sys.argv[1:]
torch.save(megatron_logits(Path(folder), torch.load(tokens), torch.float32), logits)
"""


def megatron_logits_without_a_gpu(folder, tokens, tmp_path):
    """Logits of Megatron's model in a process without a GPU, as ``convert_to_hf.py --verify`` computes them."""
    files = tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(tokens, files[0])
    command = [sys.executable, "-c", MEGATRON_LOGITS, folder, *files]
    subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=120)
    return torch.load(files[1])


def assert_same(ours, theirs, dtype):
    """Up to 64 tokens FLA's recurrence runs token by token, in float32 too; its chunked recurrence takes bf16 only."""
    length, bound = (60, 1e-3) if dtype is torch.float32 else (200, 0.1)
    tokens = torch.randint(SIZES["vocab_size"], (2, length), device="cuda")
    y, their_y = logits(ours, tokens, dtype), logits(theirs, tokens, dtype)
    error = (y - their_y).norm(dim=-1) / their_y.norm(dim=-1)
    print(f"relative errors of a token's logits: {error.median():.2e} (median) to {error.max():.2e}")
    assert error.max() <= bound, f"relative errors {error.median():.2e} (median) to {error.max():.2e}"


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_an_export_computes_the_same_in_fla(variant, dtype, tmp_path):
    import fla.models

    torch.manual_seed(0)
    ours = MomForCausalLM(MomConfig(**SIZES, **variant))
    ours.save_pretrained(tmp_path)
    theirs = fla.models.MomForCausalLM.from_pretrained(tmp_path)
    assert_same(ours, theirs, dtype)


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_a_model_of_fla_computes_the_same_here(variant, dtype, tmp_path):
    import fla.models

    torch.manual_seed(0)
    theirs = fla.models.MomForCausalLM(fla.models.MomConfig(**SIZES, **variant))
    theirs.save_pretrained(tmp_path)
    ours = MomForCausalLM.from_pretrained(tmp_path)
    assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("variant", [{}, {"shared_mem": False}, {"num_memories": 8, "topk": 1}])
def test_a_model_of_fla_has_the_same_loss_in_megatron(variant, tmp_path):
    """Megatron computes in float32 on the CPU, hence the bound of its 60 tokens on the GPU."""
    import fla.models

    torch.manual_seed(0)
    theirs = fla.models.MomForCausalLM(fla.models.MomConfig(**SIZES, **variant))
    theirs.save_pretrained(tmp_path / "theirs")
    release = tmp_path / "release"
    assert convert_from_hf.main(["--load", str(tmp_path / "theirs"), "--save", str(release)]) == 0
    tokens = torch.randint(SIZES["vocab_size"], (2, 60))
    expected = logits(theirs, tokens.cuda(), torch.float32).cpu()
    got = megatron_logits_without_a_gpu(find_checkpoint(release, None), tokens, tmp_path)
    difference = compare(got[..., : SIZES["vocab_size"]], expected, tokens)
    print(f"against Megatron: {difference}")
    assert difference.relative < 1e-3 and difference.loss < 1e-4
