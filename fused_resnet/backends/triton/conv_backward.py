"""Both gradients of a convolution between two batch norms.

``_data_gradient.py`` and ``_weight_gradient.py`` have the kernels; ``conv_around_pytorch.py`` has
PyTorch's convolution between passes, for the geometries that they do not take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import Activation
from ._data_gradient import data_gradient
from ._gradient_call import GradientCall
from ._gradient_plan import DataConfig, WeightConfig
from ._training_operands import nothing
from ._weight_gradient import weight_gradient
from .conv_around_pytorch import gradients_around_pytorch


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
    *,
    pytorch: bool = False,
    data_config: DataConfig | None = None,
    weight_config: WeightConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r""":math:`g_x` and :math:`dw` of :math:`dz = a g + b z + c`, and the sums of :math:`g_x`.

    Args:
        g: Gradient after the batch norm of this convolution, ``(N, K, OH, OW)``.
        z: Result of the convolution; None means :math:`dz = a g`.
        a: Factor of ``g`` in :math:`dz`, ``(K,)`` float32.
        b: Factor of ``z`` in :math:`dz`, ``(K,)`` float32, there when ``z`` is.
        c: Constant term of :math:`dz`, ``(K,)`` float32, there when ``z`` is.
        x: Input of the convolution, ``(N, C, H, W)``; float32, float16 or bfloat16.
        x_scale: Scale of the batch norm before the convolution, ``(C,)`` float32: the input was
            :math:`\max(0, x \cdot \mathrm{scale} + \mathrm{shift})`, whose mask is applied to
            :math:`g_x`; None for neither.
        x_shift: Shift of that batch norm, ``(C,)`` float32, there when ``x_scale`` is.
        x_mean: Mean of ``x`` in each channel, ``(C,)`` float32, for the sums.
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        add: Gradient of the shortcut, shape of ``x``, added to :math:`g_x`; None for none. Only
            without ``x_scale``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        need_input: Whether :math:`g_x` is wanted.
        need_weight: Whether :math:`dw` is wanted.
        sums: Whether the sums are wanted; only with ``x_scale`` and ``x_mean``.
        winograd: Has no effect; an option of the CPU's kernels.
        activation: Activation of the convolution's input; the formula of ``x_scale`` has ReLU.
        pytorch: Whether PyTorch's convolution runs between our passes, as it does for the
            geometries that the kernels do not take.
        data_config: Forces a tile of the data gradient; None chooses one.
        weight_config: Forces a tile of the weight gradient; None chooses one.

    Returns:
        :math:`g_x` channels_last, :math:`dw` in the strides of ``weight``, :math:`\sum g_x` and
        :math:`\sum g_x (x - \mu_x)`, ``(C,)`` float32; empty what is not wanted.

    Raises:
        ValueError: Wrong rank, shape or device, or operands that belong together and are not.
        TypeError: Wrong dtype.
    """
    op = "conv_backward"
    call = GradientCall(
        op, g, z, a, b, c, x, x_scale, x_shift, x_mean, weight, add,
        (stride, padding, dilation, groups), activation,
    )  # fmt: skip
    if sums and (x_scale is None or x_mean is None):
        raise ValueError(f"{op}: x_scale, x_mean: expected tensors with sums=True")
    sums = sums and need_input
    g_x = torch.empty(0, dtype=x.dtype, device=x.device)
    dw = torch.empty(0, dtype=weight.dtype, device=x.device)
    found: list[Tensor] = []
    if pytorch or not call.takes:
        g_x, dw, found = gradients_around_pytorch(call, need_input, need_weight, sums)
    else:
        if need_input:
            g_x, found = data_gradient(call, sums, data_config)
        if need_weight:
            dw = weight_gradient(call, weight_config)
    sum_g, sum_g_xc = found or (nothing(x), nothing(x))
    return g_x, dw, sum_g, sum_g_xc
