r"""The training primitives in plain PyTorch: what each of them means, exact in float64.

A training step of a residual block is made of four maps between feature maps (``conv_forward``,
``block_end``, ``block_end_backward``, ``conv_backward``), their two counterparts for the stem, and
three small functions of per-channel vectors. Every backend implements these formulas; the tests
compare with this file. Signatures equal the operators' schemas (``csrc/schemas.h``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import Activation, activate, gradient

_AXES = (0, 2, 3)


def _per_channel(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def _prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: int) -> Tensor:
    """``activation(x * scale + shift)``; ``x`` itself without a scale."""
    if scale is None or shift is None:
        return x
    return activate(x * _per_channel(scale) + _per_channel(shift), activation)


def conv_forward(
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    statistics: bool,
    winograd: bool,
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A convolution of a map that is normalised while it is read, and its batch statistics.

    .. math:: z = w * p(x), \quad p(x) = \max(0,\; x \cdot \mathrm{scale} + \mathrm{shift})

    Args:
        x: Input, ``(N, C, H, W)``.
        x_scale: Scale of :math:`p`, ``(C,)``; None means :math:`p(x) = x`.
        x_shift: Shift of :math:`p`, ``(C,)``, there when ``x_scale`` is.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        stride: Step of the convolution, ``(height, width)``.
        padding: Zeros on each side of :math:`p(x)`, ``(height, width)``.
        dilation: Distance between taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        statistics: Whether mean and variance are wanted.
        winograd: Not used: which algorithm computes the sums is a backend's choice.
        activation: Activation that :math:`p` applies; the formula has ReLU.

    Returns:
        :math:`z`, ``(N, K, OH, OW)``; its mean and its biased variance, ``(K,)``, empty when they
        are not wanted.
    """
    p = _prologue(x, x_scale, x_shift, activation)
    z = F.conv2d(p, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
    if not statistics:
        return z, z.new_empty(0), z.new_empty(0)
    mean = z.mean(_AXES)
    return z, mean, (z - _per_channel(mean)).square().mean(_AXES)


def block_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None,
    shortcut_scale: Tensor | None,
    shortcut_shift: Tensor | None,
    activation: int,
) -> Tensor:
    r"""The last batch norm of a block, the shortcut and the activation, here with ReLU.

    .. math:: y = \max(0,\; z \cdot \mathrm{scale} + \mathrm{shift} + s)

    Args:
        z: Result of the last convolution, ``(N, K, H, W)``.
        scale: Scale of the batch norm after it, ``(K,)``.
        shift: Shift of the batch norm after it, ``(K,)``.
        shortcut: Result of the shortcut, shape of ``z``; None means :math:`s = 0`.
        shortcut_scale: Scale of the batch norm of a projection, ``(K,)``: then :math:`s` is the
            shortcut times this plus its shift; None means the shortcut as it is.
        shortcut_shift: Shift of that batch norm, ``(K,)``, there when ``shortcut_scale`` is.
        activation: Activation that is applied to the sum; the formula has ReLU, and none leaves the
            maximum out.

    Returns:
        :math:`y`, shape of ``z``.
    """
    y = z * _per_channel(scale) + _per_channel(shift)
    if shortcut is not None:
        if shortcut_scale is not None and shortcut_shift is not None:
            shortcut = shortcut * _per_channel(shortcut_scale) + _per_channel(shortcut_shift)
        y = y + shortcut
    return activate(y, activation)


def block_end_backward(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor,
    mean: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    sums: bool,
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient in front of a block's activation, and the sums for the batch norms' gradients.

    .. math:: g = dy \cdot [y > 0], \quad \sum g, \quad \sum g\,(z - \mu), \quad
        \sum g\,(s - \mu_s)

    Args:
        dy: Gradient of ``y``, ``(N, K, H, W)``.
        y: The block's result; None where it has no activation, and then :math:`g` is ``dy``.
        z: Result of the last convolution, shape of ``dy``.
        mean: Mean :math:`\mu` of ``z`` in each channel, ``(K,)``.
        shortcut: Result of the shortcut's convolution, shape of ``dy``; None for no such sum.
        shortcut_mean: Mean :math:`\mu_s` of ``shortcut`` in each channel, ``(K,)``, there when
            ``shortcut`` is.
        sums: Whether the sums are wanted.
        activation: Activation of the forward; not used without ``y``.

    Returns:
        :math:`g` (empty without ``y``) and the three sums over ``(N, H, W)``, ``(K,)`` each, empty
        when they are not wanted.
    """
    g = dy if y is None else gradient(dy, y, activation)
    none = mean.new_empty(0)
    totals = [none, none, none]
    if sums:
        totals[0] = g.sum(_AXES)
        totals[1] = (g * (z - _per_channel(mean))).sum(_AXES)
        if shortcut is not None and shortcut_mean is not None:
            totals[2] = (g * (shortcut - _per_channel(shortcut_mean))).sum(_AXES)
    return (dy.new_empty(0) if y is None else g, *totals)  # type: ignore[return-value]


def conv_backward(
    g: Tensor,
    z: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_mean: Tensor | None,
    weight: Tensor,
    add: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
    sums: bool,
    winograd: bool,
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Both gradients of :func:`conv_forward`, with the batch norm after it and the ReLU before.

    .. math:: dz = a \cdot g + b \cdot z + c, \quad
        dw = \partial \langle dz,\, w * p(x) \rangle / \partial w, \quad
        g_x = \partial \langle dz,\, w * p(x) \rangle / \partial p(x) \cdot
        [x \cdot \mathrm{scale} + \mathrm{shift} > 0]

    Args:
        g: Gradient after the batch norm of this convolution, ``(N, K, OH, OW)``.
        z: Result of the convolution; None for a batch norm whose statistics do not depend on it:
            then :math:`dz = a \cdot g`.
        a: Factor of ``g`` in :math:`dz`, ``(K,)``, from :func:`bn_backward_coefficients`.
        b: Factor of ``z`` in :math:`dz`, ``(K,)``, there when ``z`` is.
        c: Constant term of :math:`dz`, ``(K,)``, there when ``z`` is.
        x: Input of the convolution, ``(N, C, H, W)``.
        x_scale: Scale of :math:`p`, ``(C,)``; None means :math:`p(x) = x`, and no mask.
        x_shift: Shift of :math:`p`, ``(C,)``, there when ``x_scale`` is.
        x_mean: Mean of ``x`` in each channel, ``(C,)``, for the sums.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        add: Gradient of the shortcut, shape of ``x``, added to :math:`g_x`; None for none. Only
            without ``x_scale``.
        stride: Step of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        need_input: Whether :math:`g_x` is wanted.
        need_weight: Whether :math:`dw` is wanted.
        sums: Whether the sums are wanted; only with ``x_scale``.
        winograd: Not used: which algorithm computes the sums is a backend's choice.
        activation: Activation that :math:`p` applies; the formula has ReLU.

    Returns:
        :math:`g_x`, :math:`dw` in the strides of ``weight``, :math:`\sum g_x` and
        :math:`\sum g_x (x - \mu_x)`, ``(C,)``; empty what is not wanted.
    """
    dz = g * _per_channel(a)
    if z is not None and b is not None and c is not None:
        dz = dz + z * _per_channel(b) + _per_channel(c)
    with torch.enable_grad():
        p = _prologue(x, x_scale, x_shift, activation).detach().requires_grad_()
        w = weight.detach().requires_grad_()
        out = F.conv2d(p, w, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        g_x, dw = torch.autograd.grad(out, (p, w), dz)
    if x_scale is not None and x_shift is not None:
        v = x * _per_channel(x_scale) + _per_channel(x_shift)
        g_x = gradient(g_x, v, activation)
    if add is not None:
        g_x = g_x + add
    none = a.new_empty(0)
    sum_g = sum_g_xc = none
    if sums and need_input and x_mean is not None:
        sum_g = g_x.sum(_AXES)
        sum_g_xc = (g_x * (x - _per_channel(x_mean))).sum(_AXES)
    strided = torch.empty_like(weight).copy_(dw)
    return (
        g_x if need_input else x.new_empty(0),
        strided if need_weight else weight.new_empty(0),
        sum_g,
        sum_g_xc,
    )


def bn_coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r"""A batch norm of known statistics as one multiply-add.

    .. math:: \mathrm{scale} = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad
        \mathrm{shift} = \beta - \mu \cdot \mathrm{scale}

    Args:
        mean: Mean :math:`\mu`, ``(K,)``.
        var: Biased variance :math:`\sigma^2`, ``(K,)``.
        weight: Weight :math:`\gamma` of the batch norm, ``(K,)``; None means 1.
        bias: Bias :math:`\beta` of the batch norm, ``(K,)``; None means 0.
        eps: Added to the variance, :math:`\epsilon`.

    Returns:
        Scale and shift, ``(K,)`` each, dtype of ``mean``; the arithmetic is float64.
    """
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale.to(mean.dtype), shift.to(mean.dtype)


def bn_update_running(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Update the running statistics, with the unbiased variance; an empty batch leaves them.

    ``running = (1 - momentum) * running + momentum * batch``

    Args:
        mean: Mean of the batch, ``(K,)``.
        var: Biased variance of the batch, ``(K,)``.
        running_mean: Running mean, ``(K,)``, written to.
        running_var: Running variance, ``(K,)``, written to.
        momentum: Weight of the batch.
        count: Values per channel.
    """
    if count == 0:
        return
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))


def bn_backward_coefficients(
    sum_g: Tensor,
    sum_g_xc: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient of a batch norm of batch statistics as one affine function.

    .. math:: dz = a g + b z + c, \quad a = \gamma / \sigma, \quad
        b = -a \textstyle\sum g (z - \mu) / (m \sigma^2), \quad
        c = -a \textstyle\sum g / m - b \mu, \quad \sigma = \sqrt{\mathrm{var} + \epsilon}

    Args:
        sum_g: Sum of the gradient, :math:`\sum g`, ``(K,)``.
        sum_g_xc: Sum of the gradient times the centred map, :math:`\sum g (z - \mu)`, ``(K,)``.
        mean: Mean :math:`\mu` of the batch, ``(K,)``.
        var: Biased variance of the batch, ``(K,)``.
        weight: Weight :math:`\gamma` of the batch norm, ``(K,)``; None means 1.
        eps: Added to the variance, :math:`\epsilon`.
        count: Number of values per channel, :math:`m`.

    Returns:
        :math:`a`, :math:`b`, :math:`c`, and the gradients of weight and bias, ``(K,)`` each, dtype
        of ``mean``; the arithmetic is float64.
    """
    g, g_xc, center = sum_g.double(), sum_g_xc.double(), mean.double()
    invstd = (var.double() + eps).rsqrt()
    a = invstd if weight is None else invstd * weight.double()
    b = -a * invstd.square() * g_xc / max(count, 1)
    c = -a * g / max(count, 1) - b * center
    dtype = mean.dtype
    return a.to(dtype), b.to(dtype), c.to(dtype), (g_xc * invstd).to(dtype), g.to(dtype)


def stem_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor]:
    r"""Batch norm, ReLU and max-pool after the stem's convolution.

    .. math:: y = \mathrm{maxpool}(\max(0,\; z \cdot \mathrm{scale} + \mathrm{shift}))

    Args:
        z: Result of the stem's convolution, ``(N, K, H, W)``.
        scale: Scale of the batch norm after it, ``(K,)``.
        shift: Shift of the batch norm after it, ``(K,)``.
        kernel: Window of the pool, ``(height, width)``, at most 255 places.
        stride: Step of the pool, ``(height, width)``.
        padding: Border of the pool, ``(height, width)``.
        activation: Activation in front of the pool; the formula has ReLU.

    Returns:
        :math:`y`, ``(N, K, PH, PW)``, and as ``uint8`` the place of the first largest value in its
        window, row by row.
    """
    v = activate(z * _per_channel(scale) + _per_channel(shift), activation)
    y, flat = F.max_pool2d(v, tuple(kernel), tuple(stride), tuple(padding), return_indices=True)
    row, column = flat // z.shape[3], flat % z.shape[3]
    top, left = window_corners(y, stride, padding)
    return y, ((row - top) * kernel[1] + column - left).to(torch.uint8)


def stem_end_backward(
    dy: Tensor,
    index: Tensor,
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    sums: bool,
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradient of :func:`stem_end` after its batch norm, and that batch norm's sums.

    Args:
        dy: Gradient of the result, ``(N, K, PH, PW)``.
        index: ``uint8``, shape of ``dy``, from :func:`stem_end`.
        z: Result of the stem's convolution, ``(N, K, H, W)``.
        scale: Scale of the batch norm after it, ``(K,)``.
        shift: Shift of the batch norm after it, ``(K,)``.
        mean: Mean :math:`\mu` of ``z`` in each channel, ``(K,)``.
        kernel: Window of the pool, ``(height, width)``.
        stride: Step of the pool, ``(height, width)``.
        padding: Border of the pool, ``(height, width)``.
        sums: Whether the sums are wanted.
        activation: Activation in front of the pool; the formula has ReLU.

    Returns:
        :math:`g`, shape of ``z``; :math:`\sum g` and :math:`\sum g (z - \mu)`, ``(K,)`` each, empty
        when they are not wanted.
    """
    n, k, height, width = z.shape
    top, left = window_corners(dy, stride, padding)
    place = index.long()
    flat = (place // kernel[1] + top) * width + place % kernel[1] + left
    g = dy.new_zeros(n, k, height * width)
    g = g.scatter_add(2, flat.flatten(2), dy.flatten(2)).view(n, k, height, width)
    v = z * _per_channel(scale) + _per_channel(shift)
    g = gradient(g, v, activation)
    none = mean.new_empty(0)
    if not sums:
        return g, none, none
    return g, g.sum(_AXES), (g * (z - _per_channel(mean))).sum(_AXES)


def window_corners(
    y: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Row and column of the first place of each of a pool's windows; negative in the border.

    Args:
        y: The pool's result, ``(N, K, PH, PW)``.
        stride: Step of the pool, ``(height, width)``.
        padding: Border of the pool, ``(height, width)``.

    Returns:
        ``(PH, 1)`` and ``(PW,)``.
    """
    top = torch.arange(y.shape[2], device=y.device).view(-1, 1) * stride[0] - padding[0]
    left = torch.arange(y.shape[3], device=y.device) * stride[1] - padding[1]
    return top, left
