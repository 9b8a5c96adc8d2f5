r"""Fake implementations and autograd formulas of the compiled operators.

Schemas are in ``csrc/schemas.h``. Fakes answer for shapes, dtypes and strides under
``torch.compile`` and ``torch.export``; the formulas make the operators differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.library import register_autograd, register_fake

from . import _C, reference

_compiled = torch.ops.fused_resnet


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _map_like(x: Tensor, shape: list[Any]) -> Tensor:
    """An empty feature map in the dtype and memory format of ``x``."""
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x)
    )


def _window(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


# bn_add_relu


@register_fake("fused_resnet::bn_add_relu")
def _(x, weight, bias, mean, var, residual, training, eps, relu):  # type: ignore[no-untyped-def]
    channels = x.shape[1] if training else 0
    statistic = x.new_empty((channels,), dtype=_accumulator(x))
    return _map_like(x, x.shape), statistic, torch.empty_like(statistic)


@register_fake("fused_resnet::bn_add_relu_backward")
def _(grad, x, y, weight, mean, var, training, eps, relu, need_residual):  # type: ignore[no-untyped-def]
    vector = x.new_empty((x.shape[1],), dtype=_accumulator(x))
    residual = _map_like(x, x.shape) if need_residual else x.new_empty((0,))
    return _map_like(x, x.shape), vector, torch.empty_like(vector), residual


def _bn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, running_mean, running_var, residual, training, eps, relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    if not training:
        mean, var = running_mean, running_var
    ctx.save_for_backward(x, y if relu else None, weight, mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.training, ctx.eps, ctx.relu = training, eps, relu


def _bn_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    need_residual = ctx.has_residual and ctx.relu and ctx.needs_input_grad[5]
    dx, dweight, dbias, dresidual = _compiled.bn_add_relu_backward(
        grad, x, y, weight, mean, var, ctx.training, ctx.eps, ctx.relu, need_residual
    )
    if ctx.has_residual and not ctx.relu:
        dresidual = grad
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        dresidual if ctx.has_residual and ctx.needs_input_grad[5] else None,
        None,
        None,
        None,
    )


register_autograd("fused_resnet::bn_add_relu", _bn_backward, setup_context=_bn_setup)


# bn_add_relu_given: the forward of inference, the gradient of training


@register_fake("fused_resnet::bn_add_relu_given")
def _(x, weight, bias, mean, var, residual, eps, relu):  # type: ignore[no-untyped-def]
    return _map_like(x, x.shape)


def _given_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, var, residual, eps, relu = inputs
    ctx.save_for_backward(x, output if relu else None, weight, mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.training, ctx.eps, ctx.relu = True, eps, relu


def _given_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias, _, _, dresidual, *rest = _bn_backward(ctx, grad)
    return dx, dweight, dbias, None, None, dresidual, *rest[:-1]


register_autograd("fused_resnet::bn_add_relu_given", _given_backward, setup_context=_given_setup)


def _bn_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, y, weight, mean, var, *flags = inputs
    ctx.save_for_backward(grad, x, y, weight, mean, var)
    ctx.flags = flags


def _bn_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the reference twice: gradient penalties are rare, so clarity before speed."""
    grad, x, y, weight, mean, var = ctx.saved_tensors
    training, eps, relu, _ = ctx.flags
    with torch.enable_grad():
        # The batch statistics are functions of x: they are computed anew, not taken as given. The
        # mask is locally constant, so it is applied to the gradient outside of the reference.
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
        masked = g.masked_fill(y <= 0, 0) if relu else g
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


register_autograd(
    "fused_resnet::bn_add_relu_backward", _bn_double_backward, setup_context=_bn_backward_setup
)


# conv_bn_add_relu


@register_fake("fused_resnet::conv_bn_add_relu")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, residual, stride, padding, dilation,
    groups, eps, relu,
):  # fmt: skip
    return _map_like(x, _conv_shape(x, weight.shape, stride, padding, dilation))


def _conv_shape(
    x: Tensor, weight_shape: Any, stride: list[int], padding: list[int], dilation: list[int]
) -> list[Any]:
    size = [
        _window(x.shape[i + 2], weight_shape[i + 2], stride[i], padding[i], dilation[i])
        for i in (0, 1)
    ]
    return [x.shape[0], weight_shape[0], *size]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, residual, *rest = inputs
    *ctx.geometry, ctx.eps, ctx.relu = rest
    ctx.save_for_backward(x, weight, conv_bias, bn_weight, mean, var, output if ctx.relu else None)
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype
    ctx.has_residual = residual is not None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    r"""The gradient without the convolution's result, which the forward never stored.

    Let :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}`, :math:`dz` the gradient behind ReLU and
    :math:`D = \partial \langle dz, w * x \rangle / \partial w`. Then :math:`dw = s D`, and, as
    :math:`w * x` is linear in :math:`w`, per output channel
    :math:`\langle dz, w * x \rangle = \langle w, D \rangle`, so
    :math:`d\gamma = (\langle w, D \rangle + (b - \mu) \sum dz) / \sqrt{\sigma^2 + \epsilon}`.
    """
    x, weight, conv_bias, bn_weight, mean, var, y = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    need = ctx.needs_input_grad
    wide = _accumulator(x)
    dz = grad.masked_fill(y <= 0, 0) if ctx.relu else grad
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


register_autograd("fused_resnet::conv_bn_add_relu", _conv_backward, setup_context=_conv_setup)


# conv_statistics


@register_fake("fused_resnet::conv_statistics")
def _(x, weight, conv_bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    z = _map_like(x, _conv_shape(x, weight.shape, stride, padding, dilation))
    statistic = x.new_empty((weight.shape[0],), dtype=_accumulator(x))
    return z, statistic, torch.empty_like(statistic)


def _statistics_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, conv_bias, *ctx.geometry = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight)
    ctx.bias_shape = None if conv_bias is None else list(conv_bias.shape)


def _statistics_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """That of the convolution: bn_add_relu_given's gradient holds the statistics' part."""
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_shape, stride, padding, dilation, False, [0, 0], groups,
        ctx.needs_input_grad[:3],
    )  # fmt: skip
    return dx, dweight, dbias, None, None, None, None


register_autograd(
    "fused_resnet::conv_statistics", _statistics_backward, setup_context=_statistics_setup
)


# conv_bn_relu_maxpool: called only where no gradient is wanted (see ops.py)


@register_fake("fused_resnet::conv_bn_relu_maxpool")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, groups, eps,
    pool_kernel, pool_stride, pool_padding,
):  # fmt: skip
    shape = _conv_shape(x, weight.shape, stride, padding, dilation)
    return _map_like(x, _pool_shape(shape, pool_kernel, pool_stride, pool_padding))


def _pool_shape(
    shape: list[Any], kernel: list[int], stride: list[int], padding: list[int]
) -> list[Any]:
    size = [_window(shape[i + 2], kernel[i], stride[i], padding[i], 1) for i in (0, 1)]
    return [shape[0], shape[1], *size]


# The packed forms that a frozen network uses


@register_fake("fused_resnet::pack_conv_weight")
def _(weight, groups):  # type: ignore[no-untyped-def]
    if weight.device.type == "cuda":
        return weight.new_empty((weight.numel(),))
    wide = _accumulator(weight)
    return weight.new_empty(
        (_C.packed_conv_weight_numel(list(weight.shape), groups, wide is torch.float64),),
        dtype=wide,
    )


@register_fake("fused_resnet::unpack_conv_weight")
def _(packed, weight_shape, groups):  # type: ignore[no-untyped-def]
    return packed.new_empty(weight_shape)


@register_fake("fused_resnet::transform_conv_weight")
def _(weight, stride, dilation, groups):  # type: ignore[no-untyped-def]
    shape = list(weight.shape)
    fits = (
        weight.device.type != "cuda"
        and weight.dtype is torch.float32
        and _C.winograd_fits(shape, list(stride), list(dilation), groups)
    )
    return weight.new_empty((36 * shape[0] * shape[1] if fits else 0,))


@register_fake("fused_resnet::conv_bn_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, residual, transformed, weight_shape, stride, padding, dilation,
    groups, relu,
):  # fmt: skip
    shape = _conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@register_fake("fused_resnet::conv_bn_relu_maxpool_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, weight_shape, stride, padding, dilation, groups, pool_kernel,
    pool_stride, pool_padding,
):  # fmt: skip
    shape = _conv_shape(x, weight_shape, stride, padding, dilation)
    shape = _pool_shape(shape, pool_kernel, pool_stride, pool_padding)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@register_fake("fused_resnet::conv_bn_add_relu_planned")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, residual, residual_scale, residual_shift, weight_shape, stride,
    padding, dilation, groups, relu, tile, split_k,
):  # fmt: skip
    shape = _conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@register_fake("fused_resnet::conv_conv_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, x2, packed, shift, weight_shape, stride, padding, dilation, stride2, relu
):  # fmt: skip
    shape = _conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@register_fake("fused_resnet::residual_block")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, joined, joined_shift, bottleneck, stride, dilation, groups
):  # fmt: skip
    channels = scale[2 if bottleneck else 1].shape[0]
    size = [_window(n, 1, stride, 0, 1) for n in x.shape[2:]]
    return x.new_empty([x.shape[0], channels, *size]).to(memory_format=torch.channels_last)
