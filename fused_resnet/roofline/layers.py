"""A network's convolutions, pool and blocks, with their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import resnet
from ..models.sources import MODELS


@dataclass(frozen=True)
class Conv:
    """A convolution of a network.

    Attributes:
        path: Path of the module.
        channels: Input channels.
        filters: Output channels.
        kernel: Height and width of a filter.
        stride: Stride in both directions.
        padding: Padding on each side.
        dilation: Distance between taps.
        groups: Number of groups.
        size: Height and width of the input.
    """

    path: str
    channels: int
    filters: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    size: int

    @property
    def out(self) -> int:
        """Height and width of the result."""
        return _window(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def read(self) -> int:
        """Elements of one image that it reads, not all if the stride exceeds the kernel."""
        return self.channels * min(self.size, self.out * self.kernel) ** 2

    @property
    def written(self) -> int:
        """Elements of the result of one image."""
        return self.filters * self.out**2

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.filters * self.channels // self.groups * self.kernel**2

    @property
    def flops(self) -> int:
        """Flops for one image, a multiplication and an addition counted as two."""
        return 2 * self.weight * self.out**2

    def __str__(self) -> str:
        return (
            f"conv {self.kernel}x{self.kernel}{_slash(self.stride)} "
            f"{self.channels} to {self.filters}, {self.size}x{self.size}{_groups(self.groups)}"
        )


@dataclass(frozen=True)
class Pool:
    """The stem's max-pool.

    Attributes:
        path: Path of the module.
        channels: Number of channels.
        kernel: Height and width of the window.
        stride: Stride in both directions.
        padding: Padding on each side.
        size: Height and width of the input.
    """

    path: str
    channels: int
    kernel: int
    stride: int
    padding: int
    size: int

    @property
    def out(self) -> int:
        """Height and width of the result."""
        return _window(self.size, self.kernel, self.stride, self.padding, 1)

    def __str__(self) -> str:
        window = f"{self.kernel}x{self.kernel}{_slash(self.stride)}"
        return f"maxpool {window} {self.channels}, {self.size}x{self.size}"


@dataclass(frozen=True)
class BlockShape:
    """A basic block or a bottleneck.

    Attributes:
        path: Path of the module.
        stage: 1 to 4.
        convs: The convolutions in order.
        downsample: The shortcut's convolution, or None.
    """

    path: str
    stage: int
    convs: tuple[Conv, ...]
    downsample: Conv | None

    @property
    def all_convs(self) -> tuple[Conv, ...]:
        """All convolutions; the shortcut's, if there is one, is the last."""
        return (*self.convs, self.downsample) if self.downsample else self.convs

    @property
    def bottleneck(self) -> bool:
        """Whether it has three convolutions."""
        return len(self.convs) == 3

    def __str__(self) -> str:
        first, last = self.convs[0], self.convs[-1]
        kind = "bottleneck" if self.bottleneck else "basic block"
        widths = "-".join(str(conv.filters) for conv in self.convs)
        shortcut = ", downsample" if self.downsample else ""
        return (
            f"{kind}{_slash(first.size // last.out)} {first.channels} to {widths}, "
            f"{first.size}x{first.size}{_groups(self.convs[1].groups)}{shortcut}"
        )


@dataclass(frozen=True)
class Network:
    """The layers of a network.

    Attributes:
        stem: The first convolution.
        pool: The max-pool.
        blocks: The blocks of all stages, in order.
        features: Channels of the last map.
        classes: Length of the logits.
    """

    stem: Conv
    pool: Pool
    blocks: tuple[BlockShape, ...]
    features: int
    classes: int

    @property
    def last_size(self) -> int:
        """Height and width of the last map."""
        return self.blocks[-1].convs[-1].out


def network(name: str, size: int = 224) -> Network:
    """The layers of a network by name.

    Args:
        name: One of :data:`fused_resnet.models.sources.MODELS`.
        size: Height and width of the images.

    Raises:
        ValueError: The network is unknown.
    """
    if name not in MODELS:
        raise ValueError(f"roofline: name: expected one of {', '.join(MODELS)}, got {name!r}")
    with torch.device("meta"):  # parameters without memory
        model: Any = getattr(resnet, name)()
    stem = _conv("conv1", model.conv1, size)
    window = model.maxpool
    pool = Pool(
        "maxpool", stem.filters, window.kernel_size, window.stride, window.padding, stem.out
    )
    blocks: list[BlockShape] = []
    at = pool.out
    for stage in range(1, 5):
        for index, module in enumerate(model.get_submodule(f"layer{stage}").children()):
            blocks.append(_block(f"layer{stage}.{index}", stage, module, at))
            at = blocks[-1].convs[-1].out
    return Network(stem, pool, tuple(blocks), model.fc.in_features, model.fc.out_features)


def _block(path: str, stage: int, module: Any, size: int) -> BlockShape:
    convs: list[Conv] = []
    at = size
    for name in ("conv1", "conv2", "conv3"):
        if hasattr(module, name):
            convs.append(_conv(f"{path}.{name}", getattr(module, name), at))
            at = convs[-1].out
    shortcut = module.downsample
    downsample = None if shortcut is None else _conv(f"{path}.downsample.0", shortcut[0], size)
    return BlockShape(path, stage, tuple(convs), downsample)


def _conv(path: str, conv: nn.Conv2d, size: int) -> Conv:
    return Conv(
        path,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        conv.stride[0],
        int(conv.padding[0]),
        conv.dilation[0],
        conv.groups,
        size,
    )


def _window(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _slash(stride: int) -> str:
    return f"/{stride}" if stride > 1 else ""


def _groups(groups: int) -> str:
    return f", {groups} groups" if groups > 1 else ""
