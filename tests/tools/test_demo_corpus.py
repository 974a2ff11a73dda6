import json

import pytest

from linear_moe.commands import demo_corpus


def test_demo_corpus(tmp_path, capsys):
    output = tmp_path / "data" / "corpus.jsonl"
    assert demo_corpus.main(["--output", str(output), "--max-bytes", "3000000"]) == 0
    assert 2_500_000 < output.stat().st_size <= 3_000_000
    documents = [json.loads(line) for line in output.read_text().splitlines()]
    paths = [document["path"] for document in documents]
    assert len(set(paths)) == len(documents) > 100
    assert any(path.startswith("pydoc_data/topics/") for path in paths)
    assert not [path for path in paths if "encodings/" in path or "/test" in path or "site-packages" in path]
    assert min(len(document["text"]) for document in documents) >= demo_corpus.SHORTEST_TEXT

    first = output.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        demo_corpus.main(["--output", str(output)])
    assert exit_.value.code == 2 and "corpus.jsonl exists" in capsys.readouterr().err
    assert demo_corpus.main(["--output", str(output), "--max-bytes", "3000000", "--overwrite"]) == 0
    assert output.read_bytes() == first
    assert [path.name for path in output.parent.iterdir()] == ["corpus.jsonl"]


def test_a_bare_installation_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "os.py").write_text("# a comment\n" * 100)
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(demo_corpus, "help_topics", lambda: iter(()))
    assert demo_corpus.main(["--output", str(tmp_path / "x.jsonl")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "expected at least 1000000" in error
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    "options, message",
    [(["--max-bytes", "999"], "--max-bytes 999: expected at least"), (["--output", "x.txt"], "ends in .jsonl")],
)
def test_wrong_command_line(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        demo_corpus.main(["--output", str(tmp_path / "x.jsonl"), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
