"""Curves of runs: training dashed, validation solid."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.optional import library
from .checkpoint import write_bytes

#: Colours of the paper's depths, and of others in their order.
_COLOURS = {20: "#c7a500", 32: "#1f77b4", 44: "#2ca02c", 56: "#d62728", 110: "#222222"}


def save(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draw loss and error of one run against its epochs.

    Args:
        path: A PNG file, which is replaced.
        history: History of the run, at least one epoch.
        title: Title of the picture.

    Raises:
        TrainingError: The file can't be written.
        MissingPackageError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    marker = "o" if len(history) == 1 else None
    for part, style, word in (("train", "--", "training"), ("val", "-", "validation")):
        loss = [entry[f"{part}_loss"] for entry in history]
        error = [100 * (1 - entry[f"{part}_accuracy"]) for entry in history]
        losses.plot(epochs, loss, style, color="#b3261e", label=word, marker=marker)
        errors.plot(epochs, error, style, color="#b3261e", label=word, marker=marker)
    for axes, name in ((losses, "loss"), (errors, "error, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    _write(figure, path)


def save_story(path: Path, histories: Mapping[tuple[str, int], Sequence[dict[str, Any]]]) -> None:
    """Draw the paper's figure 6: error against iterations, plain networks left, residual right.

    Args:
        path: A PNG file, which is replaced.
        histories: History of each network, by ``("plain" | "residual", depth)``.

    Raises:
        TrainingError: The file can't be written.
        MissingPackageError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 4.5), sharex=True, sharey=True, layout="constrained"
    )
    for axes, kind in zip(panels, ("plain", "residual"), strict=True):
        for (of, depth), history in histories.items():
            if of != kind or not history:
                continue
            steps = [entry["step"] for entry in history]
            colour, marker = _COLOURS.get(depth), "o" if len(history) == 1 else None
            for part, style in (("train", "--"), ("val", "-")):
                error = [100 * (1 - entry[f"{part}_accuracy"]) for entry in history]
                label = f"{kind}-{depth}" if part == "val" else None
                axes.plot(steps, error, style, color=colour, label=label, marker=marker)
        axes.set_xlabel("iterations")
        axes.set_ylabel("error, %")
        axes.yaxis.set_tick_params(labelleft=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle("training error dashed, test error solid", fontsize=10)
    _write(figure, path)


def _pyplot() -> Any:
    library("matplotlib", "train").use("agg")
    return library("matplotlib.pyplot", "train")


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _pyplot().close(figure)
    write_bytes(path, buffer.getbuffer())
