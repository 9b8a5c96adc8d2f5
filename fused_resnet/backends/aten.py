"""What PyTorch itself ships fused: oneDNN's convolutions on a CPU, cuDNN's on a GPU.

Both add a bias, a residual and ReLU to a convolution, and neither knows batch norm: it is folded
into the weight and the bias at every call, from the live parameters. PyTorch offers these operators
without gradients; here they have that of every other backend. What the libraries refuse, or are
known to be slow or wrong at, runs unfused.

That is all that there is of the backend for who asks for it by name. The tuner is shown some more:
the other operations of inference as the best that PyTorch's own calls can do, so that what it
chooses is never slower than those. On CUDA a packed weight is a weight in channels_last order, so
they read it where it lies; the fold is made at every call, because a folded copy would be another
one to keep. On the CPU packed weights are laid out for this package's kernels alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import composed_block, reference
from .folding import fold

#: The operations that the libraries have; every other one is plain PyTorch.
OPERATIONS = ("conv_bn_add_relu",)

#: By device, what the tuner may choose besides.
_COMPOSED = {
    "cpu": ("conv_bn_relu_maxpool",),
    "cuda": (
        "conv_bn_relu_maxpool",
        "conv_bn_add_relu_packed",
        "conv_bn_relu_maxpool_packed",
        "residual_block",
    ),
}


def operators(device: str) -> tuple[str, ...]:
    """The operators that are here for ``"cpu"`` or ``"cuda"``."""
    return OPERATIONS + _COMPOSED[device]


def why_not() -> str:
    """Why neither library can be called here; empty when one can."""
    if torch.backends.mkldnn.is_available() or _has_cudnn():
        return ""
    return "this build of PyTorch has neither oneDNN nor a cuDNN that finds its device"


def _has_cudnn() -> bool:
    return torch.cuda.is_available() and torch.backends.cudnn.is_available()


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_add_relu` in inference, arguments as in its schema."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    fused = _onednn if x.device.type == "cpu" else _cudnn
    takes = _onednn_takes(x, groups) if x.device.type == "cpu" else _cudnn_takes(weight)
    if not (takes and relu and last and x.numel() > 0):
        return reference.conv_bn_add_relu(
            x,
            weight,
            bn_weight,
            bn_bias,
            mean,
            var,
            residual,
            conv_bias=conv_bias,
            stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1]),
            dilation=(dilation[0], dilation[1]),
            groups=groups,
            eps=eps,
            relu=relu,
        )
    scale, shift = fold(conv_bias, bn_weight, bn_bias, mean, var, eps, torch.float32)
    folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    bias = shift.to(weight.dtype)
    return fused(x, folded, bias, residual, stride, padding, dilation, groups)


def conv_bn_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    """:func:`conv_bn_add_relu`, and PyTorch's pool."""
    y = conv_bn_add_relu(
        x, weight, conv_bias, bn_weight, bn_bias, mean, var, None, stride, padding, dilation,
        groups, eps, True,
    )  # fmt: skip
    return F.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def conv_bn_add_relu_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    winograd: bool = False,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_add_relu_packed` on CUDA, arguments as in its schema."""
    k, c, kh, kw = weight_shape
    weight = packed.view(k, kh, kw, c).permute(0, 3, 1, 2)  # channels_last, and no copy
    folded = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = shift.to(x.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (list(stride), list(padding), list(dilation), groups)
    if relu and x.numel() > 0 and _cudnn_takes(folded):
        return _cudnn(x, folded, bias, residual, *geometry)
    y = F.conv2d(x, folded, bias, *geometry)
    if residual is not None:
        y += residual
    if relu:
        y.relu_()
    return y.contiguous(memory_format=torch.channels_last)


def conv_bn_relu_maxpool_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    """:func:`conv_bn_add_relu_packed`, and PyTorch's pool."""
    geometry = (stride, padding, dilation, groups)
    y = conv_bn_add_relu_packed(x, packed, scale, shift, None, weight_shape, *geometry, True)
    return F.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def residual_block(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    joined: Tensor | None,
    joined_shift: Tensor | None,
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    winograd: bool,
) -> Tensor:
    """:func:`conv_bn_add_relu_packed` for each of a frozen block's convolutions."""
    geometry = (bottleneck, stride, dilation, groups)
    return composed_block.residual_block(
        conv_bn_add_relu_packed, x, packed, scale, shift, *geometry
    )


def _onednn_takes(x: Tensor, groups: int) -> bool:
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    # Maps of which both memory formats are true (one channel, one pixel) it takes for contiguous,
    # and then, by version and dtype, fails. In half precision the fused add fails for groups too.
    if x.is_contiguous():
        return False
    if x.dtype is torch.float32:
        return True
    if groups > 1:
        return False
    if x.dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return x.dtype is torch.float16 and bool(mkldnn._is_mkldnn_fp16_supported())


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    operator = torch.ops.mkldnn._convolution_pointwise
    sizes = (padding, stride, dilation, groups)
    if residual is None:
        return operator(x, weight, bias, *sizes, "relu", [], "")
    other = residual.contiguous(memory_format=torch.channels_last)
    return operator.binary(x, other, weight, bias, *sizes, "add", 1.0, "relu", [], "")


def _cudnn_takes(weight: Tensor) -> bool:
    """Whether cuDNN's fused convolution is safe and fast for these filters.

    For large ones it is many times slower than its plain one, and it does not support single
    channels, which the plain one does: it is asked only for channels that fill 16-byte vectors.

    Source:
        pytorch/pytorch issues 68506 and 62926.
    """
    k, c, *size = weight.shape
    vector = 16 // weight.element_size()
    fits = k % vector == 0 and c % vector == 0 and max(size) <= 3
    return _has_cudnn() and weight.dtype is not torch.float64 and fits


def _cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    other = residual.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)
