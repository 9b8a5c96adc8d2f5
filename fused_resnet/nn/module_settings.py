"""Whether the settings of PyTorch's layers are of the types that their constructors give them.

Anyone can assign others. PyTorch's functions refuse some of them (``conv.stride = 2.0``), take
others for what they are close to (an int for a pair), and say so in their own words: modules with
such settings are called as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def _is_pair(value: Any, least: int) -> bool:
    if type(value) is not tuple or len(value) != 2:
        return False
    first, second = value
    return type(first) is int and type(second) is int and first >= least and second >= least


def conv_setting_reason(conv: nn.Conv2d) -> str:
    """Which setting of a convolution is none that its constructor gives; empty for none.

    Args:
        conv: A convolution.
    """
    stride, dilation, padding = conv.stride, conv.dilation, conv.padding
    if type(stride) is type(dilation) is type(padding) is tuple:  # the common case, at every call
        numbers = (*stride, *dilation, *padding, conv.groups)
        if len(numbers) == 7 and len(stride) == len(dilation) == 2:
            a, b, c, d, e, f, g = numbers
            plain = type(a) is type(b) is type(c) is type(d) is type(e) is type(f) is type(g) is int
            if plain and a > 0 and b > 0 and c > 0 and d > 0 and e >= 0 and f >= 0 and g > 0:
                return ""
    if not _is_pair(conv.stride, 1):
        return f"stride={conv.stride!r} is no pair of positive integers"
    if not _is_pair(conv.dilation, 1):
        return f"dilation={conv.dilation!r} is no pair of positive integers"
    if type(conv.padding) is not str and not _is_pair(conv.padding, 0):
        return f"padding={conv.padding!r} is no pair of integers"
    if type(conv.groups) is not int or conv.groups < 1:
        return f"groups={conv.groups!r} is no positive integer"
    return ""


def norm_setting_reason(eps: Any, momentum: Any) -> str:
    """Which setting of a batch norm is no number; empty for none.

    Args:
        eps: What is added to the variance.
        momentum: The weight of a batch in the running statistics; None for the average.
    """
    if type(eps) not in (float, int):
        return f"eps={eps!r} is no number"
    if momentum is not None and type(momentum) not in (float, int):
        return f"momentum={momentum!r} is no number"
    return ""


def has_pool_settings(pool: Any) -> bool:
    """Whether all settings of a pool are integers, or pairs of integers.

    Args:
        pool: A max-pool or an average pool, which has no dilation.
    """
    settings = (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    return all(type(value) is int or _is_pair(value, 0) for value in settings)
