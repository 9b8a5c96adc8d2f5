"""Layers that run fused, with parameters as PyTorch keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase

from .fused_forward import FusedForward, SequentialForward
from .group_calls import bn_add_relu, conv_bn, run_sequence
from .groups import Group, conv_bn_groups, sequence_groups
from .module_kinds import RELU

IntOrPair = int | tuple[int, int]
NormLayer = Callable[..., nn.Module]


class _ConvBN(FusedForward):
    """The children and the arguments that the convolution modules share."""

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
    ) -> None:
        super().__init__()
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
        """See :meth:`fused_resnet.nn.fused_forward.FusedForward.fused_groups`."""
        return conv_bn_groups(self, "conv", "bn", RELU)


class ConvBNReLU2d(_ConvBN):
    r"""Convolution, batch norm and ReLU: :math:`y = \max(0, \mathrm{bn}(w * x + b))`.

    Args:
        in_channels: As in :class:`torch.nn.Conv2d`, and so all up to ``bias``, which is False here.
        out_channels: See there.
        kernel_size: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: See there.
        eps: As in :class:`torch.nn.BatchNorm2d`, and so all that follow.
        momentum: See there; None averages all batches.
        affine: See there.
        track_running_stats: See there.
        device: Of all parameters and buffers.
        dtype: Of all parameters and buffers.

    The children are ``conv`` and ``bn``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, OH, OW)``, layout of ``x``."""
        return conv_bn(self.conv, self.bn, RELU, x)


class ConvBNAddReLU2d(_ConvBN):
    r"""Convolution, batch norm, residual and ReLU: :math:`y = \max(0, \mathrm{bn}(w * x + b) + r)`.

    The arguments are those of :class:`ConvBNReLU2d`; the children are ``conv`` and ``bn``.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """As :meth:`ConvBNReLU2d.forward`; ``residual`` has the shape and dtype of the result."""
        return conv_bn(self.conv, self.bn, RELU, x, residual)


class BNAddReLU2d(_NormBase, FusedForward):
    r"""Batch norm, an optional residual and ReLU: :math:`y = \max(0, \mathrm{bn}(x) [+ r])`.

    Parameters, buffers and ``state_dict`` keys are those of :class:`torch.nn.BatchNorm2d`. It is no
    subclass of it: converters that replace every ``BatchNorm2d`` by another normalisation, such as
    ``nn.SyncBatchNorm.convert_sync_batchnorm``, would drop the residual and the ReLU. They leave
    this module as it is.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None averages all batches.
        affine: Whether there are a weight and a bias, learned per channel.
        track_running_stats: Whether running statistics are kept; False uses the batch's own in
            inference too.
        device: Of all parameters and buffers.
        dtype: Of all parameters and buffers.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``relu(bn(x) [+ residual])``.

        Args:
            x: ``(N, C, H, W)``.
            residual: Shape, dtype and layout of ``x``; None for none.

        Returns:
            Shape, dtype and layout of ``x``.
        """
        if isinstance(x, Proxy):
            return self._traced(x, residual)
        return bn_add_relu(self, x, residual)

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
        return torch.relu(y if residual is None else y + residual)

    def fused_groups(self) -> list[Group]:
        """The one group that the module is."""
        return [Group("bn_add_relu")]


class Stem(FusedForward):
    r"""What a ResNet begins with: :math:`y = \mathrm{maxpool}(\max(0, \mathrm{bn}(w * x)))`.

    Args:
        in_channels: Of the image.
        out_channels: Of the result.
        kernel_size: Of the convolution.
        stride: Of the convolution.
        padding: Of the convolution.
        pool_kernel: Window of the max-pool.
        pool_stride: Its step.
        pool_padding: Its padding.
        norm_layer: Makes the batch norm from a number of channels.

    The children are ``conv``, ``bn``, ``relu`` and ``pool``.
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
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(pool_kernel, pool_stride, pool_padding)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, PH, PW)``."""
        return run_sequence(self.children(), x)

    def fused_groups(self) -> list[Group]:
        """See :meth:`fused_resnet.nn.fused_forward.FusedForward.fused_groups`."""
        return sequence_groups(dict(self.named_children()))


class FusedSequential(SequentialForward, nn.Sequential):
    """``nn.Sequential`` in which convolution, batch norm, ReLU and max-pool run as one."""
