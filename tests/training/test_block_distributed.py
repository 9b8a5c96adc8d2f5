"""DistributedDataParallel over residual blocks, in two processes of gloo."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import assert_same, image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from training_blocks import X, basic, bottleneck, state

import fused_resnet as fr
from fused_resnet.ops import training_unit


def network(memory_format: torch.memory_format) -> nn.Module:
    blocks = nn.Sequential(basic(), bottleneck(2))
    return blocks.train().to(memory_format=memory_format)


def of_rank(rank: int, file: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    units = []
    original = training_unit._TrainingUnit.apply
    training_unit._TrainingUnit.apply = lambda *a: units.append(a[0]) or original(*a)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        eager = DistributedDataParallel(network(memory_format))
        fused = DistributedDataParallel(fr.fuse(copy.deepcopy(network(memory_format))))
        x = image(*X, seed=rank).contiguous(memory_format=memory_format)
        for _ in range(2):
            for model in (eager, fused):
                model.zero_grad()
                with warnings.catch_warnings():
                    # "Grad strides do not match bucket view strides": a copy for each gradient.
                    warnings.simplefilter("error")
                    model(x).square().sum().backward()
            assert_same(state(fused), state(eager))
        for name, p in fused.named_parameters():
            assert p.grad.stride() == p.stride(), name
    assert len(units) == 2 * 2 * 2
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(of_rank, (str(tmp_path / "rendezvous"),), nprocs=2)
