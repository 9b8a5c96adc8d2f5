"""The activations in kernels: :class:`fused_resnet.backends.activation.Activation`'s numbers.

``ACTIVATION`` is a constant of each kernel, which therefore has the code of one activation alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import LEAKY_SLOPE

SLOPE = tl.constexpr(LEAKY_SLOPE)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(v); NaN stays NaN as in PyTorch, unlike with ``tl.maximum``.

    Args:
        v: Values, float32.
        ACTIVATION: Number of the activation.
    """
    if ACTIVATION == 1:
        return tl.where(v < 0.0, 0.0, v)
    elif ACTIVATION == 2:
        return tl.where(v < 0.0, v * SLOPE, v)
    else:
        return v


@triton.jit
def gradient(g, at, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of an activation's argument: g act'(at).

    Args:
        g: Gradient of the result.
        at: The argument or the result, whose signs are the same.
        ACTIVATION: Number of the activation.
    """
    if ACTIVATION == 1:
        return tl.where(at <= 0.0, 0.0, g)
    elif ACTIVATION == 2:
        return tl.where(at > 0.0, g, g * SLOPE)
    else:
        return g
