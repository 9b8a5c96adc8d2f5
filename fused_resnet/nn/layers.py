"""Fused layers, with the parameters and buffers of the PyTorch modules that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase

from ..backends.activation import Activation, ActivationLike, choose
from .fused_forward import FusedForward, SequentialForward
from .group_calls import bn_add_relu, conv_bn, run_sequence
from .groups import Group, conv_bn_groups, sequence_groups
from .module_kinds import FUNCTIONS, activate, activation_module

IntOrPair = int | tuple[int, int]
NormLayer = Callable[..., nn.Module]


class _ConvBN(FusedForward):
    """The children and the constructor of the convolution modules."""

    activation: Activation = Activation.RELU  # of modules that were pickled before it was a choice

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__()
        self.activation = choose(type(self).__name__, True, activation)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv: nn.Module = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            **where,
        )
        self.bn: nn.Module = nn.BatchNorm2d(
            out_channels, eps, momentum, affine, track_running_stats, **where
        )

    def fused_groups(self) -> list[Group]:
        """The group of the convolution and the batch norm."""
        return conv_bn_groups(self, "conv", "bn", FUNCTIONS.get(self.activation))

    def extra_repr(self) -> str:
        """The activation, unless it is ReLU."""
        return _activation_repr(self.activation)


def _activation_repr(activation: Activation) -> str:
    name = activation.name.lower()
    return "" if activation is Activation.RELU else f"activation={name}"


class ConvBNReLU2d(_ConvBN):
    r"""Convolution, batch norm and ReLU: :math:`y = \max(0, \mathrm{bn}(w * x + b))`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Size of the filters, an int or ``(height, width)``.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side of the input, an int or ``(height, width)``; or ``"same"`` or
            ``"valid"``.
        dilation: Distance between the filters' taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        bias: Whether the convolution has a bias.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None for the mean of all batches.
        affine: Whether batch norm has a weight and a bias.
        track_running_stats: Whether running statistics are kept; without them, the statistics of
            the batch are used in eval mode too.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters and buffers.
        activation: ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    The children are ``conv`` and ``bn``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, batch norm and ReLU.

        Args:
            x: Input, ``(N, in_channels, H, W)``.

        Returns:
            ``(N, out_channels, OH, OW)``, dtype and memory format of ``x``.
        """
        return conv_bn(self.conv, self.bn, FUNCTIONS.get(self.activation), x)


class ConvBNAddReLU2d(_ConvBN):
    r"""Convolution, batch norm, residual and ReLU: :math:`y = \max(0, \mathrm{bn}(w * x + b) + r)`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Size of the filters, an int or ``(height, width)``.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side of the input, an int or ``(height, width)``; or ``"same"`` or
            ``"valid"``.
        dilation: Distance between the filters' taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        bias: Whether the convolution has a bias.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None for the mean of all batches.
        affine: Whether batch norm has a weight and a bias.
        track_running_stats: Whether running statistics are kept; without them, the statistics of
            the batch are used in eval mode too.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters and buffers.
        activation: ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    The children are ``conv`` and ``bn``.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply convolution and batch norm, add the residual and apply ReLU.

        Args:
            x: Input, ``(N, in_channels, H, W)``.
            residual: Map that is added, :math:`r`, ``(N, out_channels, OH, OW)``, dtype of the
                result.

        Returns:
            ``(N, out_channels, OH, OW)``, dtype and memory format of ``x``.
        """
        return conv_bn(self.conv, self.bn, FUNCTIONS.get(self.activation), x, residual)


class BNAddReLU2d(_NormBase, FusedForward):
    r"""Batch norm, an optional residual and ReLU: :math:`y = \max(0, \mathrm{bn}(x) [+ r])`.

    Parameters, buffers and ``state_dict`` keys are those of :class:`torch.nn.BatchNorm2d`. It is no
    subclass of it: converters that replace every ``BatchNorm2d`` by another normalisation, such as
    ``nn.SyncBatchNorm.convert_sync_batchnorm``, would drop the residual and the ReLU. They leave
    this module as it is.

    Args:
        num_features: Number of channels.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None for the mean of all batches.
        affine: Whether batch norm has a weight and a bias.
        track_running_stats: Whether running statistics are kept; without them, the statistics of
            the batch are used in eval mode too.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters and buffers.
        activation: ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.
    """

    activation: Activation = Activation.RELU  # of modules that were pickled before it was a choice

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.activation = choose(type(self).__name__, True, activation)

    def extra_repr(self) -> str:
        """The batch norm's settings, and the activation unless it is ReLU."""
        words = [super().extra_repr(), _activation_repr(self.activation)]
        return ", ".join(filter(None, words))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply batch norm, add the residual and apply ReLU.

        Args:
            x: Input, ``(N, C, H, W)``.
            residual: Map that is added, :math:`r`, shape and dtype of ``x``; None means 0.

        Returns:
            ``(N, C, H, W)``, dtype and memory format of ``x``.
        """
        if isinstance(x, Proxy):
            return self._traced(x, residual)
        return bn_add_relu(self, x, residual, self.activation)

    def _traced(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """By PyTorch's functions, which ``torch.fx`` records; a trace counts no batches."""
        by_batch = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        y = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            by_batch,
            self.momentum or 0.0,
            self.eps,
        )
        y = y if residual is None else y + residual
        return activate(FUNCTIONS.get(self.activation), y)

    def fused_groups(self) -> list[Group]:
        """The group of the module itself."""
        return [Group("bn_add_relu")]


class Stem(FusedForward):
    r"""The stem of a ResNet: :math:`y = \mathrm{maxpool}(\max(0, \mathrm{bn}(w * x)))`.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the result.
        kernel_size: Size of the convolution's filters, an int or ``(height, width)``.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side of the image, an int or ``(height, width)``.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Stride of the max-pool, an int or ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, an int or
            ``(height, width)``.
        norm_layer: Called with a number of channels, returns the batch norm; None for
            :class:`torch.nn.BatchNorm2d`.
        activation: ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    The children are ``conv``, ``bn``, ``relu``, which is the activation, and ``pool``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        kernel_size: IntOrPair = 7,
        stride: IntOrPair = 2,
        padding: IntOrPair = 3,
        pool_kernel: IntOrPair = 3,
        pool_stride: IntOrPair = 2,
        pool_padding: IntOrPair = 1,
        norm_layer: NormLayer | None = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = activation_module(choose("Stem", True, activation))
        self.pool = nn.MaxPool2d(pool_kernel, pool_stride, pool_padding)

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, batch norm, ReLU and max-pool.

        Args:
            x: Image, ``(N, in_channels, H, W)``.

        Returns:
            ``(N, out_channels, PH, PW)``, dtype and memory format of ``x``.
        """
        return run_sequence(self.children(), x)

    def fused_groups(self) -> list[Group]:
        """The one group of all children."""
        return sequence_groups(dict(self.named_children()))


class FusedSequential(SequentialForward, nn.Sequential):
    """An ``nn.Sequential`` that runs convolution, batch norm, ReLU and max-pool as one operation.

    Args:
        args: The modules in the order of their calls, or one ``OrderedDict`` of them by name.
    """
