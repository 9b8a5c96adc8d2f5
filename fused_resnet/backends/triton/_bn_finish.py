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
    c, valid, mean, var,  # float64; var biased
    weight_ptr, bias_ptr,  # (C,) any float, or None
    scale_ptr, shift_ptr,  # (C,) float32
    eps,
):  # fmt: skip
    """Scale and shift of ``z * scale + shift``, computed in float64."""
    scale = channel_vector(weight_ptr, c, valid, 1.0).to(tl.float64) / tl.sqrt(var + eps)
    shift = channel_vector(bias_ptr, c, valid, 0.0).to(tl.float64) - mean * scale
    tl.store(scale_ptr + c, scale.to(tl.float32), mask=valid)
    tl.store(shift_ptr + c, shift.to(tl.float32), mask=valid)


@triton.jit
def move_running(running_ptr, c, valid, batch, momentum):  # type: ignore[no-untyped-def]
    """``running = running + momentum * (batch - running)``, in float64."""
    old = tl.load(running_ptr + c, mask=valid, other=0.0).to(tl.float64)
    new = old + momentum * (batch - old)
    tl.store(running_ptr + c, new.to(running_ptr.dtype.element_ty), mask=valid)


@triton.jit
def update_running(  # type: ignore[no-untyped-def]
    c, valid, mean, var,  # float64; var biased
    running_mean_ptr, running_var_ptr,  # (C,) any float
    count, momentum,
):  # fmt: skip
    """Move the running statistics towards the batch's mean and unbiased variance."""
    n = tl.zeros(mean.shape, tl.float64) + count
    move_running(running_mean_ptr, c, valid, mean, momentum)
    move_running(running_var_ptr, c, valid, var * (n / (n - 1.0)), momentum)
