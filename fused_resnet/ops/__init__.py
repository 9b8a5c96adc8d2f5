"""The public operations; :mod:`.functional` documents what all of them have in common."""

from .functional import bn_add_relu, conv_bn_add_relu, conv_bn_relu_maxpool
from .packed import (
    conv_bn_add_relu_packed,
    conv_bn_relu_maxpool_packed,
    pack_conv_weight,
    residual_block,
    unpack_conv_weight,
)

__all__ = [
    "bn_add_relu",
    "conv_bn_add_relu",
    "conv_bn_add_relu_packed",
    "conv_bn_relu_maxpool",
    "conv_bn_relu_maxpool_packed",
    "pack_conv_weight",
    "residual_block",
    "unpack_conv_weight",
]
