"""The operations in Triton: kernels and host functions, one file for each operation.

Host functions have the names, arguments and results of the operators in ``csrc/schemas.h``, for
float32, float16 and bfloat16 tensors on CUDA. Each has a table ``CONFIGS`` of the tiles that it
chooses from, and an argument ``config`` that forces one.
"""

from __future__ import annotations

try:
    import triton.language  # noqa: F401
except ImportError as error:
    raise ImportError("the Triton backend needs Triton (run: pip install triton)") from error

from .bn_add_relu import bn_add_relu, bn_add_relu_apply
from .bn_add_relu_backward import bn_add_relu_backward
from .conv_bn_add_relu import (
    conv_bn_add_relu,
    conv_bn_add_relu_packed,
    conv_conv_add_relu_packed,
)
from .conv_bn_relu_maxpool import conv_bn_relu_maxpool, conv_bn_relu_maxpool_packed
from .conv_statistics import conv_statistics
from .pack_conv_weight import pack_conv_weight, unpack_conv_weight
from .residual_block import residual_block

__all__ = [
    "bn_add_relu",
    "bn_add_relu_apply",
    "bn_add_relu_backward",
    "conv_bn_add_relu",
    "conv_bn_add_relu_packed",
    "conv_bn_relu_maxpool",
    "conv_bn_relu_maxpool_packed",
    "conv_conv_add_relu_packed",
    "conv_statistics",
    "pack_conv_weight",
    "residual_block",
    "unpack_conv_weight",
]
