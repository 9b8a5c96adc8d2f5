"""``bn_add_relu`` in training as one node of autograd, which updates the running statistics.

They are updated before anything is saved for backward: activation checkpointing recomputes a
forward up to its last saved tensor and no further, and must repeat the update as PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .autograd import bn_backward
from .registry import OPERATORS
from .training_layer import update_running
from .training_tuned import UNIT_BACKENDS


def training_bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    backend: str,
) -> Tensor:
    """``activation(bn(x) [+ residual])`` by the statistics of the batch.

    Args:
        x: Input, ``(N, C, H, W)``.
        weight: Weight of the batch norm, ``(C,)``; None means 1.
        bias: Bias of the batch norm, ``(C,)``; None means 0.
        running_mean: Running mean, ``(C,)``, updated in place; None for none.
        running_var: Running variance, ``(C,)``, updated in place; given when ``running_mean`` is.
        residual: Map that is added, shape and dtype of ``x``; None for none.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        activation: The activation that is applied to the sum.
        backend: Backend whose operators compute it.
    """
    arguments = (
        x, weight, bias, running_mean, running_var, residual, momentum, eps, activation,
        backend,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.fused_resnet.training_bn_add_relu(*arguments)
    return _operator(*arguments)


# The operator is what compilers see of it; they trace through.
_library = Library("fused_resnet", "FRAGMENT")
_library.define(
    "training_bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, float momentum, float eps, int activation, "
    "str backend) -> Tensor"
)


def _operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    *settings: Any,
) -> Tensor:
    running = (running_mean, running_var)
    return _TrainingBNAddReLU.apply(x, weight, bias, residual, running, *settings)


_library.impl("training_bn_add_relu", _operator, "CompositeImplicitAutograd")


class _TrainingBNAddReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        activation: int,
        backend: str,
    ) -> Tensor:
        y, mean, var = OPERATORS[backend].bn_add_relu(
            x, weight, bias, None, None, residual, True, eps, activation
        )
        running_mean, running_var = running
        if running_mean is not None and running_var is not None:
            updater = backend if backend in UNIT_BACKENDS else "library"
            count = x.shape[0] * x.shape[2] * x.shape[3]
            update_running(updater, mean, var, running_mean, running_var, momentum, count)
        # As PyTorch's batch norm: a change of its running statistics before backward is an error.
        # Compiled code does not look for changes.
        watched = () if torch.compiler.is_compiling() else running
        ctx.save_for_backward(x, y if activation else None, weight, mean, var, *watched)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.has_residual = residual is not None
        ctx.training, ctx.eps, ctx.activation, ctx.backend = True, eps, activation, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients = bn_backward(OPERATORS[ctx.backend], ctx, grad, ctx.needs_input_grad[3])
        return (*gradients, None, None, None, None, None)
