r"""Autograd formulas of the operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from ..backends import reference
from ..backends.activation import gradient
from .fakes import accumulator


def register_formulas(library: str) -> None:
    """Make the operators of a library differentiable; a backward runs on the same library.

    ``conv_bn_relu_maxpool`` and the operators on packed weights have no gradient.

    Args:
        library: Name of the library in ``torch.ops``.
    """
    operators = getattr(torch.ops, library)

    def formula(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        register_autograd(f"{library}::{name}", backward, setup_context=setup)

    formula("bn_add_relu", partial(_bn_backward, operators), _bn_setup)
    formula("bn_add_relu_apply", partial(_apply_backward, operators), _apply_setup)
    formula("bn_add_relu_backward", _bn_double_backward, _bn_backward_setup)
    formula("conv_bn_add_relu", _conv_backward, _conv_setup)
    formula("conv_statistics", _statistics_backward, _statistics_setup)


# bn_add_relu


def _bn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, running_mean, running_var, residual, training, eps, activation = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    if not training:
        mean, var = running_mean, running_var
    ctx.save_for_backward(x, y if activation else None, weight, mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.training, ctx.eps, ctx.activation = training, eps, activation


def _bn_backward(operators: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dweight, dbias, dresidual = bn_backward(operators, ctx, grad, ctx.needs_input_grad[5])
    return dx, dweight, dbias, None, None, dresidual, None, None, None


def bn_backward(
    operators: Any, ctx: Any, grad: Tensor, residual_wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, weight, bias and residual, by ``bn_add_relu_backward``.

    Args:
        operators: The library that has the operator.
        ctx: Context of the forward: ``x``, ``y``, weight, mean and variance are saved, and what
            else may not change; the attributes are ``training``, ``eps``, ``activation``,
            ``bias_dtype`` and ``has_residual``.
        grad: Gradient of the result.
        residual_wanted: Whether the residual needs a gradient.
    """
    x, y, weight, mean, var, *_ = ctx.saved_tensors
    wanted = ctx.has_residual and residual_wanted
    dx, dweight, dbias, dresidual = operators.bn_add_relu_backward(
        grad, x, y, weight, mean, var, ctx.training, ctx.eps, ctx.activation,
        wanted and ctx.activation != 0,
    )  # fmt: skip
    if not ctx.activation:
        dresidual = grad
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        dresidual if wanted else None,
    )


# bn_add_relu_apply: the statistics are arguments, but the gradient treats them as those of x


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, var, residual, eps, activation = inputs
    ctx.save_for_backward(x, output if activation else None, weight, mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.training, ctx.eps, ctx.activation = True, eps, activation


def _apply_backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias, _, _, dresidual, *rest = _bn_backward(operators, ctx, grad)
    return dx, dweight, dbias, None, None, dresidual, *rest[:-1]


def _bn_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, y, weight, mean, var, *flags = inputs
    ctx.save_for_backward(grad, x, y, weight, mean, var)
    ctx.flags = flags


def _bn_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the reference twice: simple rather than fast, since it is rarely needed."""
    grad, x, y, weight, mean, var = ctx.saved_tensors
    training, eps, activation, _ = ctx.flags
    with torch.enable_grad():
        # The batch statistics depend on x, so they are recomputed here. The derivative of the
        # activation is locally constant: it is applied to the gradient, outside of the reference.
        leaves = [t.detach().requires_grad_() for t in (grad, x, weight) if t is not None]
        g, xs = leaves[:2]
        w = leaves[2] if weight is not None else torch.ones_like(mean)
        b = torch.zeros_like(w).requires_grad_()
        w = w if w.requires_grad else w.requires_grad_()
        z = reference.bn_add_relu(
            xs,
            w,
            b,
            None if training else mean,
            None if training else var,
            training=training,
            eps=eps,
            relu=False,
        )
        masked = gradient(g, y, activation)
        firsts = (*torch.autograd.grad(z, (xs, w, b), masked, create_graph=True), masked)
        pairs = [
            (first, outer.to(first.dtype))
            for first, outer in zip(firsts, grads, strict=True)
            if outer is not None and outer.shape == first.shape and first.requires_grad
        ]
        seconds = torch.autograd.grad(
            [first for first, _ in pairs],
            leaves,
            [outer for _, outer in pairs],
            allow_unused=True,
        )
    dweight = None if weight is None else seconds[2]
    return seconds[0], seconds[1], None, dweight, None, None, None, None, None, None


# conv_bn_add_relu


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, residual, *rest = inputs
    *ctx.geometry, ctx.eps, ctx.activation = rest
    y = output if ctx.activation else None
    ctx.save_for_backward(x, weight, conv_bias, bn_weight, mean, var, y)
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype
    ctx.has_residual = residual is not None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    r"""The gradient without the convolution's result, which the forward does not store.

    Let :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`, :math:`dz` the masked gradient and
    :math:`D = \partial \langle dz, w * x \rangle / \partial w`. Then :math:`dw = s D`, and, as
    :math:`w * x` is linear in :math:`w`, per output channel
    :math:`\langle dz, w * x \rangle = \langle w, D \rangle`, so
    :math:`d\gamma = (\langle w, D \rangle + (b - \mu) \sum dz) / \sqrt{\sigma^2 + \epsilon}`.
    """
    x, weight, conv_bias, bn_weight, mean, var, y = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    need = ctx.needs_input_grad
    wide = accumulator(x)
    dz = gradient(grad, y, ctx.activation)
    invstd = torch.rsqrt(var.to(wide) + ctx.eps)
    scale = invstd if bn_weight is None else invstd * bn_weight.to(wide)

    need_d = need[1] or need[3]
    dx, d, _ = torch.ops.aten.convolution_backward(
        dz,
        x,
        (weight.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [need[0], need_d, False],
    )
    dweight = dconv_bias = dbn_weight = dbn_bias = None
    if need[2] or need[3] or need[4]:
        total = dz.sum((0, 2, 3), dtype=wide)
        dbn_bias = total.to(ctx.bias_dtype) if need[4] else None
        dconv_bias = (total * scale).to(conv_bias.dtype) if need[2] else None
    if need[3]:
        offset = -mean.to(wide) if conv_bias is None else conv_bias.to(wide) - mean.to(wide)
        inner = (weight.to(wide) * d.to(wide)).sum((1, 2, 3))
        dbn_weight = ((inner + offset * total) * invstd).to(bn_weight.dtype)
    if need[1]:
        dweight = (d.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    dresidual = dz if ctx.has_residual and need[7] else None
    return (dx, dweight, dconv_bias, dbn_weight, dbn_bias, None, None, dresidual) + (None,) * 6


# conv_statistics


def _statistics_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, conv_bias, *ctx.geometry = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight)
    ctx.bias_shape = None if conv_bias is None else list(conv_bias.shape)


def _statistics_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """The convolution's gradient; bn_add_relu_apply's includes the terms of the statistics."""
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_shape, stride, padding, dilation, False, [0, 0], groups,
        ctx.needs_input_grad[:3],
    )  # fmt: skip
    return dx, dweight, dbias, None, None, None, None
