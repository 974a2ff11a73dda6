"""Training with transformers' Trainer and TRL: the losses of a step do not depend on how the step is split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import random_tokens, tiny_model

TESTS = Path(__file__).parents[1]

# Eight rows in one step, by one process or two, in the given number of micro-batches. Prints the step's loss.
TRAIN = """
import json, sys
sys.path[:0] = sys.argv[4:]
import torch
from hf_models import random_tokens, tiny_model
from transformers import Trainer, TrainingArguments
torch.set_num_threads(1)
rows, micro_batch, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tokens = random_tokens(8, 16)
data = [{"input_ids": row, "labels": row.clone()} for row in tokens]
for index, row in enumerate(data):
    row["labels"][: index + 1] = -100  # every row has another number of targets
model = tiny_model(aux_loss_scale=0.5)
arguments = TrainingArguments(
    out, max_steps=1, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch,
    logging_steps=1, report_to=[], save_strategy="no", learning_rate=0.0, use_cpu=True, seed=0,
    dataloader_pin_memory=False, disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    open(out + "/loss.json", "w").write(json.dumps(loss))
"""


def test_the_balancing_loss_is_weighted_by_the_share_of_the_step():
    model, tokens = tiny_model(aux_loss_scale=0.5).train(), random_tokens(6, 12)
    labels = tokens.clone()
    labels[:3, :7] = -100
    total = (labels[:, 1:] != -100).sum()
    added, plain, balancing = 0.0, 0.0, 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        given = {"input_ids": tokens[part], "labels": labels[part]}
        out = model(**given, num_items_in_batch=total)
        share = (labels[part][:, 1:] != -100).sum() / total
        added = added + out.loss
        plain = plain + share * (model(**given).loss - 0.5 * out.aux_loss)
        balancing = balancing + share * out.aux_loss
    torch.testing.assert_close(added, plain + 0.5 * balancing)


@pytest.mark.parametrize("processes,micro_batch", [(1, 8), (1, 1), (2, 1)])
def test_the_trainers_loss_does_not_depend_on_the_split(processes, micro_batch, tmp_path):
    """One batch of eight rows, eight micro-batches of one, and two processes with four rows have the same loss, to a
    tenth of the balancing loss, which is not linear in the rows."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    words = [str(8 // processes), str(micro_batch), str(tmp_path), str(TESTS), str(TESTS / "hf")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *words], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (loss,) = json.loads((tmp_path / "loss.json").read_text())

    model, tokens = tiny_model(aux_loss_scale=0.5).train(), random_tokens(8, 16)
    labels = tokens.clone()
    for index in range(8):
        labels[index, : index + 1] = -100
    out = model(tokens, labels=labels)
    assert abs(loss - out.loss.item()) <= 0.1 * 0.5 * out.aux_loss.item()


def test_trl_packing_gives_the_documents_loss(tmp_path):
    """SFT on packed rows has the loss of the documents without packing."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = tiny_model(aux_loss_scale=0.0)
    rows = [random_tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 3, 12, 7, 6)]
    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=16, padding_free=True, max_steps=1, per_device_train_batch_size=8,
        learning_rate=0.0, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, dataset_kwargs={"skip_prepare_dataset": False}, gradient_checkpointing=False,
        bf16=False,
    )  # fmt: skip
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(i): i for i in range(61)}, "0")), eos_token="2", pad_token="0"
    )
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with torch.no_grad():
        model.train()
        sums = [(model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1)) for row in rows]
    assert abs(loss - (sum(sums) / sum(len(row) - 1 for row in rows)).item()) < 2e-3
