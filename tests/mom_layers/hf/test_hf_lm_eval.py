"""lm-evaluation-harness on an export reports the model's own numbers. Needs the `lm_eval` package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mom_layers.hf import save_remote_code

pytest.importorskip("lm_eval", reason="pip install lm_eval")
TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.fixture
def documents():
    return [json.loads(line) for line in (TASKS / "recall.jsonl").read_text().splitlines()]


@pytest.fixture
def tokenizer(documents):
    words = sorted({word for document in documents for word in document["context"].split()})
    words += sorted({word for document in documents for word in document["choices"]} - set(words))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", "<other>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<end>", unk_token="<other>")


@torch.no_grad()
def test_lm_eval_gives_the_models_own_numbers(tmp_path, documents, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=1)
    export = tmp_path / "export"
    model.save_pretrained(export)
    tokenizer.save_pretrained(export)
    save_remote_code(export)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={export},trust_remote_code=True,dtype=float32",
        "--tasks", "recall_choice,recall_generate", "--include_path", str(TASKS), "--batch_size", "4",
        "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }  # fmt: skip
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]

    def samples(task):
        (path,) = (tmp_path / "results").rglob(f"samples_{task}_*.jsonl")
        return {sample["doc_id"]: sample["resps"] for sample in map(json.loads, path.read_text().splitlines())}

    choices, generated = samples("recall_choice"), samples("recall_generate")
    for number, document in enumerate(documents):
        context = tokenizer(document["context"], return_tensors="pt").input_ids
        for choice, response in zip(document["choices"], choices[number], strict=True):
            token = tokenizer.convert_tokens_to_ids(choice)
            expected = model(context).logits[0, -1].log_softmax(0)[token].item()
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)
        out = model.generate(context, max_new_tokens=5, do_sample=False, pad_token_id=0)
        alone = tokenizer.decode(out[0, context.shape[1] :], skip_special_tokens=True)
        assert generated[number][0][0].strip() == alone.strip()
