"""The operands of the training primitives, checked: maps in channels_last, vectors in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import check_map, check_same, check_vector


def first_map(op: str, name: str, t: Tensor) -> Tensor:
    """The map whose dtype and device are the call's, in channels_last.

    Args:
        op: Name of the operation, for messages.
        name: Name of the argument, for error messages.
        t: The map, ``(N, C, H, W)``, float32, float16 or bfloat16.
    """
    check_map(op, name, t)
    return t.contiguous(memory_format=torch.channels_last)


def map_operand(
    op: str, name: str, t: Tensor | None, shape: Sequence[int], like: Tensor
) -> Tensor | None:
    """A map of that shape in channels_last; None where there is none.

    Args:
        op: Name of the operation, for messages.
        name: Name of the argument, for error messages.
        t: The map.
        shape: Shape that the map must have.
        like: A map whose dtype and device it must have.
    """
    if t is None:
        return None
    check_same(op, name, t, shape, like)
    return t.contiguous(memory_format=torch.channels_last)


def vector_operand(
    op: str, name: str, v: Tensor | None, channels: int, like: Tensor
) -> Tensor | None:
    """A vector per channel, float32 and contiguous; None where there is none.

    Args:
        op: Name of the operation, for messages.
        name: Name of the argument, for error messages.
        v: The vector.
        channels: Length that the vector must have.
        like: A tensor whose device it must have.
    """
    if v is None:
        return None
    check_vector(op, name, v, channels, like)
    if v.dtype is not torch.float32:
        raise TypeError(f"{op}: {name}: expected dtype float32, got {v.dtype}")
    return v.contiguous()


def parameter_operand(
    op: str, name: str, v: Tensor | None, channels: int, like: Tensor
) -> Tensor | None:
    """A parameter of a batch norm, of any floating-point dtype, contiguous; None for none.

    Args:
        op: Name of the operation, for messages.
        name: Name of the argument, for error messages.
        v: The vector.
        channels: Length that the vector must have.
        like: A tensor whose device it must have.
    """
    if v is None:
        return None
    check_vector(op, name, v, channels, like)
    return v.contiguous()


def check_together(op: str, **operands: Tensor | None) -> None:
    """Either all of the operands are tensors, or none is.

    Args:
        op: Name of the operation, for messages.
        operands: Tensors or None, by the names that messages use.
    """
    if len({t is None for t in operands.values()}) > 1:
        raise ValueError(f"{op}: {', '.join(operands)}: expected both or neither")


def check_length(op: str, name: str, v: Tensor) -> int:
    """The length of the vector whose device is the call's.

    Args:
        op: Name of the operation, for messages.
        name: Name of the argument, for error messages.
        v: A float32 vector.
    """
    if v.dim() != 1:
        raise ValueError(f"{op}: {name}: expected 1 dimension, got {list(v.shape)}")
    if v.dtype is not torch.float32:
        raise TypeError(f"{op}: {name}: expected dtype float32, got {v.dtype}")
    return v.shape[0]


def like_map(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map in channels_last.

    Args:
        x: Tensor that gives the device, and the dtype unless ``dtype`` is given.
        shape: Shape of the map, ``(N, C, H, W)``.
        dtype: Dtype of the map; None for that of ``x``.
    """
    return torch.empty(
        list(shape), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )


def nothing(x: Tensor) -> Tensor:
    """An empty vector, a tensor of its own: compilers take two results for two tensors.

    Args:
        x: Tensor that gives the device.
    """
    return torch.empty(0, dtype=torch.float32, device=x.device)
