"""Named suites of tasks, and what the MoM paper reports for them (arXiv 2502.13685; the authors' figures)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """Tasks that belong together.

    Attributes:
        tasks: name in lm-evaluation-harness, and the metric that counts in the average. None: shown, not counted.
        max_length: tokens that the model reads at once; contexts of RULER are made as long as that.
        paper: average in the paper by model size, then by model, in percent.
        note: how the suite differs from the paper's, if it does.
    """

    tasks: dict[str, str | None]
    max_length: int
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""


SUITES = {
    "recall": Suite(
        {
            "fda": "contains", "swde": "contains", "squad_completion": "contains",
            "nq_open": "exact_match", "triviaqa": "exact_match", "drop": "f1",
        },
        2048,
        {
            "380M": {"Transformer++": 31.70, "RetNet": 17.19, "HGRN2": 21.14, "GLA": 21.71, "GSA": 19.77,
                     "Gated DeltaNet": 24.78, "MoM": 28.16},
            "1.3B": {"Transformer++": 37.31, "RetNet": 26.45, "HGRN2": 27.13, "GLA": 31.93, "GSA": 32.05,
                     "Gated DeltaNet": 32.30, "MoM": 36.04},
        },
        "nq_open and triviaqa of the harness ask without a passage; the paper's questions come with passages, so that "
        "its averages are higher.",
    ),
    "commonsense": Suite(
        {
            "wikitext": None, "lambada_openai": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm",
            "hellaswag": "acc_norm", "piqa": "acc", "winogrande": "acc",
        },
        2048,
        {
            "380M": {"Transformer++": 41.35, "Gated DeltaNet": 41.44, "MoM": 41.97},
            "1.3B": {"Transformer++": 49.93, "Gated DeltaNet": 49.58, "MoM": 50.97},
        },
    ),
    "longbench": Suite({"longbench": "score"}, 16384, {"1.3B": {"Gated DeltaNet": 13.98, "GSA": 14.61, "MoM": 15.64}}),
    "ruler": Suite({"ruler": None}, 4096),
}  # fmt: skip
