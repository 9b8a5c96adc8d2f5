"""Fused residual blocks, with the children and parameters of torchvision's."""

from __future__ import annotations

from torch import nn

from ..backends.activation import ActivationLike, choose
from .fused_forward import BasicBlockForward, BottleneckForward
from .layers import NormLayer
from .module_kinds import activation_module


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution without a bias, padded to keep the size of the map at stride 1.

    Args:
        in_planes: Channels of the input.
        out_planes: Channels of the result.
        stride: Stride in both directions.
        groups: Number of independent groups of channels.
        dilation: Distance between the filters' taps, and the padding on each side.
    """
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without a bias.

    Args:
        in_planes: Channels of the input.
        out_planes: Channels of the result.
        stride: Stride in both directions.
    """
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(BasicBlockForward):
    """Two 3x3 convolutions and a shortcut.

    Constructor, children and order of initialisation are those of torchvision's block, so the same
    seed gives the same parameters.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the result.
        stride: Stride of the first convolution.
        downsample: Module of the shortcut, which gives the input the shape of the result; None for
            the identity.
        groups: Number of groups of channels; only 1 is supported.
        base_width: Width that a bottleneck scales with; only 64 is supported.
        dilation: Distance between the filters' taps; only 1 is supported.
        norm_layer: Called with a number of channels, returns the batch norm; None for
            :class:`torch.nn.BatchNorm2d`.
        activation: Activation after each convolution but the shortcut's, ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Attributes:
        expansion: Channels of the result over ``planes``.

    Raises:
        ValueError: ``groups``, ``base_width`` or ``dilation`` has an unsupported value.

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
        *,
        activation: ActivationLike = None,
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
        self.relu = activation_module(choose(type(self).__name__, True, activation))
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride


class Bottleneck(BottleneckForward):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut; the stride is on the 3x3.

    Constructor, children and order of initialisation are those of torchvision's block, so the same
    seed gives the same parameters.

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the channels of the result.
        stride: Stride of the 3x3 convolution.
        downsample: Module of the shortcut, which gives the input the shape of the result; None for
            the identity.
        groups: Number of independent groups of channels of the 3x3 convolution.
        base_width: Channels of the 3x3 convolution for each group, if ``planes`` is 64; they grow
            in proportion to ``planes``.
        dilation: Distance between the taps of the 3x3 filters.
        norm_layer: Called with a number of channels, returns the batch norm; None for
            :class:`torch.nn.BatchNorm2d`.
        activation: Activation after each convolution but the shortcut's, ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Attributes:
        expansion: Channels of the result over ``planes``.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 right; the stride
        is on the 3x3 convolution as in torchvision ("ResNet V1.5").
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
        *,
        activation: ActivationLike = None,
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
        self.relu = activation_module(choose(type(self).__name__, True, activation))
        self.downsample = downsample
        self.stride = stride
