"""SyncBatchNorm and DistributedDataParallel with two processes of gloo."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr


class Block(nn.Module):
    """A residual block of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(Block(), Block())).double().train()


def plain(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("module.", ""): v for k, v in found.items()}


def worker(rank: int, file: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = image(2, 4, 9, 7, seed=rank)
    eager = DistributedDataParallel(network())
    around = DistributedDataParallel(fr.fuse(network()))
    # Fusing shares the parameters, and with them the hooks that reduce their gradients.
    wrapped = DistributedDataParallel(network())
    inside = fr.fuse(wrapped)
    assert isinstance(inside, DistributedDataParallel)
    for _ in range(2):
        expected = plain(results(eager, x))
        assert_same(plain(results(around, x)), expected)
        assert_same(plain(results(inside, x)), expected)
    assert len(fr.report(inside).fused) == 4

    # The batches of both processes as one, which is what SyncBatchNorm normalises by.
    whole = network()
    together = whole(torch.cat([image(2, 4, 9, 7, seed=0), image(2, 4, 9, 7, seed=1)]))
    step = fr.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    found = fr.report(step)
    assert found.fused == []
    assert {why for _, why in found.left} == {"SyncBatchNorm is not a plain BatchNorm2d"}
    part = StandIn.apply_to(step)(x)
    torch.testing.assert_close(part, together[2 * rank : 2 * rank + 2])
    torch.testing.assert_close(step[0].bn1.running_var, whole[0].bn1.running_var)
    dist.destroy_process_group()


class StandIn(nn.SyncBatchNorm):
    """PyTorch synchronises on accelerators only; this does the same over gloo."""

    def forward(self, input: Tensor) -> Tensor:
        count = input.numel() // input.shape[1]
        sums = torch.stack([input.sum((0, 2, 3)), input.square().sum((0, 2, 3))]).detach()
        dist.all_reduce(sums)
        mean, square = sums / (2 * count)
        var = square - mean.square()
        total = 2 * count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
        shape = (1, -1, 1, 1)
        normal = (input - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return normal * self.weight.view(shape) + self.bias.view(shape)

    @classmethod
    def apply_to(cls, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = cls
        return copy.copy(model)


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=2)
