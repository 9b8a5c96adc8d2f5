"""The ResNets of torchvision with fused blocks: same arguments, keys and initial parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.blocks import BasicBlock, Bottleneck, conv1x1
from ..nn.fused_forward import ResNetForward
from ..nn.layers import FusedSequential, NormLayer
from .weights import Source, load_into, number_of_classes


class ResNet(ResNetForward):
    """A residual network for images of about 224 x 224.

    Args:
        block: :class:`fused_resnet.nn.BasicBlock` or :class:`fused_resnet.nn.Bottleneck`.
        layers: Number of blocks in each of the four stages.
        num_classes: Number of classes.
        zero_init_residual: Initialise the last batch norm's weight of each block with 0, so that
            the block is the identity.
        groups: Number of groups of a bottleneck's 3x3 convolutions.
        width_per_group: Channels of a bottleneck's 3x3 convolutions for each group, in the first
            stage.
        replace_stride_with_dilation: For stages 2 to 4, whether to replace the stride by dilation.
        norm_layer: Called with a number of channels, returns the batch norm; None for
            :class:`torch.nn.BatchNorm2d`. Other kinds run unfused.

    Raises:
        ValueError: ``replace_stride_with_dilation`` does not have three elements.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015; names, order of
        initialisation and defaults as in ``torchvision.models.resnet``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation or [False, False, False]
        if len(dilate) != 3:
            raise ValueError(
                f"ResNet: replace_stride_with_dilation: expected None or 3 booleans, got {dilate}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialize(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        width = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != width:
            downsample = FusedSequential(conv1x1(self.inplanes, width, stride), norm_layer(width))
        shape = (self.groups, self.base_width)
        stage = [
            block(self.inplanes, planes, stride, downsample, *shape, first_dilation, norm_layer)
        ]
        self.inplanes = width
        for _ in range(1, blocks):
            stage.append(block(width, planes, 1, None, *shape, self.dilation, norm_layer))
        return nn.Sequential(*stage)

    def _initialize(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.affine:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, BasicBlock | Bottleneck):
                    last: Any = m.bn3 if isinstance(m, Bottleneck) else m.bn2
                    if last.weight is not None:
                        nn.init.zeros_(last.weight)


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    layers: list[int],
    weights: Source | None,
    progress: bool,
    arguments: dict[str, Any],
) -> ResNet:
    """Build the network and load its weights."""
    classes = number_of_classes(name, weights)
    if classes is not None and arguments.setdefault("num_classes", classes) != classes:
        raise ValueError(
            f"{name}: num_classes: expected {classes} for these weights, "
            f"got {arguments['num_classes']}"
        )
    model = ResNet(block, layers, **arguments)
    if weights is not None:
        load_into(model, weights, name=name, progress=progress)
    return model


def resnet18(*, weights: Source | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def resnet34(*, weights: Source | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def resnet50(*, weights: Source | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnet101(*, weights: Source | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnet152(*, weights: Source | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def resnext50_32x4d(
    *, weights: Source | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-50, 32 groups of width 4.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.

    Source:
        Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2016.
    """
    kwargs = _fixed("resnext50_32x4d", kwargs, groups=32, width_per_group=4)
    return _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnext101_32x8d(
    *, weights: Source | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101, 32 groups of width 8.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    kwargs = _fixed("resnext101_32x8d", kwargs, groups=32, width_per_group=8)
    return _resnet("resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnext101_64x4d(
    *, weights: Source | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101, 64 groups of width 4.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    kwargs = _fixed("resnext101_64x4d", kwargs, groups=64, width_per_group=4)
    return _resnet("resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def wide_resnet50_2(
    *, weights: Source | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-50 with 3x3 convolutions of twice the width.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.

    Source:
        Zagoruyko and Komodakis, "Wide Residual Networks", 2016.
    """
    kwargs = _fixed("wide_resnet50_2", kwargs, width_per_group=128)
    return _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def wide_resnet101_2(
    *, weights: Source | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNet-101 with 3x3 convolutions of twice the width.

    Args:
        weights: A torchvision enum or its name, the path of a file, or a state dict; None for
            random parameters.
        progress: Show the progress of a download.
        **kwargs: Further arguments of :class:`ResNet`, by keyword.

    Raises:
        ValueError: The weights cannot be read or do not fit.
        RuntimeError: torchvision is needed and not installed, or a download failed.
    """
    kwargs = _fixed("wide_resnet101_2", kwargs, width_per_group=128)
    return _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def _fixed(name: str, arguments: dict[str, Any], **values: int) -> dict[str, Any]:
    """The arguments together with those that the network's name fixes."""
    for key, value in values.items():
        if arguments.setdefault(key, value) != value:
            raise ValueError(f"{name}: {key}: expected {value}, got {arguments[key]}")
    return arguments
