"""The CIFAR-10 networks of the paper, 20 to 110 layers, residual and plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block_calls import training_format
from ..nn.blocks import conv1x1, conv3x3
from ..nn.fused_forward import BlockModules, FusedForward, ResidualForward, block_modules_of
from ..nn.group_calls import run_sequence
from ..nn.groups import Group, sequence_groups
from ..nn.layers import FusedSequential
from ..nn.module_kinds import child_of, original_class
from .weights import Source, load_into

#: Depths of the paper: 6 n + 2 layers for n blocks in each of three stages.
DEPTHS = (20, 32, 44, 56, 110)


class PadShortcut(nn.Module):
    """The shortcut "option A": subsampled, padded with channels of zeros; without parameters.

    Args:
        stride: Stride in both directions.
        padding: Channels of zeros on each side.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, section
        3.3; zeros on both sides as in akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad.

        Args:
            x: Input, ``(N, C, H, W)``.

        Returns:
            ``(N, C + 2 padding, ceil(H / stride), ceil(W / stride))``.
        """
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *[self.padding] * 2))

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"stride={self.stride}, padding={self.padding}"


class CifarBlock(ResidualForward):
    """Two 3x3 convolutions and, with ``residual``, a shortcut.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the result.
        stride: Stride of the first convolution.
        residual: Whether the block has a shortcut; without it, it is the plain network's.
        option: The shortcut where the shape changes: ``"A"`` subsamples and pads with zeros,
            ``"B"`` is a 1x1 convolution with batch norm.
    """

    convolutions = 2

    def __init__(
        self, inplanes: int, planes: int, stride: int, residual: bool, option: str
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.residual = residual
        self.shortcut: nn.Module = nn.Sequential()
        if residual and (stride != 1 or inplanes != planes):
            self.shortcut = (
                PadShortcut(stride, (planes - inplanes) // 2)
                if option == "A"
                else FusedSequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
            )

    def shortcut_of(self, x: Tensor) -> Tensor | None:
        """What is added to the main branch; None in the plain network.

        Args:
            x: Input of the block, ``(N, C, H, W)``.
        """
        return child_of(self, "shortcut")(x) if self.residual else None

    def block_modules(self) -> BlockModules | None:
        """The block's convolutions and its shortcut."""
        shortcut = child_of(self, "shortcut")
        if self.residual and original_class(shortcut) is not PadShortcut:
            return block_modules_of(self, 2, shortcut)
        block = block_modules_of(self, 2, None)
        assert block is not None
        if not self.residual:
            return block._replace(shortcut="none")
        padding = (shortcut.padding, shortcut.stride)
        members = [*block.members, shortcut]
        return block._replace(members=members, padding=padding, shortcut="zeros")


def _stage(
    blocks: int, inplanes: int, planes: int, stride: int, residual: bool, option: str
) -> nn.Sequential:
    first = CifarBlock(inplanes, planes, stride, residual, option)
    rest = [CifarBlock(planes, planes, 1, residual, option) for _ in range(1, blocks)]
    return nn.Sequential(first, *rest)


class CifarResNet(FusedForward):
    """A network for 32 x 32 images: 16, 32 and 64 channels in three stages.

    Args:
        blocks: Number of blocks in each stage.
        residual: Whether the blocks have shortcuts; without them it is the paper's plain network.
        shortcut: The shortcut where the shape changes: ``"A"`` subsamples and pads with zeros,
            ``"B"`` is a 1x1 convolution with batch norm.
        num_classes: Number of classes.

    Raises:
        ValueError: ``shortcut`` is neither ``"A"`` nor ``"B"``.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2.
    """

    def __init__(
        self, blocks: int, residual: bool = True, shortcut: str = "A", num_classes: int = 10
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"CifarResNet: shortcut: expected 'A' or 'B', got {shortcut!r}")
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, 16, 16, 1, residual, shortcut)
        self.layer2 = _stage(blocks, 16, 32, 2, residual, shortcut)
        self.layer3 = _stage(blocks, 32, 64, 2, residual, shortcut)
        self.linear = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images, ``(N, 3, H, W)``.

        Returns:
            Logits, ``(N, num_classes)``.
        """
        x = run_sequence((self.conv1, self.bn1, self.relu), training_format(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    def fused_groups(self) -> list[Group]:
        """The group of the first convolution."""
        return sequence_groups({n: getattr(self, n) for n in ("conv1", "bn1", "relu")})


def cifar_resnet(
    depth: int,
    residual: bool = True,
    shortcut: str = "A",
    num_classes: int = 10,
    weights: Source | None = None,
) -> CifarResNet:
    """A residual CIFAR network of the paper, or its plain counterpart.

    Args:
        depth: Number of layers: 20, 32, 44, 56 or 110.
        residual: Whether the blocks have shortcuts; the convolutions' keys are the same without.
        shortcut: The shortcut where the shape changes: ``"A"`` subsamples and pads with zeros, as
            in the paper; ``"B"`` is a 1x1 convolution with batch norm.
        num_classes: Number of classes.
        weights: The path of a file, or a state dict; None for random parameters.

    Raises:
        ValueError: Another depth or shortcut; weights that cannot be read or do not fit.
    """
    if depth not in DEPTHS:
        raise ValueError(f"cifar_resnet: depth: expected one of {DEPTHS}, got {depth!r}")
    model = CifarResNet((depth - 2) // 6, residual, shortcut, num_classes)
    if weights is not None:
        load_into(model, weights, name=f"cifar_resnet{depth}")
    return model
