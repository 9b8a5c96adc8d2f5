"""The paper's CIFAR networks in plain PyTorch, which benchmarks and training compare with.

The keys of its state dict are those of :func:`fused_resnet.cifar_resnet`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class UnfusedCifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which subsamples and pads where the shape changes.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the result.
        stride: Stride of the first convolution.
        residual: Whether the block has its shortcut.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, residual: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        self.stride, self.padding, self.residual = stride, (planes - inplanes) // 2, residual

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: Input, ``(N, inplanes, H, W)``.

        Returns:
            ``(N, planes, H / stride, W / stride)``.
        """
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if not self.residual:
            return F.relu(y)
        if self.padding or self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class UnfusedCifarResNet(nn.Module):
    """A network for 32 x 32 images: 16, 32 and 64 channels in three stages.

    Args:
        depth: Number of layers: 20, 32, 44, 56 or 110.
        residual: Whether the blocks have shortcuts; without them it is the paper's plain network.
        classes: Number of classes.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2, option A.
    """

    def __init__(self, depth: int, residual: bool = True, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1, residual)
        self.layer2 = _stage(blocks, 16, 32, 2, residual)
        self.layer3 = _stage(blocks, 32, 64, 2, residual)
        self.linear = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images, ``(N, 3, H, W)``.

        Returns:
            Logits, ``(N, classes)``.
        """
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean((2, 3)))


def _stage(blocks: int, inplanes: int, planes: int, stride: int, residual: bool) -> nn.Sequential:
    first = UnfusedCifarBlock(inplanes, planes, stride, residual)
    rest = (UnfusedCifarBlock(planes, planes, 1, residual) for _ in range(1, blocks))
    return nn.Sequential(first, *rest)
