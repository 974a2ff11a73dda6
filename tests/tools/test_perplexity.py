import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from linear_moe.commands import perplexity
from linear_moe.tokens import encode_texts
from mom_layers.hf import MomConfig, MomForCausalLM

HYBRID = {"layers": [1], "num_heads": 2}


def tiny_model(vocab_size=50, attn=None):
    torch.manual_seed(0)
    config = MomConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=8, intermediate_size=24,
        initializer_range=0.2, max_position_embeddings=16, attn=attn,
    )  # fmt: skip
    return MomForCausalLM(config).eval()


@pytest.mark.parametrize("attn", [None, HYBRID])
def test_streamed_losses_are_those_of_one_forward(attn):
    model = tiny_model(attn=attn)
    windows = [torch.randint(0, 50, (76,)) for _ in range(3)]
    edges = np.array([0, 1, 10, 40, 75])
    with torch.no_grad():
        logits = model(torch.stack(windows)[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), torch.stack(windows)[:, 1:], reduction="none").double().numpy()
    for chunk_size, batch_size in ((7, 2), (75, 1), (1000, 3)):
        measured = perplexity.measure(model, windows, edges, chunk_size, batch_size)
        for i, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            np.testing.assert_allclose(measured.losses[:, i], losses[:, first:last].mean(1), rtol=1e-5)
        mean, error = measured.between(1, 40)
        assert mean == pytest.approx(losses[:, 1:40].mean(), rel=1e-5)
        assert error == pytest.approx(losses[:, 1:40].mean(1).std(ddof=1) / math.sqrt(3), rel=1e-4)


def test_state_does_not_grow_with_the_length():
    model = tiny_model()
    sizes = []
    for length in (16, 160):
        windows = [torch.randint(0, 50, (length + 1,))]
        sizes.append(perplexity.measure(model, windows, np.array([0, length]), 8).state_bytes)
    assert sizes[0] == sizes[1] > 0


def test_windows():
    texts = [torch.arange(10), torch.arange(100, 104)]
    starts = [int(w[0]) for w in perplexity.cut_windows(texts, 3, 2)]
    assert starts == [0, 2, 4, 6, 100]
    assert all(len(w) == 4 for w in perplexity.cut_windows(texts, 3, 2))
    assert [int(w[0]) for w in perplexity.cut_windows(texts, 3, 2, limit=2)] == [0, 4]


def test_bin_edges_cover_every_position():
    edges = perplexity.bin_edges(100, [48, 100])
    assert edges[0] == 0 and edges[-1] == 100 and 48 in edges and (np.diff(edges) > 0).all()
    assert len(edges) < 30


@pytest.fixture
def export(tmp_path, tokenizer_folder):
    folder = tmp_path / "export"
    tiny_model(400).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        if path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def book(tmp_path, stories):
    path = tmp_path / "book.txt"
    path.write_text("".join(stories))
    return path


def test_table_and_picture(export, book, tmp_path, capsys):
    picture = tmp_path / "plots" / "position.png"
    arguments = ["--load", str(export), "--text", str(book), "--stride", "100", "--output", str(picture)]
    assert perplexity.main([*arguments, "--max-length", "512", "--lengths", "16,100,512", "--batch-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if " to " in line and "past" not in line]
    assert [(int(row[0]), int(row[2])) for row in rows] == [(0, 15), (16, 99), (100, 511)]
    for row in rows:
        assert float(row[5]) == pytest.approx(math.exp(float(row[3])), rel=1e-3)
    assert rows[-1][-1] == "32.00"
    assert any(line.startswith("within the training length of 16") for line in lines)
    assert any(line.startswith("past it, to 512") for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert perplexity.main([*arguments, "--max-windows", "1", "--chunk-size", "100"]) == 0
    out = capsys.readouterr().out
    assert "1 windows of 512 tokens" in out and "bytes of state" in out


def test_a_text_starts_a_document(export, tmp_path, monkeypatch):
    """The end-of-document token stands before the text's own tokens, once a file."""
    (tmp_path / "a.txt").write_text("memory of a sequence " * 20)
    (tmp_path / "b.txt").write_text("Each token " * 40)
    tokenizer = AutoTokenizer.from_pretrained(export)
    expected = [encode_texts(tokenizer, [(tmp_path / name).read_text()])[0] for name in ("a.txt", "b.txt")]
    seen = []
    cut = perplexity.cut_windows
    monkeypatch.setattr(perplexity, "cut_windows", lambda texts, *rest: seen.append(texts) or cut(texts, *rest))
    command = ["--load", export, "--text", tmp_path / "a.txt", tmp_path / "b.txt", "--max-length", 16]
    command += ["--max-windows", 1, "--output", tmp_path / "plot.png"]
    assert perplexity.main(list(map(str, command))) == 0
    assert perplexity.main([*map(str, command), "--no-document-start"]) == 0
    started, bare = ([text.tolist() for text in texts] for texts in seen)
    assert bare == expected and started == [[tokenizer.eos_token_id, *text] for text in expected]


def test_what_cannot_be_measured(export, book, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("a b")
    cases = [
        (["--load", str(tmp_path), "--text", str(book)], "no config.json"),
        (["--load", str(export), "--text", str(short)], "the longest text has"),
        (["--load", str(export), "--text", str(book), "--max-length", "1000000"], "windows of 1000000 need"),
        (["--load", str(export), "--text", str(tmp_path / "absent.txt")], "absent.txt"),
    ]
    for arguments, message in cases:
        assert perplexity.main([*arguments, "--output", str(tmp_path / "x.png")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        perplexity.main(["--load", str(export), "--text", str(book), "--stride", "0"])
