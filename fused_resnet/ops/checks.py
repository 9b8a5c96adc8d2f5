"""Argument checks of the operations; messages name the operation, the argument, expected and got.

They give the same message for every backend. The compiled operators repeat those that memory safety
depends on (``csrc/checks.h``), for direct calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Storage types that the operations support.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


#: ``(height, width)``.
Pair = tuple[int, int]

#: Strides, paddings, dilations and windows are below 2^31, as in ``csrc/checks.h``.
MOST = 2**31 - 1


def pair(op: str, name: str, value: int | Pair, least: int) -> Pair:
    """``value`` as ``(height, width)``, each at least ``least`` and at most :data:`MOST`.

    Args:
        op: Name of the operation, for error messages.
        name: Name of the argument, for error messages.
        value: An int for both directions, or ``(height, width)``.
        least: The least value that is allowed.

    Raises:
        ValueError: ``value`` is neither, or out of range.
    """
    if type(value) is tuple and len(value) == 2:  # the common case, at every call of a module
        first, second = value
        if type(first) is type(second) is int and least <= first <= MOST >= second >= least:
            return value
    result = (value, value) if isinstance(value, int) else tuple(value)
    if len(result) != 2 or any(not isinstance(v, int) or not least <= v <= MOST for v in result):
        raise ValueError(
            f"{op}: {name}: expected an int >= {least} and < 2**31 or a pair, got {value!r}"
        )
    return result[0], result[1]


def feature_map(op: str, name: str, x: Tensor) -> None:
    """``x`` is a 4-d tensor of a supported dtype.

    Args:
        op: Name of the operation, for error messages.
        name: Name of the argument, for error messages.
        x: The argument.

    Raises:
        TypeError: ``x`` is no tensor, or of another dtype.
        ValueError: ``x`` has another number of dimensions.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name}: expected 4 dimensions (N, C, H, W), got {_shape(x)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{op}: {name}: expected dtype in ({names}), got {x.dtype}")


def channel_vector(op: str, name: str, v: Tensor | None, channels: int, like: Tensor) -> None:
    """``v`` is None or ``(channels,)`` on the device of ``like``, in its dtype or float32.

    Args:
        op: Name of the operation, for error messages.
        name: Name of the argument, for error messages.
        v: The vector; None for none.
        channels: Length that the vector must have.
        like: Tensor whose device the vector must have; the vector's dtype must be the same or
            float32, and float64 where this is float64.

    Raises:
        ValueError: The shape or the device is another one.
        TypeError: The dtype is another one.
    """
    if v is None:
        return
    if tuple(v.shape) != (channels,):
        raise ValueError(f"{op}: {name}: expected shape ({channels},), got {_shape(v)}")
    wanted = (like.dtype,) if like.dtype is torch.float64 else (like.dtype, torch.float32)
    if v.dtype not in wanted:
        raise TypeError(f"{op}: {name}: expected dtype {_either(wanted)}, got {v.dtype}")
    same_device(op, name, v, like)


def same_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """``t`` is on the device of ``like``.

    Args:
        op: Name of the operation, for error messages.
        name: Name of the argument, for error messages.
        t: The argument.
        like: Tensor whose device the argument must have.

    Raises:
        ValueError: The devices differ.
    """
    if t.device != like.device:
        raise ValueError(f"{op}: {name}: expected device {like.device}, got {t.device}")


def residual(op: str, r: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """``r`` is None or has the shape, dtype and device of the result.

    Args:
        op: Name of the operation, for error messages.
        r: The residual; None for none.
        shape: Shape of the operation's result.
        like: Tensor whose dtype and device the residual must have.

    Raises:
        ValueError: The shape or the device is another one.
        TypeError: The dtype is another one.
    """
    if r is None:
        return
    if tuple(r.shape) != shape:
        raise ValueError(f"{op}: residual: expected shape {shape}, got {_shape(r)}")
    if r.dtype != like.dtype:
        raise TypeError(f"{op}: residual: expected dtype {like.dtype}, got {r.dtype}")
    same_device(op, "residual", r, like)


def statistics(
    op: str,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    values_per_channel: int,
    shape: tuple[int, ...],
    eps: float,
) -> None:
    """Both or no running statistics; both in inference; in training what the batch's need.

    These are more than one value per channel, and a positive ``eps``: a channel of equal values
    would be divided by zero. In inference ``eps`` may be zero.

    Args:
        op: Name of the operation, for error messages.
        running_mean: Running mean; None for none.
        running_var: Running variance; None for none.
        training: Whether the statistics of the batch are used.
        values_per_channel: Number of values of the batch in each channel.
        shape: Shape of the map that is normalised, for error messages.
        eps: Added to the variance.

    Raises:
        ValueError: One of these conditions does not hold.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            f"{op}: running_mean, running_var: expected both or neither, got one of them"
        )
    if not training and running_mean is None:
        raise ValueError(
            f"{op}: running_mean, running_var: expected tensors when training=False, got None"
        )
    if training and values_per_channel == 1:
        raise ValueError(
            f"{op}: x: expected more than 1 value per channel when training, got {shape}"
        )
    if training:
        positive_eps(op, eps)
    else:
        no_negative_eps(op, eps)


def no_negative_eps(op: str, eps: float) -> None:
    """As PyTorch's, batch norm in inference refuses a negative ``eps``.

    Args:
        op: Name of the operation, for error messages.
        eps: Added to the variance.

    Raises:
        ValueError: ``eps`` is negative.
    """
    if eps < 0:
        raise ValueError(f"{op}: eps: expected a number of at least 0, got {eps}")


def positive_eps(op: str, eps: float) -> None:
    """As PyTorch's, batch norm in training needs a positive ``eps``.

    Args:
        op: Name of the operation, for error messages.
        eps: Added to the variance.

    Raises:
        ValueError: ``eps`` is zero, negative or NaN.
    """
    if not eps > 0:
        raise ValueError(f"{op}: eps: expected a positive number when training, got {eps}")


def convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[int, ...]:
    """The convolution's arguments are consistent. Returns the shape of its result.

    Args:
        op: Name of the operation, for error messages.
        x: Input, ``(N, C, H, W)``.
        weight: Filters, ``(K, C / groups, kh, kw)``, dtype and device of ``x``.
        bias: Bias of the convolution, ``(K,)``; None for none.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.

    Returns:
        ``(N, K, OH, OW)``.

    Raises:
        ValueError: Wrong rank, shape, channel count or device; or a kernel larger than the padded
            map.
        TypeError: Wrong dtype.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: conv_weight: expected 4 dimensions (K, C / groups, kh, kw), "
            f"got {_shape(weight)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: conv_weight: expected dtype {x.dtype}, got {weight.dtype}")
    same_device(op, "conv_weight", weight, x)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups: expected a divisor of the {weight.shape[0]} output channels, "
            f"got {groups}"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: x: expected {weight.shape[1] * groups} channels for conv_weight "
            f"{_shape(weight)} and groups={groups}, got {x.shape[1]}"
        )
    channel_vector(op, "conv_bias", bias, weight.shape[0], x)
    size = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    ]
    if min(size) < 1:
        raise ValueError(
            f"{op}: x: expected a feature map at least as large as the dilated kernel, got "
            f"{_shape(x)} for kernel {_shape(weight)[2:]}, padding {padding}, dilation {dilation}"
        )
    return (x.shape[0], weight.shape[0], size[0], size[1])


def pool(
    op: str,
    shape: tuple[int, ...],
    kernel: int | Pair,
    stride: int | Pair,
    padding: int | Pair,
) -> tuple[Pair, Pair, Pair]:
    """The max-pool's arguments are valid for a map of this shape. Returns them as pairs.

    Args:
        op: Name of the operation, for error messages.
        shape: Shape of the map that is pooled, ``(N, C, H, W)``.
        kernel: Window of the pool, an int or ``(height, width)``.
        stride: Stride of the pool, an int or ``(height, width)``.
        padding: Padding on each side, an int or ``(height, width)``; at most half the window.

    Returns:
        Kernel, stride and padding, ``(height, width)`` each.

    Raises:
        ValueError: A value is out of range, or the window is larger than the padded map.
    """
    kernels = pair(op, "pool_kernel", kernel, 1)
    paddings = pair(op, "pool_padding", padding, 0)
    if any(2 * p > k for p, k in zip(paddings, kernels, strict=True)):
        raise ValueError(
            f"{op}: pool_padding: expected at most half of pool_kernel {kernels}, got {paddings}"
        )
    if any(shape[i + 2] + 2 * paddings[i] < kernels[i] for i in (0, 1)):
        raise ValueError(
            f"{op}: pool_kernel: expected at most the padded map of {shape}, got {kernels}"
        )
    return kernels, pair(op, "pool_stride", stride, 1), paddings


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
