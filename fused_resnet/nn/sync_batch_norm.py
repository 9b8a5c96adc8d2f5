"""Batch norm over the images of all processes, on CPUs too.

PyTorch's SyncBatchNorm normalises on accelerators only. On a CPU this one computes the same by
differentiable sums over the processes:

    mean = sum(x) / n,  var = sum((x - mean)^2) / n,  y = (x - mean) / sqrt(var + eps) * w + b

with n the values of a channel in all processes. The deviations are summed in a second pass, so
nothing cancels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .module_kinds import is_hooked, original_class, uses_batch_statistics


class _SumOverProcesses(torch.autograd.Function):
    """The sum of each process's tensor; so is its gradient, since every process has the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _summed(value: Tensor, group: Any) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(value, group)
    return total


class CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm for CPU tensors; in eval mode it is a plain batch norm.

    No subclass of ``nn.SyncBatchNorm``, which DistributedDataParallel refuses on CPUs.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise.

        Args:
            input: This process's part of the batch, ``(N, C, H, W)``.

        Returns:
            The same shape.
        """
        if not self.training or not dist.is_initialized():
            return nn.functional.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum or 0.0,
                self.eps,
            )
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        count = torch.tensor(float(input.numel() // input.shape[1]), dtype=torch.float64)
        group = _process_group(self)
        dist.all_reduce(count, group=group)
        n = float(count)
        wide = input if input.dtype == torch.float64 else input.float()
        mean = _summed(wide.sum(dims), group) / n
        centred = wide - mean.view(shape)
        var = _summed(centred.square().sum(dims), group) / n
        self._update(mean.detach(), var.detach(), n)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, n: float) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (n / (n - 1)), momentum)


def group_of(norm: nn.Module) -> str:
    """The processes over whose batches the next call of a normalisation takes its statistics.

    Args:
        norm: Any normalisation.

    Returns:
        Name of the process group; empty where the call is not a SyncBatchNorm's, or one process's
        batch is all that it looks at.

    Source:
        ``torch.nn.SyncBatchNorm.forward``.
    """
    if original_class(norm) not in (nn.SyncBatchNorm, CpuSyncBatchNorm) or is_hooked(norm):
        return ""
    if not (norm.training and uses_batch_statistics(norm)):
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = _process_group(norm)
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


def _process_group(norm: nn.Module) -> Any:
    return getattr(norm, "process_group", None) or dist.group.WORLD


def converted(model: nn.Module, device: torch.device) -> nn.Module:
    """A network whose batch norms normalise over all processes.

    Args:
        model: The network; its batch norms are replaced and keep their parameters.
        device: Device that the network will run on.
    """
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]
    return model
