"""What a conformance test says of the backends and values that it runs for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from backends import GPU_KERNELS

from fused_resnet.backends.activation import Activation

on = pytest.mark.on
on_gpu_kernels = on(*GPU_KERNELS)
#: All of them, by their names in labels.
ACTIVATIONS = {activation.name.lower(): activation for activation in Activation}
half_precisions = pytest.mark.precisions("float16", "bfloat16")


def rows(
    every: Mapping[str, Mapping[str, Any] | Sequence[Any]] | None = None,
    **spread: Mapping[str, Any] | Sequence[Any],
) -> pytest.MarkDecorator:
    """All combinations of ``every``, with the backend's dtypes or precisions spread over them.

    Each value meets each kind of dtype (half, float32, on the CPU float64) or precision, and of the
    two halves, which kernels treat alike, they take turns.
    """
    return pytest.mark.rows(every=every or {}, spread=spread)
