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

from .block_end import block_end
from .block_end_backward import block_end_backward, block_end_backward_recomputed
from .bn_add_relu import bn_add_relu, bn_add_relu_apply
from .bn_add_relu_backward import bn_add_relu_backward
from .bn_coefficients import bn_backward_coefficients, bn_coefficients, bn_update_running
from .conv_backward import conv_backward
from .conv_bn_add_relu import (
    conv_bn_add_relu,
    conv_bn_add_relu_packed,
    conv_conv_add_relu_packed,
)
from .conv_bn_relu_maxpool import conv_bn_relu_maxpool, conv_bn_relu_maxpool_packed
from .conv_forward import conv_bn_forward, conv_forward
from .conv_statistics import conv_statistics
from .pack_conv_weight import pack_conv_weight, unpack_conv_weight
from .residual_block import residual_block
from .stem_end import stem_end, stem_end_backward

__all__ = [
    "block_end",
    "block_end_backward",
    "block_end_backward_recomputed",
    "bn_add_relu",
    "bn_add_relu_apply",
    "bn_add_relu_backward",
    "bn_backward_coefficients",
    "bn_coefficients",
    "bn_update_running",
    "conv_backward",
    "conv_bn_add_relu",
    "conv_bn_add_relu_packed",
    "conv_bn_forward",
    "conv_bn_relu_maxpool",
    "conv_bn_relu_maxpool_packed",
    "conv_conv_add_relu_packed",
    "conv_forward",
    "conv_statistics",
    "pack_conv_weight",
    "residual_block",
    "stem_end",
    "stem_end_backward",
    "unpack_conv_weight",
]
