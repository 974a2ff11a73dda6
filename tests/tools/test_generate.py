"""Text out of exports and Megatron checkpoints."""

import io
import json
import re

import pytest
import torch
from test_convert_names import random_model
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from linear_moe.commands import convert_from_hf, generate
from linear_moe.conversion.files import load_tokenizer
from linear_moe.conversion.loading import load_model
from linear_moe.vocabulary import document_start, encode_texts

PROMPTS = ["The memory of a sequence", "Each token", "def forward(self, x):"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    """A hybrid model with a tokenizer: the state of its MoM layers is constant, that of the other one grows."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    random_model(folder, vocab_size=400, attn={"layers": [1], "num_heads": 2})
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "checkpoint"
    assert convert_from_hf.main(["--load", str(model), "--save", str(folder)]) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Runs the tool; returns what it printed on standard output and standard error."""

    def run(load, *options, status=0):
        capsys.readouterr()
        assert generate.main(["--load", str(load), *map(str, options)]) == status
        return capsys.readouterr()

    return run


GREEDY = ("--greedy", "--max-new-tokens", 12, "--ignore-eos")


def test_export_and_checkpoint_write_the_same(run, model, checkpoint):
    text = run(model, "--prompt", PROMPTS[0], *GREEDY).out
    assert text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0])
    assert run(checkpoint, "--prompt", PROMPTS[0], *GREEDY).out == text


def test_greedy_is_the_models_argmax(run, model, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    network = load_model(model)
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROMPTS[0])["input_ids"]]])
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, network(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert run(model, "--prompt", PROMPTS[0], *GREEDY).out == expected + "\n"


def test_a_batch_writes_what_its_prompts_write_alone(run, model):
    alone = [run(model, "--prompt", prompt, *GREEDY).out for prompt in PROMPTS]
    together = run(model, "--prompt", *PROMPTS, *GREEDY)
    assert together.out == "".join(f"[{index}] {text}" for index, text in enumerate(alone))
    assert "for a batch of 3" in together.err


def test_skip_prompt(run, model):
    whole = run(model, "--prompt", PROMPTS[0], *GREEDY).out
    assert PROMPTS[0] + run(model, "--prompt", PROMPTS[0], "--skip-prompt", *GREEDY).out == whole
    batch = run(model, "--prompt", PROMPTS[0], "A", "--skip-prompt", *GREEDY).out
    assert batch.startswith("[0] " + whole.removeprefix(PROMPTS[0]))


def test_sampling(run, model):
    sampled = ("--prompt", PROMPTS[0], "--max-new-tokens", 12, "--temperature", 2)
    texts = [run(model, *sampled, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    only_one = run(model, *sampled, "--top-k", 1, "--ignore-eos").out
    assert only_one == run(model, "--prompt", PROMPTS[0], *GREEDY).out
    assert run(model, *sampled, "--top-p", 1e-6, "--ignore-eos").out == only_one


def test_prompts_from_files_and_standard_input(run, model, tmp_path, monkeypatch):
    files = [tmp_path / f"{index}.txt" for index in range(len(PROMPTS))]
    for file, prompt in zip(files, PROMPTS, strict=True):
        file.write_text(prompt + "\n")
    expected = run(model, "--prompt", *PROMPTS, *GREEDY).out
    assert run(model, "--prompt-file", *files, *GREEDY).out == expected
    files[0].write_text("\n\n".join(PROMPTS))
    assert run(model, "--prompt-file", files[0], "--lines", *GREEDY).out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert run(model, *GREEDY).out == run(model, "--prompt", PROMPTS[1], *GREEDY).out


def test_report(run, model):
    def state(tokens):
        err = run(model, "--prompt", PROMPTS[0], "--greedy", "--ignore-eos", "--max-new-tokens", tokens).err
        found = re.fullmatch(
            r"prompt: \d+ tokens in [\d.]+ s \([\d.]+ tokens/s\); generated: (\d+) tokens, [\d.]+ tokens/s; "
            r"state: (\d+) bytes\n", err,
        )  # fmt: skip
        assert int(found[1]) == tokens
        return int(found[2])

    keys_and_values = 2 * 32 * 4  # one softmax layer, hidden size 32, float32
    assert state(20) - state(10) == 10 * keys_and_values


def test_end_of_document_ends_a_sequence(run, model, tmp_path):
    """A model that always writes the end token."""
    ending = load_model(model)
    end = load_tokenizer(model).eos_token_id
    with torch.no_grad():
        ending.lm_head.weight.zero_()
        ending.model.norm.weight.zero_()
    ending.save_pretrained(tmp_path)
    assert end == 0  # of equal logits the first wins
    result = run(tmp_path, "--prompt", *PROMPTS, "--greedy", "--tokenizer", model)
    assert result.out == "".join(f"[{index}] {prompt}\n" for index, prompt in enumerate(PROMPTS))
    assert "generated: 3 tokens" in result.err


def test_empty_prompt_starts_a_document(run, model):
    assert run(model, "--prompt", "", *GREEDY).out.strip()


def test_older_configurations_are_completed_from_the_tensors(run, tokenizer_folder, tmp_path):
    random_model(tmp_path, vocab_size=400, single_kv_proj=True)
    words = ("--tokenizer", tokenizer_folder, "--prompt", "A", *GREEDY)
    expected = run(tmp_path, *words).out
    config = json.loads((tmp_path / "config.json").read_text())
    del config["single_kv_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(tmp_path, *words).out == expected


@pytest.fixture
def prompts_read(monkeypatch, model):
    """What the model is given: token ids of a prompt. The model of the folder runs all the same."""
    seen = []
    load = generate.load_model

    def loaded(*arguments):
        network = load(*arguments)
        write = network.generate
        network.generate = lambda input_ids, **options: seen.append(input_ids.tolist()) or write(input_ids, **options)
        return network

    monkeypatch.setattr(generate, "load_model", loaded)
    return seen


def test_prompts_start_a_document(run, model, prompts_read, tokenizer_folder, tmp_path):
    """With the tokens of the text alone, after the end-of-document token: a document in a corpus is no other."""
    plain = load_tokenizer(model)
    ids = encode_texts(plain, [PROMPTS[0]])[0]
    run(model, "--prompt", PROMPTS[0], *GREEDY)
    run(model, "--prompt", PROMPTS[0], "--no-document-start", *GREEDY)
    assert prompts_read == [[[plain.eos_token_id, *ids]], [ids]]

    with_template = load_tokenizer(tokenizer_folder)  # puts a token of its own before every text, as Mistral's does
    with_template.add_special_tokens({"bos_token": "<s>"})
    with_template.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_template.bos_token_id)]
    )
    with_template.save_pretrained(tmp_path / "template")
    assert load_tokenizer(tmp_path / "template")("x y").input_ids[0] == with_template.bos_token_id
    run(model, "--tokenizer", tmp_path / "template", "--prompt", PROMPTS[2], *GREEDY)
    assert prompts_read[-1] == [[plain.eos_token_id, *encode_texts(with_template, [PROMPTS[2]])[0]]]


def test_tokenizers_without_an_end_of_document(run, model, prompts_read, tmp_path):
    """Nothing stands before the prompt, and an empty prompt is refused."""
    tokenizer = load_tokenizer(model)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path)
    assert document_start(bare) == []
    text = run(model, "--tokenizer", tmp_path, "--prompt", PROMPTS[0], *GREEDY).out
    assert text.startswith(PROMPTS[0]) and prompts_read == [[encode_texts(tokenizer, [PROMPTS[0]])[0]]]
    assert "the prompt is empty" in run(model, "--tokenizer", tmp_path, "--prompt", "", status=1).err
    assert "the prompt is empty" in run(model, "--no-document-start", "--prompt", "", status=1).err


def test_sep_ends_a_document_where_there_is_no_eos(run, model, prompts_read, tmp_path):
    tokenizer = load_tokenizer(model)
    sep = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, sep_token=tokenizer.eos_token)
    sep.save_pretrained(tmp_path)
    assert run(model, "--tokenizer", tmp_path, "--prompt", "A", *GREEDY).out == run(model, "--prompt", "A", *GREEDY).out
    assert prompts_read[0] == prompts_read[1] and prompts_read[0][0][0] == tokenizer.eos_token_id


def test_dtype(run, model):
    assert run(model, "--prompt", PROMPTS[0], "--dtype", "bfloat16", *GREEDY).out.startswith(PROMPTS[0])


def test_the_checkpoint_is_left_as_it_was(run, checkpoint):
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    run(checkpoint, "--prompt", "A", *GREEDY)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def test_errors(run, model, checkpoint, tmp_path, monkeypatch):
    def error(load, *options):
        *_, line = run(load, *options, status=1).err.splitlines()
        assert line.startswith("generate.py: error: ")
        return line

    assert "no such folder" in error(tmp_path / "nothing", "--prompt", "A")
    assert "iter_0000009" in error(checkpoint, "--prompt", "A", "--iteration", 9)
    random_model(tmp_path / "bare")
    assert "has no tokenizer" in error(tmp_path / "bare", "--prompt", "A")
    assert "vocabulary has 40" in error(tmp_path / "bare", "--tokenizer", model, "--prompt", "router")
    assert "No such file" in error(model, "--prompt-file", tmp_path / "nothing.txt")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    assert "no line with text" in error(model, "--lines")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert "not a Mixture-of-Memories model" in error(tmp_path / "other", "--prompt", "A")


@pytest.mark.parametrize("option", ["--temperature=0", "--top-p=2", "--top-k=-1", "--max-new-tokens=0", "--seed=x"])
def test_wrong_options(model, option, capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main(["--load", str(model), option])
    assert exit.value.code == 2 and option.split("=")[0] in capsys.readouterr().err
