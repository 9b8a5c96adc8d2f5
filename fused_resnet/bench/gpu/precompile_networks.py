"""Compiles the unfused network by Inductor while the extension is being built.

Needs no built extension. The graphs that are compiled here come from the compiler's cache later.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from ..gpu_cells import settings
from . import plain
from .cases import Case, Row, Target, note
from .operands import DTYPES


def cases(target: Target, precision: str = "bfloat16", mode: str | None = None) -> list[Case]:
    """Inference at both batches, and the training step.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
        mode: Mode of ``torch.compile``; None for its default.
    """
    calls: dict[str, Callable[[], None]] = {
        "training": functools.partial(_training, target, precision, mode),
        "inference": functools.partial(_inference, target, precision, mode, plain.batch_of(target)),
        "inference, batch 1": functools.partial(_inference, target, precision, mode, 1),
    }
    if target.tiny:
        del calls["training"], calls["inference"]
    return [Case(f"compile {what}", functools.partial(_run, call)) for what, call in calls.items()]


def _run(call: Callable[[], None]) -> Iterator[Row]:
    began = time.monotonic()
    call()
    yield note(f"compiled in {time.monotonic() - began:.1f} s")


def _training(target: Target, precision: str, mode: str | None) -> None:
    with settings("tf32"):  # as where it is timed: it is part of the cache's key
        plain.training_step(target, precision, mode)()
    target.synchronize()


def _inference(target: Target, precision: str, mode: str | None, batch: int) -> None:
    with settings(precision):
        model = plain.channels_last(plain.unfused(target.tiny), target, DTYPES[precision])
        with torch.inference_mode():
            images = plain.images(target, batch, DTYPES[precision])
            plain.compiled(model, target, mode)(images)
    target.synchronize()
