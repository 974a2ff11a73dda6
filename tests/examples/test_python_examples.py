"""The Python examples run on a CPU: their losses fall, and what they write can be read again."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from example_models import TEXT, save_export

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_layer_in_a_plain_loop_learns_and_writes(capsys):
    small = "--steps 20 --batch 4 --length 64 --hidden 32 --layers 1 --write 5 --device cpu"
    losses = example("train_layer").main(small.split())
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert "states of all layers: " in capsys.readouterr().out


def test_generation_with_states_follows_one_forward_pass():
    module = example("train_layer")
    torch.manual_seed(0)
    model = module.LanguageModel(hidden=32, layers=2).double()
    tokens = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        whole, _, _ = model(tokens)
        _, states, _ = model(tokens[:, :19], output_states=True)
        last, _, _ = model(tokens[:, 19:], states, output_states=True)
    torch.testing.assert_close(last, whole[:, 19:])


def test_fine_tuning_with_adapters_changes_the_export(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    save_export(tmp_path / "hf")
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(3):
        (texts / f"{index}.txt").write_text(TEXT)
    words = ["--load", tmp_path / "hf", "--text", texts, "--output", tmp_path / "tuned", "--lr", "3e-2"]
    words += "--steps 10 --batch 2 --length 32".split()
    losses = example("finetune_lora").main([str(word) for word in words])
    assert losses[-1] < losses[0] - 0.1
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "tuned"))
    assert before.state_dict().keys() == after.state_dict().keys()
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert "model.layers.0.attn.k_proj.0.weight" in changed and "model.layers.0.attn.shared_v.weight" in changed
    assert not any("conv1d" in name or "o_norm" in name for name in changed)
    assert (tmp_path / "tuned/modeling_mom.py").is_file()


def test_a_rule_of_ones_own_in_every_command(tmp_path):
    """examples/own_rule.py is the program: the loss falls, and the model goes to Hugging Face's format and back."""
    words = (
        "pretrain --token-mixer leaky --mom-num-heads 2 --mom-head-dim 16 --num-layers 1 --hidden-size 32 "
        "--num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 4 "
        "--global-batch-size 4 --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
        "--attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --log-interval 1 --eval-iters 0 --eval-interval 100 "
        "--no-create-attention-mask-in-dataloader --mock-data --train-iters 8 --tokenizer-type NullTokenizer "
        "--vocab-size 127 --make-vocab-size-divisible-by 64 --save saved --save-interval 8"
    ).split()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, env=environment
        )  # fmt: skip

    done = run(EXAMPLES / "own_rule.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "leaky, one memory" in done.stdout and "the update rule leaky has no kernels" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 8 and losses[-1] < losses[0]

    export = "convert-to-hf --load saved --save hf".split()
    refused = run("-m", "linear_moe.cli", *export)
    assert refused.returncode == 1 and not (tmp_path / "hf").exists()
    assert "error: the checkpoint has --mom-rule leaky: unknown memory rule 'leaky'" in refused.stderr
    assert "must be registered first, in the same process, by mom_layers.register_rule" in refused.stderr
    done = run(EXAMPLES / "own_rule.py", *export)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "hf/config.json").read_text())["mom_backend"] == "leaky"
    done = run(EXAMPLES / "own_rule.py", "convert-from-hf", "--load", "hf", "--save", "back")
    assert done.returncode == 0, done.stderr[-2000:]
