"""Residual blocks that run fused, with parameters as PyTorch keeps them."""

from __future__ import annotations

from torch import nn

from .fused_forward import BasicBlockForward, BottleneckForward
from .layers import NormLayer


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (at stride 1), without a bias."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without a bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(BasicBlockForward):
    """Two 3x3 convolutions and a shortcut.

    Constructor, children and order of initialisation are those of torchvision's block, so the same
    seed gives the same parameters.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the result.
        stride: Of the first convolution.
        downsample: Makes the shortcut fit; None when the input does.
        groups: Only 1.
        base_width: Only 64.
        dilation: Only 1.
        norm_layer: Makes the batch norm from a number of channels.

    Raises:
        ValueError: Groups, base width or dilation that the block does not have.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 left.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("groups", groups, 1),
            ("base_width", base_width, 64),
            ("dilation", dilation, 1),
        ):
            if value != only:
                raise ValueError(f"BasicBlock: {name}: expected {only}, got {value}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride


class Bottleneck(BottleneckForward):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut; the stride is on the 3x3.

    Constructor, children and order of initialisation are those of torchvision's block.

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the channels of the result.
        stride: Of the 3x3 convolution.
        downsample: Makes the shortcut fit; None when the input does.
        groups: Of the 3x3 convolution.
        base_width: Channels of the 3x3 convolution for each 64 planes and group.
        dilation: Of the 3x3 convolution.
        norm_layer: Makes the batch norm from a number of channels.

    Source:
        He et al., 2015, figure 5 right; the stride as in torchvision ("ResNet V1.5").
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
