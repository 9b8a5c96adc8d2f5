"""Batch norm over the batches of several processes, between two training primitives.

A process's statistics are a count, a mean and a variance per channel. Merged in the order of ranks,

    n = sum(n_i),  mean = sum(n_i mean_i) / n,  var = sum(n_i (var_i + (mean_i - mean)^2)) / n,

they have the same bits in every process. Backward needs the sums of all processes for the gradient
of the input; those of weight and bias stay each process's own, as PyTorch's SyncBatchNorm has them,
since DistributedDataParallel averages them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def merge_statistics(
    group: str, mean: Tensor, var: Tensor, count: int
) -> tuple[Tensor, Tensor, int]:
    """The statistics of all processes' batches together.

    Args:
        group: Name of the process group.
        mean: Mean of this process's batch, ``(K,)``.
        var: Biased variance of this process's batch, ``(K,)``.
        count: Values per channel in this process's batch.

    Returns:
        Mean and biased variance in the dtype of ``mean``, and the number of values per channel.
    """
    own = torch.cat([mean.double(), var.double(), mean.new_tensor([count], dtype=torch.float64)])
    members = _resolve(group)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(members))]
    dist.all_gather(gathered, own, group=members)
    each = torch.stack(gathered)
    channels = mean.numel()
    means, variances = each[:, :channels], each[:, channels:-1]
    share = each[:, -1:] / each[:, -1].sum()
    merged = (share * means).sum(0)
    spread = (share * (variances + (means - merged).square())).sum(0)
    return merged.to(mean.dtype), spread.to(var.dtype), int(each[:, -1].sum())


def sum_over_processes(group: str, *sums: Tensor) -> tuple[Tensor, ...]:
    """The sums of all processes, by one exchange.

    Args:
        group: Name of the process group.
        sums: Vectors of one dtype and length, of this process.

    Returns:
        As many vectors.
    """
    total = torch.stack(sums)
    dist.all_reduce(total, group=_resolve(group))
    return total.unbind()


def _resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
