"""Training units on a CPU: our convolution or PyTorch's, for each layer and direction.

The model of cost in ``csrc/cpu/training/conv_plan.cpp`` decides, unless ``fused-resnet tune
--training`` has timed the call on this machine. Between the same passes either convolution computes
the same map, and what is kept for backward does not depend on who did. A training step times
nothing by itself: the bits of a run would depend on what else the machine did during its first
step.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from ..tuning import tuner
from .registry import primitives_of

#: The primitives with two candidates.
CHOSEN = ("conv_forward", "conv_backward")

#: The candidate that runs without timings, by the model of cost.
_DEFAULT = "cpu"


def cpu_primitives() -> Any:
    """The CPU's training primitives, with the tuner's choices where there are any."""
    if torch.compiler.is_compiling() or not (tuner.is_recording() or _are_timed()):
        return primitives_of("cpu")
    return _with_choices()


def _are_timed() -> bool:
    """Whether convolutions of training were timed with as many threads."""
    asked = ("training convolutions", torch.get_num_threads())
    found = tuner.calls.get(asked)
    if found is None:
        found = tuner.calls[asked] = tuner.knows(CHOSEN, torch.device("cpu"))
    return bool(found)


@functools.cache
def _candidates() -> dict[str, Any]:
    operators = torch.ops.fused_resnet
    around = {name: getattr(operators, f"{name}_library").default for name in CHOSEN}
    return {_DEFAULT: primitives_of("cpu"), "library": SimpleNamespace(**around)}


@functools.cache
def _with_choices() -> Any:
    chosen = {name: functools.partial(_run, name) for name in CHOSEN}
    return SimpleNamespace(**{**vars(primitives_of("cpu")), **chosen})


def _run(op: str, *arguments: Any) -> Any:
    candidates = _candidates()
    choice = tuner.choose(op, _DEFAULT, candidates, arguments, measures=False)
    return getattr(candidates[choice], op)(*arguments)
