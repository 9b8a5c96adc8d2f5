"""Functions that the kernels and host functions of several operations share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Maximum number of registers per thread. Without it, ptxas spills a few registers to fit one more
#: program on a multiprocessor.
REGISTERS = 255

#: A kernel; ``Any``, as mypy cannot type ``kernel[grid](...)``.
Kernel = Any


@triton.jit
def channel_vector(v_ptr, c, valid, default: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of some channels, in float32.

    Args:
        v_ptr: Vector of one value per channel, (C,) any float, or None.
        c: Channels of the program.
        valid: Which of them exist.
        default: Value without a vector, and past its end.
    """
    if v_ptr is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(v_ptr + c, mask=valid, other=default).to(tl.float32)


@triton.jit
def channel_affine(c, valid, conv_bias, weight, bias, mean, var, eps):  # type: ignore[no-untyped-def]
    """A batch norm after a convolution with a bias, as one multiply-add, for some channels.

    scale = weight / sqrt(var + eps), shift = (conv_bias - mean) * scale + bias. All pointers are to
    vectors (C,) of any float, or None.

    Args:
        c: Channels of the program.
        valid: Which of them exist.
        conv_bias: Bias of the convolution; None for 0.
        weight: Weight of the batch norm; None for 1.
        bias: Bias of the batch norm; None for 0.
        mean: Mean of the batch norm; None for 0.
        var: Variance of the batch norm; None: the weight is the scale.
        eps: Added to the variance.
    """
    scale = channel_vector(weight, c, valid, 1.0)
    center = channel_vector(conv_bias, c, valid, 0.0) - channel_vector(mean, c, valid, 0.0)
    if var is not None:
        scale = tl.div_rn(scale, tl.sqrt_rn(channel_vector(var, c, valid, 1.0) + eps))
    return scale, center * scale + channel_vector(bias, c, valid, 0.0)


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of ``x`` is current, where Triton launches kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(x: Tensor) -> int:
    """Number of multiprocessors of ``x``'s device; a small number for the interpreter on a CPU."""
    if not x.is_cuda:
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def architecture(x: Tensor) -> int:
    """Architecture of ``x``'s device, 90 for sm_90; on a CPU the oldest supported one."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


# Checks, with the messages of csrc/checks.h


def check_map(op: str, name: str, x: Tensor) -> None:
    """``x`` is a 4-d map in a dtype that the kernels support."""
    if x.dim() != 4:
        raise ValueError(f"{op}: {name}: expected 4 dimensions (N, C, H, W), got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op}: {name}: expected dtype float32, bfloat16 or float16 on {x.device}, "
            f"got {x.dtype}"
        )


def check_same(op: str, name: str, t: Tensor | None, shape: Any, like: Tensor) -> None:
    """``t`` is None or has that shape, and the dtype and device of ``like``."""
    if t is None:
        return
    if list(t.shape) != list(shape):
        raise ValueError(f"{op}: {name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {name}: expected dtype {like.dtype}, got {t.dtype}")
    check_device(op, name, t, like)


def check_vector(op: str, name: str, v: Tensor | None, channels: int, like: Tensor) -> None:
    """``v`` is None or ``(channels,)``, of any floating-point dtype, on the device of ``like``."""
    if v is None:
        return
    if list(v.shape) != [channels]:
        raise ValueError(f"{op}: {name}: expected shape [{channels}], got {list(v.shape)}")
    if not v.dtype.is_floating_point:
        raise TypeError(f"{op}: {name}: expected a floating-point dtype, got {v.dtype}")
    check_device(op, name, v, like)


def check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """``t`` is on the device of ``like``."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name}: expected device {like.device}, got {t.device}")


def vector(op: str, name: str, v: Tensor | None, channels: int, like: Tensor) -> Tensor | None:
    """``v``, checked and contiguous."""
    check_vector(op, name, v, channels, like)
    return None if v is None else v.contiguous()
