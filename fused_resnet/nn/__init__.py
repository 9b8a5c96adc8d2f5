"""The modules: layers and residual blocks that run fused, with parameters as PyTorch keeps them."""

from .blocks import BasicBlock, Bottleneck, conv1x1, conv3x3
from .layers import BNAddReLU2d, ConvBNAddReLU2d, ConvBNReLU2d, FusedSequential, Stem

__all__ = [
    "BNAddReLU2d",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAddReLU2d",
    "ConvBNReLU2d",
    "FusedSequential",
    "Stem",
    "conv1x1",
    "conv3x3",
]
