"""The activations that the operations apply: what each is, and its gradient.

Everything that is asked of an activation in Python is here; C++ has ``csrc/activation.h``, Triton
``backends/triton/_activation.py``. CONTRIBUTING says what adding one takes.
"""

from __future__ import annotations

import enum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(enum.IntEnum):
    """An activation, by the number that operators, steps of programs and kernels have for it."""

    NONE = 0
    RELU = 1
    LEAKY_RELU = 2


#: LeakyReLU's slope for negative numbers, PyTorch's default. No other is supported.
LEAKY_SLOPE = 0.01

#: What a caller may pass for an activation.
ActivationLike = str | Activation | None

#: The public names, in the order of the numbers.
NAMES = tuple(activation.name.lower() for activation in Activation)


def choose(op: str, relu: bool, activation: ActivationLike) -> Activation:
    """The activation of a call that may name it, or say with ``relu`` whether it is ReLU.

    Args:
        op: The operation, for messages.
        relu: The shorthand; its default, True, gives way to a name.
        activation: One of :data:`NAMES`, or None for ReLU or none, as ``relu`` says.

    Raises:
        ValueError: No such activation; or one, and ``relu=False``.
    """
    if activation is None:
        return Activation.RELU if relu else Activation.NONE
    if isinstance(activation, str):
        if activation not in NAMES:
            raise ValueError(
                f"{op}: activation: expected None or one of {', '.join(NAMES)}, got {activation!r}"
            )
        activation = Activation(NAMES.index(activation))
    if activation and not relu:
        raise ValueError(
            f"{op}: relu: expected True beside activation={NAMES[activation]!r}, got False"
        )
    return activation


def activate(y: Tensor, activation: int) -> Tensor:
    """The activation of a tensor, by PyTorch's own function.

    Args:
        y: Tensor to activate, of any shape.
        activation: Activation that is applied, a number of :class:`Activation`.
    """
    if activation == Activation.RELU:
        return F.relu(y)
    return F.leaky_relu(y, LEAKY_SLOPE) if activation == Activation.LEAKY_RELU else y


def activate_(y: Tensor, activation: int) -> Tensor:
    """:func:`activate` in place.

    Args:
        y: Tensor to activate, of any shape, written to.
        activation: Activation that is applied, a number of :class:`Activation`.
    """
    if activation == Activation.RELU:
        return y.relu_()
    return F.leaky_relu_(y, LEAKY_SLOPE) if activation == Activation.LEAKY_RELU else y


def gradient(grad: Tensor, y: Tensor, activation: int) -> Tensor:
    """The gradient of an activation's argument.

    What is positive stays so, and nothing else becomes positive: so the derivative can be read off
    the sign of the argument, or of the result. Where that is NaN it is PyTorch's.

    Args:
        grad: Gradient of the result.
        y: The result, or the argument.
        activation: Activation whose gradient is computed, a number of :class:`Activation`.
    """
    if activation == Activation.RELU:
        return grad.masked_fill(y <= 0, 0)
    if activation == Activation.LEAKY_RELU:
        return torch.where(y > 0, grad, grad * LEAKY_SLOPE)
    return grad
