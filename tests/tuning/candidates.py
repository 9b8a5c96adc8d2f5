"""Candidates of known speed, and the choice among them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch

from fused_resnet.tuning import tuner

MACHINE = tuner.machine_of(torch.device("cpu"))


def runs_for(seconds: float, value: float = 0.0) -> SimpleNamespace:
    """Operators whose ``op`` takes this long."""

    def op(x):
        time.sleep(seconds)
        return x + value

    return SimpleNamespace(op=op)


def choose(**operators) -> str:
    return tuner.choose("op", "cpu", operators, (torch.zeros(2, 3),))


FAST, SLOW = runs_for(0.0), runs_for(0.05)
