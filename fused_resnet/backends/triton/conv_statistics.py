"""A convolution with the batch statistics of its result, for training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..activation import Activation
from ._common import check_map
from ._conv_call import Affine, ConvCall, filters
from ._conv_plan import ConvConfig


def conv_statistics(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution, and the mean and biased variance of each channel of its rounded result.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        weight: Filters, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: Bias, ``(K,)``, any float; None means 0.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        config: Forces a configuration, of which split_k is ignored; None chooses one.

    Returns:
        The result in the memory format of ``x``; mean and variance, ``(K,)`` float32.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel larger than the padded map.
        TypeError: Wrong dtype.
    """
    op = "conv_statistics"
    check_map(op, "x", x)
    call = ConvCall(
        op,
        x,
        filters(op, weight, x),
        weight.shape,
        (stride, padding, dilation, groups),
        Affine(bias=conv_bias),
        ("", "", "conv_bias", "", ""),
        activation=Activation.NONE,
    )
    y, mean, var = call.run_with_statistics(config)
    return y.contiguous(memory_format=suggest_memory_format(x)), mean, var
