"""Fine-tuning on chats (--sft): packed rows beside unpacked ones, over context-parallel ranks and pipeline stages."""

import json

import pytest
import torch
import training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linear_moe.conversion.files import copy_tokenizer, load_tokenizer
from linear_moe.parallel.document_order import places, tokens_of_rank

WORDS = "one two three four five six seven eight nine ten System User Assistant".split()
SPECIAL = ["<unk>", "<eos>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<SPECIAL_233>"]
LENGTH = 32


def chats():
    """Conversations that count, of different lengths, each with a system message."""
    for first in range(4):
        for turns in (1, 2):
            said = [WORDS[(first + i) % 10] for i in range(2 * turns)]
            talk = [{"role": ("user", "assistant")[i % 2], "content": " ".join([w] * 2)} for i, w in enumerate(said)]
            yield [{"role": "system", "content": "count"}, *talk]


@pytest.fixture(scope="module")
def chat_files(tmp_path_factory):
    """Arguments of the tokenizer, and a folder with a file of packed rows (two chats each) and one of a chat a row."""
    folder = tmp_path_factory.mktemp("chats")
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS + ["count"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.save_pretrained(folder / "tokenizer")
    every = list(chats())
    rows = {"packed": [a + b for a, b in zip(every[::2], every[1::2], strict=True)], "unpacked": every}
    for name, lines in rows.items():
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in lines)
        (folder / f"{name}.jsonl").write_text(text)
    words = ["--tokenizer-type", "SFTTokenizer", "--tokenizer-model", folder / "tokenizer", "--sft"]
    return words, folder


def fine_tune(chat_files, folder, rows, *arguments, ranks=1, **options):
    """Losses of six steps, each over all conversations of the file in one order. The routers' losses are off: they
    count padding, of which there is more in rows that are not packed.
    """
    words, files = chat_files
    batch = {"packed": 4, "unpacked": 8}[rows]
    data = ["--data-path", files / f"{rows}.jsonl", "--global-batch-size", batch, "--calculate-per-token-loss"]
    common = ["--seq-length", LENGTH, "--train-iters", 6, "--no-create-attention-mask-in-dataloader"]
    common += ["--mom-aux-loss-coeff", 0, "--mom-z-loss-coeff", 0, "--padded-vocab-size", 64, *arguments]
    return training.launch(ranks, [*words, *data, "--micro-batch-size", 1, *common], folder, **options)


def test_packed_chats_give_the_losses_of_unpacked_ones(chat_files, tmp_path):
    unpacked = fine_tune(chat_files, tmp_path / "unpacked", "unpacked")
    packed = fine_tune(chat_files, tmp_path / "packed", "packed")
    assert packed == pytest.approx(unpacked, rel=1e-5)
    assert packed[6] < packed[1] - 0.2
    both = fine_tune(chat_files, tmp_path / "two rows", "packed", "--micro-batch-size", 2)
    assert both == pytest.approx(unpacked, rel=1e-5)


def cut_every_document():
    """As with softmax layers, and in Megatron-LM's own scripts: no contiguous slices."""
    from linear_moe.entry import data

    data.cuts_contiguously = lambda args: False


@pytest.mark.parametrize(
    ("ranks", "arguments", "prepare"),
    [
        (2, training.CP2, None),
        (2, training.CP2, cut_every_document),
        (4, [*training.CP2, *training.TP2, *training.SP], cut_every_document),
        (2, [*training.CP2, "--micro-batch-size", 2], cut_every_document),
    ],
    ids=["CP2", "CP2, every document cut", "CP2+TP2+SP, every document cut", "CP2, two rows, every document cut"],
)
def test_packed_chats_over_context_parallel_ranks(chat_files, tmp_path, ranks, arguments, prepare):
    one = fine_tune(chat_files, tmp_path / "one", "packed")
    several = fine_tune(chat_files, tmp_path / "several", "packed", *arguments, ranks=ranks, prepare=prepare)
    assert several == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("sft", [True, False], ids=["chats", "documents"])
def test_micro_batches_of_packed_rows_over_pipeline_stages(chat_files, documents, tmp_path, sft):
    def run(name, *arguments, ranks=1, **options):
        if sft:
            return fine_tune(chat_files, tmp_path / name, "packed", *arguments, ranks=ranks, **options)
        data = ["--data-path", documents, "--train-iters", 6, "--dataloader-inter-document-masking"]
        return training.launch(ranks, [*data, *arguments], tmp_path / name, **options)

    run("start", "--lr", 0, save_at=(1,))
    rows = ["--micro-batch-size", 2, "--load", tmp_path / "start", "--finetune", "--no-load-optim", "--no-load-rng"]
    assert run("two", *rows, *training.PP2, ranks=2) == pytest.approx(run("one", *rows), rel=1e-5)
    assert "pipeline stages send shapes" in (tmp_path / "two" / "rank_0.txt").read_text()


def test_a_chat_template_goes_through_a_conversion_and_back(chat_files, tmp_path):
    fast = load_tokenizer(chat_files[1] / "tokenizer")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(tmp_path / "trained")
    copy_tokenizer(tmp_path / "trained", tmp_path / "export", pads=False)
    copy_tokenizer(tmp_path / "export", tmp_path / "again", pads=False)
    chat = [{"role": "User", "content": "one two"}, {"role": "Assistant", "content": "three"}]
    for folder in ("export", "again"):
        exported = load_tokenizer(tmp_path / folder)
        assert exported.chat_template == fast.chat_template
        assert exported.apply_chat_template(chat, tokenize=False) == "User one two Assistant three "


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_document_is_cut_into_a_zigzag(ranks):
    lengths = [2 * ranks * n for n in (1, 3, 0, 2)]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    held = [[] for _ in range(ranks)]
    for first, length in zip(borders.tolist(), lengths, strict=False):
        chunk = length // (2 * ranks)
        for rank in range(ranks):
            for number in (rank, 2 * ranks - 1 - rank):
                held[rank] += range(first + number * chunk, first + (number + 1) * chunk)
    total = sum(lengths)
    assert [tokens_of_rank(borders, total, ranks, rank).tolist() for rank in range(ranks)] == held
    assert places(borders, total, ranks)[sum(held, [])].tolist() == list(range(total))
