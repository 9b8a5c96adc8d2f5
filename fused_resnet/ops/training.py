"""The training primitives as functions: checks, the choice of a backend, and the call.

They are what training units are made of, and are of use by themselves for measuring and checking.
No gradient flows through them: they are the pieces that gradients are computed with. Arguments,
formulas and results are those of :mod:`fused_resnet.backends.reference_training`; maps are made
channels_last, and vectors per channel are float64 for float64 maps, else float32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference_training
from ..backends.availability import resolve_backend
from . import checks
from .registry import primitives_of

#: The name of the map whose dtype and device are the call's.
_MAPS = ("x", "z")


def _primitive(name: str) -> Callable[..., Any]:
    reference = getattr(reference_training, name)
    signature = inspect.signature(reference)

    @functools.wraps(reference)
    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named).arguments
        first = next((bound[key] for key in _MAPS if isinstance(bound.get(key), Tensor)), None)
        if first is None:
            first = bound["mean"]
            if not isinstance(first, Tensor):
                raise TypeError(f"{name}: mean: expected a Tensor, got {type(first).__name__}")
        else:
            checks.feature_map(name, "x" if bound.get("x") is first else "z", first)
        for key, value in bound.items():
            if isinstance(value, Tensor):
                checks.same_device(name, key, value, first)
        backend = resolve_backend("training_unit", first)
        with torch.no_grad():
            if backend == "reference":
                return reference(**bound)
            return getattr(primitives_of(backend), name)(*bound.values())

    return call


conv_forward = _primitive("conv_forward")
conv_backward = _primitive("conv_backward")
block_end = _primitive("block_end")
block_end_backward = _primitive("block_end_backward")
bn_coefficients = _primitive("bn_coefficients")
bn_update_running = _primitive("bn_update_running")
bn_backward_coefficients = _primitive("bn_backward_coefficients")
stem_end = _primitive("stem_end")
stem_end_backward = _primitive("stem_end_backward")
