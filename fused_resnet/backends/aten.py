"""The backend ``library``: fused convolutions that PyTorch ships, oneDNN's and cuDNN's.

Both add a bias, a residual and ReLU to a convolution. Neither has a batch norm, so it is folded
into the weight and the bias at every call, from the live parameters. PyTorch's operators have no
gradients; here they have those of all other backends. Calls that the libraries reject, or are known
to be slow or wrong for, run unfused.

Forced by name, the backend has :data:`OPERATIONS` only. For the tuner there are also the other
operations of inference, composed of PyTorch's calls, so that ``auto`` is never slower than those.
On CUDA a packed weight is a weight in channels_last order, so they read it without a copy; it is
scaled at every call, since a folded copy would take memory. On the CPU the layout of packed weights
is specific to this package's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import composed_block, reference
from .activation import Activation, activate_
from .folding import fold

#: The operations that the libraries have; all others are plain PyTorch.
OPERATIONS = ("conv_bn_add_relu",)

#: Further operators that the tuner may choose, by device.
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
    """The operators that the tuner may choose on a device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    return OPERATIONS + _COMPOSED[device]


def reason() -> str:
    """Why neither library is available; empty when one is."""
    if torch.backends.mkldnn.is_available() or _has_cudnn():
        return ""
    return "this build of PyTorch has neither oneDNN nor cuDNN with a CUDA device"


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
    activation: int,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_add_relu` in inference, with the operator's arguments.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        weight: Filters, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: Bias of the convolution, ``(K,)``; None means 0.
        bn_weight: Scale of the batch norm, ``(K,)``; None means 1.
        bn_bias: Shift of the batch norm, ``(K,)``; None means 0.
        mean: Running mean, ``(K,)``.
        var: Running variance, ``(K,)``.
        residual: Shape and dtype of the result, added before the activation; None means 0.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        eps: Added to the variance.
        activation: Activation that is applied to the sum, a number of :class:`.Activation`.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    fused = _onednn if x.device.type == "cpu" else _cudnn
    supported = _onednn_supports(x, groups) if x.device.type == "cpu" else _cudnn_supports(weight)
    relu = activation == Activation.RELU  # all that the libraries have
    if not (supported and relu and last and x.numel() > 0):
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
            activation=Activation(activation),
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
    activation: int = Activation.RELU,
) -> Tensor:
    """:func:`conv_bn_add_relu` followed by PyTorch's max-pool.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        weight: Filters, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: Bias of the convolution, ``(K,)``; None means 0.
        bn_weight: Scale of the batch norm, ``(K,)``; None means 1.
        bn_bias: Shift of the batch norm, ``(K,)``; None means 0.
        mean: Running mean, ``(K,)``.
        var: Running variance, ``(K,)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        eps: Added to the variance.
        pool_kernel: Window of the max-pool, ``(height, width)``.
        pool_stride: Stride of the max-pool, ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, ``(height, width)``.
        activation: Activation in front of the pool, a number of :class:`.Activation`.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``.
    """
    y = conv_bn_add_relu(
        x, weight, conv_bias, bn_weight, bn_bias, mean, var, None, stride, padding, dilation,
        groups, eps, activation,
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
    activation: int,
    winograd: bool = False,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_add_relu_packed` on CUDA, with the operator's arguments.

    Args:
        x: Input on CUDA, ``(N, C, H, W)``; float32, bfloat16 or float16.
        packed: Filters as a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: Scale of each output channel, ``(K,)``, float32.
        shift: Shift of each output channel, ``(K,)``, float32.
        residual: Shape and dtype of the result, added before the activation; None means 0.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        activation: Activation that is applied to the sum, a number of :class:`.Activation`.
        winograd: Has no effect; an option of the CPU's kernels.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.
    """
    k, c, kh, kw = weight_shape
    weight = packed.view(k, kh, kw, c).permute(0, 3, 1, 2)  # channels_last, without a copy
    folded = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = shift.to(x.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (list(stride), list(padding), list(dilation), groups)
    if activation == Activation.RELU and x.numel() > 0 and _cudnn_supports(folded):
        return _cudnn(x, folded, bias, residual, *geometry)
    y = F.conv2d(x, folded, bias, *geometry)
    if residual is not None:
        y += residual
    return activate_(y, activation).contiguous(memory_format=torch.channels_last)


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
    activation: int = Activation.RELU,
) -> Tensor:
    """:func:`conv_bn_add_relu_packed` followed by PyTorch's max-pool.

    Args:
        x: Input on CUDA, ``(N, C, H, W)``; float32, bfloat16 or float16.
        packed: Filters as a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: Scale of each output channel, ``(K,)``, float32.
        shift: Shift of each output channel, ``(K,)``, float32.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        pool_kernel: Window of the max-pool, ``(height, width)``.
        pool_stride: Stride of the max-pool, ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, ``(height, width)``.
        activation: Activation in front of the pool, a number of :class:`.Activation`.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``, channels_last.
    """
    geometry = (stride, padding, dilation, groups)
    y = conv_bn_add_relu_packed(x, packed, scale, shift, None, weight_shape, *geometry, activation)
    return F.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def residual_block(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    concatenated: Tensor | None,
    concatenated_shift: Tensor | None,
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    winograd: bool,
    activation: int = Activation.RELU,
) -> Tensor:
    """A frozen block by one :func:`conv_bn_add_relu_packed` for each of its convolutions.

    Args:
        x: Input on CUDA, ``(N, C, H, W)``; float32, bfloat16 or float16.
        packed: Filters of each convolution as a vector: the main branch's in order, followed by the
            shortcut's if it has one.
        scale: Scale of each convolution's output channels, ``(K,)``, float32, in the order of
            ``packed``.
        shift: Shift of each convolution's output channels, ``(K,)``, float32, in the order of
            ``packed``.
        concatenated: Has no effect: the last convolution and the shortcut run one after the other.
        concatenated_shift: Has no effect, as ``concatenated``.
        bottleneck: Whether the block is a bottleneck rather than a basic block.
        stride: Stride of the block in both directions.
        dilation: Distance between the taps of a bottleneck's 3x3 filters.
        groups: Number of independent groups of channels of a bottleneck's 3x3 convolution.
        winograd: Has no effect; an option of the CPU's kernels.
        activation: Activation after each convolution but the shortcut's; the last one follows the
            addition.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.
    """
    geometry = (bottleneck, stride, dilation, groups)
    return composed_block.residual_block(
        conv_bn_add_relu_packed, x, packed, scale, shift, *geometry, activation
    )


def _onednn_supports(x: Tensor, groups: int) -> bool:
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    # A map that is contiguous in both memory formats (one channel, one pixel) is treated as
    # contiguous, which fails in some versions and dtypes. In half precision the fused add fails
    # with groups too.
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


def _cudnn_supports(weight: Tensor) -> bool:
    """Whether cuDNN's fused convolution is safe and fast for these filters.

    For filters larger than 3x3 it is many times slower than cuDNN's plain convolution, and it does
    not support single channels: it is used only where the channels fill 16-byte vectors.

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
