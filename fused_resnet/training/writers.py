"""The files of a run that people read: metrics, curves, the recipe and TensorBoard's events."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tuning.atomic_file import remove_stale
from . import curves, recipe
from .checkpoint import write_bytes
from .errors import TrainingError
from .settings import Settings

#: The files that a run replaces.
FILES = ("last", "best.safetensors", "metrics.jsonl", "recipe.yaml", "curves.png")


class Writers:
    """Writes a run's files; only the first process has one.

    Args:
        out: The folder of the run; it is made.
        settings: Settings of the run.

    Attributes:
        events: Writes TensorBoard's events; None where it is not installed, and before
            :meth:`begin`.

    Raises:
        TrainingError: The folder can't be made.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings
        self.events: Any = None
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"out {str(out)!r}: {error.strerror}") from None

    def begin(self, facts: Mapping[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Write the recipe, and metrics and curves as the checkpoint has them.

        Args:
            facts: Facts that describe the run besides its settings.
            history: The epochs that are done.
        """
        for name in FILES:  # no other process writes them
            remove_stale(self.out / name, 0)
        try:
            recipe.write(self.out / "recipe.yaml", self.settings, facts)
        except OSError as error:
            raise TrainingError(f"can't write {str(self.out)!r}: {error.strerror}") from None
        self._metrics(history)
        if history:
            curves.save(self.out / "curves.png", history, title=self.settings.model)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            done = history[-1]["step"] if history else 0
            self.events = SummaryWriter(str(self.out), purge_step=done + 1)

    def epoch(self, history: Sequence[dict[str, Any]]) -> None:
        """An epoch is done.

        Args:
            history: All that are, the new one last.
        """
        self._metrics(history)
        curves.save(self.out / "curves.png", history, title=self.settings.model)
        if self.events is not None:
            entry = history[-1]
            for key in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
                self.events.add_scalar(key, entry[key], entry["step"])
            self.events.flush()

    def close(self) -> None:
        """No epoch will follow."""
        if self.events is not None:
            self.events.close()

    def _metrics(self, history: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_bytes(self.out / "metrics.jsonl", lines.encode())
