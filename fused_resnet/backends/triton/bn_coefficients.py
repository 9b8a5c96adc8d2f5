r"""The numbers of a batch norm, per channel and in float64: a launch for each of the three calls.

Forward: scale and shift. Running statistics. Backward: dz = a g + b z + c and the gradients of
weight and bias, from sum g and sum g (z - mean). A few thousand numbers, whose cost is the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bn_finish import store_scale_and_shift, update_running
from ._common import Kernel, cdiv, channel_vector, on_device
from ._training_operands import check_length, parameter_operand, vector_operand

#: Channels of a program.
BLOCK = 128


@triton.jit
def bn_coefficients_kernel(  # type: ignore[no-untyped-def]
    mean_ptr, var_ptr,
    weight_ptr, bias_ptr,
    scale_ptr, shift_ptr,
    C, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """scale = weight / sqrt(var + eps), shift = bias - mean * scale.

    Args:
        mean_ptr: Mean, (C,) float32.
        var_ptr: Biased variance, (C,) float32.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (C,) any float, or None for 0.
        scale_ptr: Receives the scale, (C,) float32.
        shift_ptr: Receives the shift, (C,) float32.
        C: Number of channels.
        eps: Added to the variance.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = channel_vector(mean_ptr, c, c < C, 0.0).to(tl.float64)
    var = channel_vector(var_ptr, c, c < C, 1.0).to(tl.float64)
    store_scale_and_shift(c, c < C, mean, var, weight_ptr, bias_ptr, scale_ptr, shift_ptr, eps)


@triton.jit
def bn_update_running_kernel(  # type: ignore[no-untyped-def]
    mean_ptr, var_ptr,
    running_mean_ptr, running_var_ptr,
    C, count, momentum,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """running = running + momentum * (batch - running), of mean and unbiased variance.

    Args:
        mean_ptr: Mean of the batch, (C,) float32.
        var_ptr: Biased variance of the batch, (C,) float32.
        running_mean_ptr: Running mean, (C,) any float, written to.
        running_var_ptr: Running variance, (C,) any float, written to.
        C: Number of channels.
        count: Values per channel.
        momentum: Weight of the batch in the running statistics.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = channel_vector(mean_ptr, c, c < C, 0.0).to(tl.float64)
    var = channel_vector(var_ptr, c, c < C, 0.0).to(tl.float64)
    update_running(c, c < C, mean, var, running_mean_ptr, running_var_ptr, count, momentum)


@triton.jit
def bn_backward_coefficients_kernel(  # type: ignore[no-untyped-def]
    sum_g_ptr, sum_g_xc_ptr, mean_ptr, var_ptr,
    weight_ptr,
    a_ptr, b_ptr, c_ptr, dweight_ptr, dbias_ptr,
    C, count, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a, b and c of dz = a g + b z + c, and the gradients of weight and bias.

    Args:
        sum_g_ptr: sum g, (C,) float32.
        sum_g_xc_ptr: sum g (z - mean), (C,) float32.
        mean_ptr: Mean, (C,) float32.
        var_ptr: Biased variance, (C,) float32.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        a_ptr: Receives a, (C,) float32.
        b_ptr: Receives b, (C,) float32.
        c_ptr: Receives c, (C,) float32.
        dweight_ptr: Receives the gradient of the weight, (C,) float32.
        dbias_ptr: Receives the gradient of the bias, (C,) float32.
        C: Number of channels.
        count: Values per channel.
        eps: Added to the variance.
        BLOCK_C: Channels of a program.
    """
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = channel_vector(sum_g_ptr, i, i < C, 0.0).to(tl.float64)
    g_xc = channel_vector(sum_g_xc_ptr, i, i < C, 0.0).to(tl.float64)
    mean = channel_vector(mean_ptr, i, i < C, 0.0).to(tl.float64)
    var = channel_vector(var_ptr, i, i < C, 1.0).to(tl.float64)
    one = tl.full((BLOCK_C,), 1.0, tl.float64)
    invstd = one / tl.sqrt(var + eps)
    a = channel_vector(weight_ptr, i, i < C, 1.0).to(tl.float64) * invstd
    b = -a * invstd * invstd * g_xc / count
    c = -a * g / count - b * mean
    tl.store(a_ptr + i, a.to(tl.float32), mask=i < C)
    tl.store(b_ptr + i, b.to(tl.float32), mask=i < C)
    tl.store(c_ptr + i, c.to(tl.float32), mask=i < C)
    tl.store(dweight_ptr + i, (g_xc * invstd).to(tl.float32), mask=i < C)
    tl.store(dbias_ptr + i, g.to(tl.float32), mask=i < C)


def _launch(like: Tensor, kernel: Kernel, *arguments: object) -> None:
    if like.numel():
        with on_device(like):
            kernel[(cdiv(like.numel(), BLOCK),)](*arguments, BLOCK_C=BLOCK, num_warps=4)


def bn_coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r""":math:`\gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`\beta - \mu \cdot` that.

    Args:
        mean: Mean :math:`\mu`, ``(K,)`` float32.
        var: Biased variance :math:`\sigma^2`, ``(K,)`` float32.
        weight: Weight :math:`\gamma` of the batch norm, ``(K,)``, any float; None means 1.
        bias: Bias :math:`\beta` of the batch norm, ``(K,)``, any float; None means 0.
        eps: Added to the variance, :math:`\epsilon`.

    Returns:
        Scale and shift, ``(K,)`` float32.

    Raises:
        ValueError: Wrong rank, shape or device.
        TypeError: Wrong dtype.
    """
    op = "bn_coefficients"
    channels = check_length(op, "mean", mean)
    scale, shift = mean.new_empty(channels), mean.new_empty(channels)
    _launch(
        mean, bn_coefficients_kernel, mean.contiguous(),
        vector_operand(op, "var", var, channels, mean),
        parameter_operand(op, "weight", weight, channels, mean),
        parameter_operand(op, "bias", bias, channels, mean),
        scale, shift, channels, float(eps),
    )  # fmt: skip
    return scale, shift


def bn_update_running(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Update the running statistics, with the unbiased variance; an empty batch leaves them.

    As PyTorch's batch norm it leaves the version counters alone.

    Args:
        mean: Mean of the batch, ``(K,)`` float32.
        var: Biased variance of the batch, ``(K,)`` float32.
        running_mean: Running mean, ``(K,)``, any float, written to.
        running_var: Running variance, ``(K,)``, any float, written to.
        momentum: Weight of the batch.
        count: Values per channel.

    Raises:
        ValueError: Wrong rank, shape or device; a single value per channel.
        TypeError: Wrong dtype.
    """
    op = "bn_update_running"
    channels = check_length(op, "mean", mean)
    if count < 0:
        raise ValueError(f"{op}: count: expected an int >= 0, got {count}")
    if count == 1:
        raise ValueError(f"{op}: count: expected more than 1 value per channel, got 1")
    targets = {"running_mean": running_mean, "running_var": running_var}
    dense = {name: parameter_operand(op, name, t, channels, mean) for name, t in targets.items()}
    if count == 0:
        return
    _launch(
        mean, bn_update_running_kernel, mean.contiguous(),
        vector_operand(op, "var", var, channels, mean),
        *dense.values(), channels, count, float(momentum),
    )  # fmt: skip
    for name, t in targets.items():
        if dense[name] is not t and not t.is_contiguous():  # the kernel wrote to a copy
            with torch.autograd._unsafe_preserve_version_counter(t):
                t.copy_(dense[name])  # type: ignore[arg-type]


def bn_backward_coefficients(
    sum_g: Tensor,
    sum_g_xc: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r""":math:`dz = a g + b z + c` from the sums, and the gradients of weight and bias.

    Args:
        sum_g: Sum of the gradient, :math:`\sum g`, ``(K,)`` float32.
        sum_g_xc: Sum of the gradient times the centred map, :math:`\sum g (z - \mu)`, ``(K,)``
            float32.
        mean: Mean :math:`\mu` of the batch, ``(K,)`` float32.
        var: Biased variance of the batch, ``(K,)`` float32.
        weight: Weight :math:`\gamma` of the batch norm, ``(K,)``, any float; None means 1.
        eps: Added to the variance.
        count: Values per channel.

    Returns:
        :math:`a`, :math:`b`, :math:`c`, and the gradients of weight and bias, ``(K,)`` float32.

    Raises:
        ValueError: Wrong rank, shape or device.
        TypeError: Wrong dtype.
    """
    op = "bn_backward_coefficients"
    channels = check_length(op, "mean", mean)
    if count < 0:
        raise ValueError(f"{op}: count: expected an int >= 0, got {count}")
    a, b, c, dweight, dbias = (mean.new_empty(channels) for _ in range(5))
    _launch(
        mean, bn_backward_coefficients_kernel,
        vector_operand(op, "sum_g", sum_g, channels, mean),
        vector_operand(op, "sum_g_xc", sum_g_xc, channels, mean),
        mean.contiguous(),
        vector_operand(op, "var", var, channels, mean),
        parameter_operand(op, "weight", weight, channels, mean),
        a, b, c, dweight, dbias, channels, max(count, 1), float(eps),
    )  # fmt: skip
    return a, b, c, dweight, dbias
