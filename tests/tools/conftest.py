import json
from pathlib import Path

import pytest

from linear_moe.commands import preprocess_data
from linear_moe.corpus import tokenizer as corpus_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"

STORIES = [
    "The memory of a sequence is a matrix.\n\nEach token writes a little of it.\n",
    "def forward(self, x):\n    return self.out(x)  # [B, T, D]\n",
    "Ein Gedächtnis, mehrere Zustände: 記憶 🙂\ttab and  two spaces\r\n",
    "1 2 3 4 5 6 7 8 9 10\n" * 20,
] + [f"Document {i}: router {i * 7 % 11}, memory {i * 5 % 13}.\n" * (i % 5 + 1) for i in range(60)]


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return STORIES


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    corpus_tokenizer.save_trained_tokenizer(corpus_tokenizer.train_tokenizer(STORIES, 400, folder), folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    """The stories as JSON lines, a line for each story."""
    path = tmp_path / "in" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return path


@pytest.fixture
def run(tmp_path, tokenizer_folder):
    """Runs the tool in this process; the output prefix is tmp_path/out/data."""

    def run_tool(source, *options, output=tmp_path / "out" / "data", workers=1, tokenizer=("--tokenizer",)):
        if tokenizer == ("--tokenizer",):
            tokenizer = ("--tokenizer", tokenizer_folder)
        argv = ["--input", source, "--output", output, "--workers", workers, *tokenizer, *options]
        return preprocess_data.main([str(argument) for argument in argv])

    return run_tool
