"""An export of a Megatron checkpoint in other libraries: Trainer, PEFT, TRL and accelerate, from folder to folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linear_moe.commands import convert_from_hf, convert_to_hf, generate
from mom_layers.hf import MomConfig, MomForCausalLM

ROOT = Path(__file__).parents[2]

# Three steps of four rows. Writes the steps' losses to losses.json and saves the model.
TRAIN = """
import json, sys
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from mom_layers.hf import MomForCausalLM
torch.set_num_threads(1)
export, out, accumulation = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokens = torch.randint(300, (12, 24), generator=torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    out, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, logging_steps=1,
    report_to=[], save_strategy="no", learning_rate=1e-2, use_cpu=True, seed=0, dataloader_pin_memory=False,
    disable_tqdm=True, lr_scheduler_type="constant", ddp_find_unused_parameters=False,
)
trainer = Trainer(
    MomForCausalLM.from_pretrained(export), arguments, processing_class=AutoTokenizer.from_pretrained(export),
    data_collator=default_data_collator,
    train_dataset=[{"input_ids": row, "labels": row.clone()} for row in tokens],
)
trainer.train()
trainer.save_model(out)
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    open(out + "/losses.json", "w").write(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def export(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_heads": 2, "head_dim": 16, "num_memories": 3, "topk": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    MomForCausalLM(MomConfig(**sizes)).save_pretrained(folder / "model")
    shutil.copytree(tokenizer_folder, folder / "model", dirs_exist_ok=True)
    assert convert_from_hf.main(["--load", str(folder / "model"), "--save", str(folder / "megatron")]) == 0
    assert convert_to_hf.main(["--load", str(folder / "megatron"), "--save", str(folder / "hf")]) == 0
    return folder / "hf"


def writes_text(folder: Path) -> bool:
    return generate.main(["--load", str(folder), "--prompt", "The memory", "--max-new-tokens", "2", "--greedy"]) == 0


def test_trainer_with_accumulation_and_two_processes(export, tmp_path):
    losses, models = [], []
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for processes, accumulation in ((1, 4), (2, 2)):
        out = tmp_path / f"{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        words = [sys.executable, *launcher, script, export, out, accumulation]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=250, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(json.loads((out / "losses.json").read_text()))
        models.append(MomForCausalLM.from_pretrained(out).state_dict())
        assert writes_text(out)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    before = MomForCausalLM.from_pretrained(export).state_dict()
    assert not torch.allclose(models[0]["lm_head.weight"], before["lm_head.weight"])


def test_adapters_on_all_linear_layers_merged_and_exported(export, tmp_path, capsys):
    import peft

    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(export),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(export).save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert writes_text(tmp_path / "merged")
    words = ["--load", str(tmp_path / "merged"), "--save", str(tmp_path / "megatron")]
    assert convert_from_hf.main(words) == 0, capsys.readouterr().err
    words = ["--load", str(tmp_path / "megatron"), "--save", str(tmp_path / "again"), "--verify"]
    assert convert_to_hf.main(words) == 0, capsys.readouterr().err


def test_trl_packs_documents(export, tmp_path):
    import trl
    from datasets import Dataset

    rows = [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 3, 12, 7, 6)]
    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=16, padding_free=True, max_steps=1, per_device_train_batch_size=8,
        learning_rate=0.0, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(export)
    model.config.aux_loss_scale = 0.0
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=AutoTokenizer.from_pretrained(export),
    )  # fmt: skip
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with torch.no_grad():
        alone = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    assert loss == pytest.approx((sum(alone) / sum(len(row) - 1 for row in rows)).item(), abs=2e-3)


def test_layers_on_the_disk(export, tmp_path):
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    places = {"model.embeddings": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(export, device_map=places, offload_folder=tmp_path / "offloaded")
    whole = AutoModelForCausalLM.from_pretrained(export)
    assert loaded.model.layers[0].attn.k_proj[0].weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)
    generated = loaded.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, whole.generate(tokens, max_new_tokens=3, do_sample=False))
