"""lm-evaluation-harness on exports and Megatron checkpoints: the model's own numbers, the same through every door."""

import json
import os
from pathlib import Path

import pytest
import torch
import warm_python
from test_convert_names import random_model

from linear_moe.commands import convert_from_hf, evaluate
from linear_moe.conversion.files import load_tokenizer
from linear_moe.conversion.loading import load_model

pytest.importorskip("lm_eval", reason="pip install lm_eval")

from linear_moe.evaluation.harness import Backend, EvaluationError, HarnessModel  # noqa: E402
from linear_moe.evaluation.report import table  # noqa: E402
from linear_moe.evaluation.suites import SUITES  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
TASKS = REPOSITORY / "tests/mom_layers/hf/lm_eval_tasks"
WORDS = ("--tasks", "recall_choice", "recall_generate", "--include-path", str(TASKS), "--batch-size", "4")


class Request:
    def __init__(self, *args):
        self.args = args


class Letters:
    """A tokenizer of lower-case letters; 0 ends a document."""

    eos_token_id = 0
    sep_token_id = None

    def __call__(self, texts, **options):
        ids = [[ord(letter) - 96 for letter in text] for text in texts]
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, tokens):
        return "".join(chr(96 + token) for token in tokens)


class NextLetter(Backend):
    """Predicts the next letter of the alphabet with a logit of 3 above the others, and z ends the document."""

    tokenizer, vocabulary = Letters(), 27

    def __init__(self):
        self.read = []

    def reduce(self, tokens, function, shape):
        self.read.append(tokens)
        return function(3.0 * torch.nn.functional.one_hot((tokens + 1) % 27, 27).float())


RIGHT = 3 - torch.tensor([3.0] + [0.0] * 26).logsumexp(0).item()


@pytest.fixture
def letters():
    return HarnessModel(NextLetter(), max_length=16, batch_size=2)


def test_scores_are_sums_of_log_probabilities(letters):
    requests = [Request("abc", "de"), Request("abc", "dz"), Request("", "a"), Request("xy", "z")]
    scores = letters.loglikelihood(requests, disable_tqdm=True)
    expected = [(2 * RIGHT, True), (2 * RIGHT - 3, False), (RIGHT, True), (RIGHT, True)]
    for (value, right), (wanted, is_right) in zip(scores, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-5) and right is is_right


def test_a_context_follows_the_end_of_document_token(letters):
    letters.loglikelihood([Request("abc", "d")], disable_tqdm=True)
    assert letters.backend.read[-1].tolist() == [[0, 1, 2, 3]]
    alone = HarnessModel(NextLetter(), 16, 2, starts_documents=False)
    alone.loglikelihood([Request("abc", "d")], disable_tqdm=True)
    assert alone.backend.read[-1].tolist() == [[1, 2, 3]]


def test_a_long_context_loses_its_beginning(letters):
    letters.loglikelihood([Request("a" * 40 + "k", "l")], disable_tqdm=True)
    assert letters.backend.read[-1].tolist() == [[1] * 15 + [11]]


def test_a_rolling_score_counts_every_token_once(letters):
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    (value,) = letters.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    # The one wrong transition is from z to a: after z the end of a document is predicted. A window of 16 tokens may
    # begin anywhere.
    assert value == pytest.approx(len(text) * RIGHT - 3, abs=1e-3)


def test_generation_ends_at_a_stop_text_at_the_limit_and_at_the_end_of_a_document(letters):
    requests = [
        Request("a", {"until": ["f"], "max_gen_toks": 9}),
        Request("a", {"until": [], "max_gen_toks": 3}),
        Request("w", {"until": ["f"], "max_gen_toks": 9}),
    ]
    assert letters.generate_until(requests, disable_tqdm=True) == ["bcde", "bcd", "xyz"]


def test_refuses_what_it_cannot_do(letters):
    with pytest.raises(EvaluationError, match="samples"):
        letters.generate_until([Request("a", {"do_sample": True, "temperature": 0.7})], disable_tqdm=True)
    with pytest.raises(EvaluationError, match="larger --max-length"):
        letters.generate_until([Request("a", {"max_gen_toks": 16})], disable_tqdm=True)
    with pytest.raises(EvaluationError, match="empty continuation"):
        letters._loglikelihood_tokens([(("a", ""), [1], [])])


def test_ranks_read_different_rows_and_all_know_all_answers():
    class Rank(NextLetter):
        """Records what the rank answers; the other rank's answers are those of a second run."""

        ranks = 2

        def __init__(self, rank, answers):
            super().__init__()
            self.rank, self.answers, self.calls = rank, answers, 0

        def gather(self, values):
            self.calls += 1
            self.answers.setdefault(self.calls, {})[self.rank] = values
            known = self.answers[self.calls]
            return [known.get(rank, values) for rank in range(2)]

    requests = [Request("abcdefg"[: 1 + number % 7], "z" if number % 2 else "h") for number in range(9)]
    alone = HarnessModel(NextLetter(), 16, 4).loglikelihood(requests, disable_tqdm=True)
    answers = {}
    for rank in (0, 1, 0):  # the first rank's answers are complete when the second rank's are known
        backend = Rank(rank, answers)
        scores = HarnessModel(backend, 16, 2).loglikelihood(requests, disable_tqdm=True)
        assert sum(len(tokens) for tokens in backend.read) < len(requests)
    assert [right for _, right in scores] == [right for _, right in alone]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in alone], abs=1e-5)


def test_the_table_has_the_suites_average_and_the_papers():
    suite = SUITES["recall"]
    results = {task: {"alias": task, f"{metric},none": 0.25} for task, metric in suite.tasks.items()}
    text = table(results, suite)
    assert "| average | fda, swde, squad_completion, nq_open, triviaqa, drop | 25.00 | |" in text and "28.16" in text
    del results["drop"]
    assert "| average" not in table(results, suite)


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer_folder):
    """MoM layers and a softmax layer, with a tokenizer."""
    folder = tmp_path_factory.mktemp("evaluate") / "export"
    random_model(folder, vocab_size=400, attn={"layers": [1], "num_heads": 2})
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_export(export, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "export.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)
        assert evaluate.main(["--load", str(export), *WORDS, "--output", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("ranks,words", [(1, ()), (2, ("--tensor-model-parallel-size", "2")), (2, ())])
def test_checkpoint_and_export_give_the_same_numbers(export, of_export, tmp_path, ranks, words):
    assert convert_from_hf.main(["--load", str(export), "--save", str(tmp_path / "checkpoint")]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= warm_python.ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    words = ["-m", "linear_moe.commands.evaluate", "--load", tmp_path / "checkpoint", *WORDS, *words]
    done = warm_python.run(*words, "--output", tmp_path / "of.json", folder=TASKS, environment=environment, timeout=200,
                           ranks=ranks)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    measured = json.loads((tmp_path / "of.json").read_text())
    assert measured["results"] == of_export["results"]


@torch.no_grad()
def test_an_exports_scores_are_the_models(export, tokenizer_folder):
    from linear_moe.evaluation.export_backend import ExportBackend

    tokenizer, model = load_tokenizer(tokenizer_folder), load_model(export)
    harness = HarnessModel(ExportBackend(export, "cpu", None), 256, 4)
    ((value, _),) = harness.loglikelihood([Request("The memory of", " a sequence")], disable_tqdm=True)
    context, whole = (tokenizer(text).input_ids for text in ("The memory of", "The memory of a sequence"))
    tokens = torch.tensor([[tokenizer.eos_token_id, *whole]])
    log_probabilities = model(tokens[:, :-1]).logits[0].log_softmax(-1)
    expected = log_probabilities.gather(1, tokens[0, 1:, None])[len(context) :].sum().item()
    assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "words,message",
    [
        (("--tasks", "no_such_task"), "no task no_such_task in lm-evaluation-harness"),
        (("--suite", "recall"), "the data of fda"),
        (("--tasks", "recall_choice", "--tensor-model-parallel-size", "2"), "takes no --tensor-model-parallel-size 2"),
    ],
)
def test_says_what_is_missing(export, capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert evaluate.main(["--load", str(export), "--include-path", str(TASKS), *words]) == 1
    assert message in capsys.readouterr().err
