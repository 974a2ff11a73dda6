"""matplotlib without a screen, for every picture of this project."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from linear_moe.temporary import save_figure  # noqa: E402

__all__ = ["plt", "save"]


def save(figure, path: Path) -> None:
    """Writes a picture, with its folder where that is missing, and frees the figure. An error keeps the old one."""
    save_figure(figure, path, dpi=130)
    plt.close(figure)
