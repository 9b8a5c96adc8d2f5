"""The shapes that operations are tested on, named by their reasons, and operands for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Conv:
    """A convolution: input (n, c, h, w), output channels, kernel and the rest."""

    why: str
    x: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int] = (3, 3)
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.why


CONVS = [
    Conv("1x1", (2, 64, 14, 14), 96, (1, 1)),
    Conv("1x1-stride2", (2, 32, 9, 9), 64, (1, 1), {"stride": 2}),
    Conv("1x1-padded", (1, 8, 5, 5), 8, (1, 1), {"padding": 1}),
    Conv("3x3", (2, 64, 14, 14), 64, args={"padding": 1}),
    Conv("3x3-stride2-odd", (2, 24, 15, 13), 40, args={"stride": 2, "padding": 1}),
    Conv("3x3-valid", (1, 16, 8, 8), 16),
    Conv("3x3-dilated", (1, 16, 13, 13), 16, args={"padding": 2, "dilation": 2}),
    Conv("7x7-stem", (1, 3, 37, 41), 64, (7, 7), {"stride": 2, "padding": 3}),
    Conv("one-channel", (1, 1, 6, 6), 1, args={"padding": 1}),
    Conv("prime-channels", (1, 17, 7, 7), 23, args={"padding": 1}),
    Conv("panel-and-one", (1, 8, 5, 5), 33, args={"padding": 1}),
    Conv("groups", (2, 32, 9, 9), 64, args={"padding": 1, "groups": 4}),
    # Several groups share a vector, except in the last case, whose sum is too long.
    Conv("groups-of-4", (2, 64, 9, 15), 64, args={"padding": 1, "groups": 16}),
    Conv("groups-of-4-1x1", (1, 48, 5, 7), 48, (1, 1), {"groups": 12}),
    Conv("groups-of-8-oblong", (1, 64, 14, 33), 64, (3, 2), {"stride": (2, 1), "groups": 8}),
    Conv("groups-of-4-7x7", (1, 16, 9, 9), 16, (7, 7), {"padding": 3, "groups": 4}),
    Conv("depthwise", (1, 19, 9, 9), 19, args={"padding": 1, "groups": 19}),
    Conv("oblong", (1, 8, 20, 9), 16, (3, 5), {"stride": (2, 1), "padding": (0, 3)}),
    Conv("oblong-dilated", (1, 8, 20, 9), 16, (5, 2), {"dilation": (1, 3), "padding": (2, 1)}),
    Conv("tile-and-one", (1, 8, 1, 15), 16, args={"padding": 1}),
    Conv("one-pixel", (3, 16, 1, 1), 16, args={"padding": 1}),
    Conv("deep", (1, 512, 7, 7), 32, args={"padding": 1}),
    Conv("many-blocks", (1, 64, 56, 57), 32, args={"padding": 1}),
    Conv("wide-channels", (3, 1024, 5, 5), 64, (1, 1)),
    # The pixels that are read are a page apart, and are copied to contiguous memory.
    Conv("page-apart-stride2", (2, 512, 7, 6), 40, (1, 1), {"stride": 2}),
    Conv("page-apart-groups", (1, 1024, 3, 5), 48, (1, 1), {"groups": 2}),
]

#: Maps for batch norm.
MAPS = {
    "resnet": (2, 64, 7, 7),
    "one-channel": (3, 1, 5, 5),
    "prime-channels": (2, 37, 5, 3),
    "one-pixel": (5, 16, 1, 1),
    "one-image": (1, 24, 9, 9),
    "many-chunks": (2, 20, 41, 41),
    "wide": (2, 2050, 2, 2),
}


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers, drawn in float64 so that every dtype gets the same ones, rounded."""
    return (torch.randn(*shape, dtype=torch.float64) * scale + shift).to(dtype)


def batch_norm(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and variance, none of them at its initial value.

    Half precision keeps them in float32, as autocast does.
    """
    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    weight = torch.rand(channels, dtype=torch.float64) + 0.5
    weight[::3] *= -1
    var = torch.rand(channels, dtype=torch.float64) + 0.5
    bias, mean = torch.randn(2, channels, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype), mean.to(dtype), var.to(dtype)


def conv_weight(case: Conv, dtype: torch.dtype) -> Tensor:
    """Filters scaled so that the result has variance 1."""
    c = case.x[1] // case.args.get("groups", 1)
    fan_in = c * case.kernel[0] * case.kernel[1]
    return normal(case.k, c, *case.kernel, dtype=dtype, scale=fan_in**-0.5)


def doubled(values: Any) -> Any:
    """Copies in float64, so that the originals are not written to."""
    if isinstance(values, Tensor):
        return values.detach().to(torch.float64, copy=True)
    return tuple(doubled(v) for v in values)
