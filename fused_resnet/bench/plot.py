"""A bar chart of a benchmark's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.optional import MissingPackageError
from .results import Row

#: Panels side by side.
COLUMNS = 4

_COLOURS = {"fused": "#d9722e", "frozen": "#b3261e", "frozen_direct": "#b3261e"}
_OTHERS = "#8a8f98"


def save(path: Path, rows: Sequence[Row]) -> None:
    """Draw images per second, one panel per subject and batch, with the range from p20 to p80.

    Args:
        path: The image file; its suffix selects the format.
        rows: Result rows.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: No row was timed, or matplotlib does not know the suffix.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["status"] == "ok"]
    if not timed:
        raise ValueError("nothing to plot: no provider was timed")
    panels = list(dict.fromkeys((row["subject"], row["batch"]) for row in timed))
    columns = min(len(panels), COLUMNS)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (subject, batch) in zip(grid.flat, panels, strict=False):
        bars = [row for row in timed if (row["subject"], row["batch"]) == (subject, batch)]
        names = [row["provider"] for row in bars]
        speed = [row["images_per_s"] for row in bars]
        # The lower quantile of time is the upper one of speed.
        low = [row["images_per_s"] - batch / row["p80_ms"] * 1e3 for row in bars]
        high = [batch / row["p20_ms"] * 1e3 - row["images_per_s"] for row in bars]
        axes.barh(names, speed, xerr=(low, high), color=[_COLOURS.get(n, _OTHERS) for n in names])
        axes.invert_yaxis()
        axes.set_title(f"{subject}, batch {batch}", fontsize=10)
        axes.set_xlabel("images per second")
        axes.spines[["top", "right"]].set_visible(False)
    first = timed[0]
    figure.suptitle(f"{first['device']}, {first['threads']} threads, {first['dtype']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
