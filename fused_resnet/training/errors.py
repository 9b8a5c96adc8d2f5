"""The errors of a training run; each message is one line that a person can act on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training can't start or can't go on."""


class DivergedError(TrainingError):
    """The loss is no longer a finite number."""
