"""Residual blocks with SyncBatchNorm in two processes of gloo: one unit, statistics of both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import image, randomize
from operator_calls import OperatorCalls
from torch import nn

import fused_resnet as fr
from fused_resnet.nn.sync_batch_norm import converted

#: Images of each process; different, so that a mean of means would be wrong.
PARTS = (slice(0, 3), slice(3, 5))


def network(momentum: float | None) -> nn.Module:
    """A block with an identity shortcut, one with a projection, and a bottleneck."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = [
        fr.nn.BasicBlock(8, 8),
        fr.nn.BasicBlock(8, 16, 2, shortcut),
        fr.nn.Bottleneck(16, 4),
    ]
    model = randomize(nn.Sequential(*blocks)).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return model


def of_rank(rank: int, file: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = image(5, 8, 6, 5)
    for momentum in (0.1, None):
        check_against_the_combined_batch(rank, x, momentum)
    check_one_exchange_a_layer(x[PARTS[rank]])
    check_second_derivative(x[PARTS[rank]])
    dist.destroy_process_group()


def check_against_the_combined_batch(rank: int, x: torch.Tensor, momentum: float | None) -> None:
    whole, mine = network(momentum), PARTS[rank]
    part = converted(network(momentum), x.device)
    assert {path for path, why in fr.report(part).blocks if not why} == {"0", "1", "2"}
    all_images, images = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    with fr.use_backend("reference"):
        whole(all_images)
        expected = whole(all_images)
    part(images)
    with OperatorCalls() as ran:
        found = part(images)
    assert ran.counts("fused_resnet::")["conv_forward"] == 8
    torch.testing.assert_close(found, expected[mine], rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    (expected * weight).sum().backward()
    (found * weight[mine]).sum().backward()
    torch.testing.assert_close(images.grad, all_images.grad[mine], rtol=1e-9, atol=1e-9)
    for (name, own), of_all in zip(part.named_parameters(), whole.parameters(), strict=True):
        dist.all_reduce(own.grad)
        torch.testing.assert_close(own.grad, of_all.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(part.get_buffer(name), buffer, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(part.eval()(images), whole.eval()(all_images)[mine])


def check_one_exchange_a_layer(images: torch.Tensor) -> None:
    """Eight layers: as many exchanges forward, and backward."""
    part = converted(network(0.1), images.device)
    with OperatorCalls(lambda name: name.startswith("c10d::")) as ran:
        part(images.clone().requires_grad_()).sum().backward()
    counts = ran.counts()
    assert sum(counts.values()) == 16, counts


def check_second_derivative(images: torch.Tensor) -> None:
    y = converted(network(0.1), images.device)(images.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="create_graph: batch norm over several processes"):
        y.sum().backward(create_graph=True)


@pytest.mark.thorough
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(of_rank, (str(tmp_path / "rendezvous"),), nprocs=2)
