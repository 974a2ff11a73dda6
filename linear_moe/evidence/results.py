"""The parts of RESULTS.md that follow from measured rows, and the pictures beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from linear_moe.evidence import memory_pictures, pictures, recall_summary, tables
from linear_moe.evidence.classes import comparisons
from linear_moe.evidence.jobs import ABLATIONS
from linear_moe.evidence.origin import origin_table
from linear_moe.evidence.report import heading, line, models_table, positions_table, repeats_table
from linear_moe.recall import records

PART = re.compile(r"(<!-- results: ([a-z-]+)\b.*?-->\n)(.*?)(<!-- end of results -->\n)", re.DOTALL)
LANGUAGE_MODELS, RECALL = "language_models", "recall.csv"
NOT_MEASURED = "Not measured yet."
CORPUS = "corpus.json"


class Results:
    """All measured rows of a folder: ``*recall.csv``, and language_models/ with what tools/language_models.py wrote.

    Args:
        pictures: folder that the pictures are drawn into.
        link: how the document names that folder.
    """

    def __init__(self, measured: Path, pictures: Path, link: str):
        self.folder, self.pictures, self.link = measured / LANGUAGE_MODELS, pictures, link
        recall = [row for path in sorted(measured.glob(f"*{RECALL}")) for row in records.read(path)]
        self.recall = recall_summary.comparisons(recall)[0] if recall else []
        self.all_models = records.read(self.folder / tables.MODELS)
        self.groups = sorted(comparisons(self.all_models), key=_work, reverse=True)
        self.models = self.groups[0] if self.groups else []
        self.ablations = [chosen for group in self.groups if (chosen := _ablations(group))]
        ablated = [row for chosen in self.ablations for row in chosen]
        self.compared = [row for row in self.models if row not in ablated or row["model"] == "mom"]
        self.others = [[row for row in group if row not in ablated] for group in self.groups[1:]]
        self.repeats = records.read(self.folder / tables.REPEATS)
        self.positions = records.read(self.folder / tables.POSITIONS)
        self.history = records.read(self.folder / tables.HISTORIES)

    def parts(self) -> dict[str, Callable[[], str]]:
        """The function that writes each part, by the part's name."""
        return {
            "recall": self.recall_part,
            "language-models": self.models_part,
            "repeating-tokens": self.repeats_part,
            "positions": self.positions_part,
            "memories": self.memories_part,
            "ablations": self.ablations_part,
            "corpus": self.corpus_part,
            "origin": self.origin_part,
        }

    def recall_part(self) -> str:
        if not self.recall:
            return NOT_MEASURED
        recall_summary.draw(self.recall, self.pictures / "results_recall.png")
        return (
            f"{self._picture('results_recall.png', 'Accuracy over the state')}\n\n{recall_summary.table(self.recall)}"
        )

    def models_part(self) -> str:
        if not self.models:
            return NOT_MEASURED
        pictures.draw_training(self.pictures / "results_training.png", self.compared, self.history)
        parts = [heading(self.compared), models_table(self.compared)]
        others = [group for group in self.others if group and group[0]["data"] == self.models[0]["data"]]
        parts += [f"Of another shape, on the same text:\n\n{models_table(group)}" for group in others]
        return "\n\n".join([self._picture("results_training.png", "Validation loss over tokens and over time"), *parts])

    def repeats_part(self) -> str:
        if not self.models:
            return NOT_MEASURED
        pictures.draw_repeats(self.pictures / "results_repeats.png", self.compared, self.repeats)
        shown = self._picture("results_repeats.png", "Loss of tokens that repeat a bigram of their context")
        return f"{shown}\n\n{repeats_table(self.compared, self.repeats)}"

    def positions_part(self) -> str:
        if not self.models:
            return NOT_MEASURED
        pictures.draw_positions(self.pictures / "results_positions.png", self.compared, self.positions)
        shown = self._picture("results_positions.png", "Loss by position")
        return f"{shown}\n\n{positions_table(self.compared, self.positions)}"

    def memories_part(self) -> str:
        balanced = [row for chosen in self.ablations for row in chosen if row["model"] in ("mom", "mom-balancing-0")]
        models = self.compared + [row for row in balanced if row not in self.compared]
        holdings = memory_pictures.read_holdings(self.folder, models)
        if not holdings:
            return NOT_MEASURED
        drawn = memory_pictures.draw_all(self.folder, models, self.history, self.pictures, prefix="results_")
        first = memory_pictures.first_of(models, holdings)
        shown = [self._picture(path.name, path.stem.removeprefix("results_").replace("_", " ")) for path in drawn]
        held = holdings[first["key"]]
        return "\n\n".join([*shown, memory_pictures.layers_table(held), memory_pictures.tokens_table(held)])

    def ablations_part(self) -> str:
        parts = [part for chosen in self.ablations for part in (heading(chosen), models_table(chosen))]
        return "\n\n".join(parts) if parts else NOT_MEASURED

    def corpus_part(self) -> str:
        path = self.folder / CORPUS
        if not path.is_file():
            return NOT_MEASURED
        facts = json.loads(path.read_text())
        lines = [line(["side", "files", "tokens", "bytes", "digest"]), line(["---"] * 5)]
        for name, side in facts["sides"].items():
            cells = [name.replace("_", " "), f"{side['files']:,}", f"{side['tokens']:,}", f"{side['text_bytes']:,}"]
            lines.append(line([*cells, f"`{side['digest'][:16]}`"]))
        packages = ", ".join(f"`{name}`" for name in facts["held_out_packages"])
        return (
            f"{facts['files_found']:,} files of {facts['packages']:,} packages were found and {facts['files_read']:,} "
            f"read; copies and near copies were left out. Vocabulary {facts['vocabulary']:,}; together "
            f"`{facts['digest'][:12]}`.\n\n" + "\n".join(lines) + f"\n\nHeld out: {packages}."
        )

    def origin_part(self) -> str:
        rows = [*self.recall, *self.all_models]
        return origin_table(rows) if rows else NOT_MEASURED

    def _picture(self, name: str, text: str) -> str:
        return f"![{text}]({self.link}/{name})"


def _work(models: Sequence[records.Row]) -> int:
    """What the largest training of a group computed: the group with most of that is the comparison."""
    return max(int(row["parameters"]) * int(row["trained_tokens"]) for row in models)


def _ablations(models: Sequence[records.Row]) -> list[records.Row]:
    """The rows of a group that were trained on as many tokens as its models of ABLATIONS; none without such models."""
    tokens = {row["tokens"] for row in models if row["model"] in ABLATIONS}
    return [row for row in models if row["tokens"] in tokens]


def fill(document: str, results: Results) -> str:
    """The document with every part between `<!-- results: NAME -->` and `<!-- end of results -->` written anew.

    Raises ValueError for a part that has no name of ours.
    """
    parts = results.parts()
    unknown = [found[1] for found in PART.findall(document) if found[1] not in parts]
    if unknown:
        raise ValueError(f"the document has parts {', '.join(unknown)}; there are {', '.join(parts)}")
    return PART.sub(lambda found: f"{found[1]}\n{parts[found[2]]()}\n\n{found[4]}", document)


def merge_rows(sources: Sequence[Path], target: Path) -> None:
    """Adds the rows of CSV files to another that it does not have yet. Raises ValueError for other columns."""
    for source in sources:
        known = records.read(target)
        records.append(target, [row for row in records.read(source) if row not in known])
