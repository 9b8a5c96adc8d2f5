"""What a batch norm makes of its batch's mean and variance, inside the kernel that finishes them.

Scale and shift, the running statistics and the count of batches are a few numbers per channel: a
launch of its own for each would cost more than it computes. Parameters are read in the dtype that
they have: no copy in another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import channel_vector


@triton.jit
def store_scale_and_shift(  # type: ignore[no-untyped-def]
    c, valid, mean, var,
    weight_ptr, bias_ptr,
    scale_ptr, shift_ptr,
    eps,
):  # fmt: skip
    """scale = weight / sqrt(var + eps), shift = bias - mean * scale; computed in float64.

    Args:
        c: Channels of the program.
        valid: Which of them exist.
        mean: Mean of the batch, float64.
        var: Biased variance of the batch, float64.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (C,) any float, or None for 0.
        scale_ptr: Receives the scale, (C,) float32.
        shift_ptr: Receives the shift, (C,) float32.
        eps: Added to the variance.
    """
    scale = channel_vector(weight_ptr, c, valid, 1.0).to(tl.float64) / tl.sqrt(var + eps)
    shift = channel_vector(bias_ptr, c, valid, 0.0).to(tl.float64) - mean * scale
    tl.store(scale_ptr + c, scale.to(tl.float32), mask=valid)
    tl.store(shift_ptr + c, shift.to(tl.float32), mask=valid)


@triton.jit
def move_running(running_ptr, c, valid, batch, momentum):  # type: ignore[no-untyped-def]
    """running = running + momentum * (batch - running), in float64.

    Args:
        running_ptr: Running statistic, (C,) any float, written to.
        c: Channels of the program.
        valid: Which of them exist.
        batch: The batch's statistic, float64.
        momentum: Weight of the batch in the running statistics.
    """
    old = tl.load(running_ptr + c, mask=valid, other=0.0).to(tl.float64)
    new = old + momentum * (batch - old)
    tl.store(running_ptr + c, new.to(running_ptr.dtype.element_ty), mask=valid)


@triton.jit
def update_running(  # type: ignore[no-untyped-def]
    c, valid, mean, var,
    running_mean_ptr, running_var_ptr,
    count, momentum,
):  # fmt: skip
    """Move the running statistics towards the batch's mean and unbiased variance.

    Args:
        c: Channels of the program.
        valid: Which of them exist.
        mean: Mean of the batch, float64.
        var: Biased variance of the batch, float64.
        running_mean_ptr: Running mean, (C,) any float, written to.
        running_var_ptr: Running variance, (C,) any float, written to.
        count: Values per channel.
        momentum: Weight of the batch in the running statistics.
    """
    n = tl.zeros(mean.shape, tl.float64) + count
    move_running(running_mean_ptr, c, valid, mean, momentum)
    move_running(running_var_ptr, c, valid, var * (n / (n - 1.0)), momentum)
