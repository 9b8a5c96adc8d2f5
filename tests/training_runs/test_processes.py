"""Two processes of gloo, started by torchrun, train as one process does on the combined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_data
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fused_resnet import training
from fused_resnet.nn.sync_batch_norm import converted
from fused_resnet.training import checkpoint

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")


def of_rank(rank: int, file: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)  # every process has the whole batch to compare with
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    for momentum in (0.1, None):
        whole = nn.BatchNorm2d(5, momentum=momentum).double()
        with torch.no_grad():
            whole.weight.uniform_(0.5, 2)
            whole.bias.normal_()
        part = converted(nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)).double(), x.device)[0]
        part.load_state_dict(whole.state_dict())
        mine = slice(0, 4) if rank == 0 else slice(4, 6)  # parts of different sizes
        share = x[mine].detach().requires_grad_()
        for _ in range(2):
            expected, found = whole(x), part(share)
        torch.testing.assert_close(found, expected[mine])
        grads = torch.autograd.grad(expected, [x, whole.weight, whole.bias], dy)
        own = torch.autograd.grad(found, [share, part.weight, part.bias], dy[mine])
        torch.testing.assert_close(own[0], grads[0][mine])
        for mine_only, of_all in zip(own[1:], grads[1:], strict=True):
            dist.all_reduce(mine_only)
            torch.testing.assert_close(mine_only, of_all)
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(part.get_buffer(name), buffer, msg=name)
        torch.testing.assert_close(part.eval()(share), whole.eval()(x)[mine])
    dist.destroy_process_group()


@pytest.mark.thorough
def test_batch_norm_of_all_processes(tmp_path: Path) -> None:
    """Output, gradients and running statistics are those of the combined batch."""
    mp.spawn(of_rank, (str(tmp_path / "rendezvous"),), nprocs=2)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*launcher, *port, "-m", "fused_resnet", "train", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """In float64 the losses agree to 1e-9, and the weights with rounding."""
    archive = tiny_data.archive(tmp_path / "tiny.npz")
    settings = tiny_data.settings(archive, tmp_path / "one", dtype="float64", lr=0.01, ema=0.9)
    one = training.train(settings)
    options = f"--data {archive} --epochs 2 --batch 8 --dtype float64 --lr 0.01 --ema 0.9".split()
    options += ["--device", "cpu", "--sync-bn"]
    done = torchrun(settings.model, *options, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation accuracy") == 1
    found = checkpoint.read(tmp_path / "two" / "last")
    assert len(found["generators"]) == 2
    for mine, theirs in zip(found["history"], one.history, strict=True):
        for key in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9), key
    expected = checkpoint.read(tmp_path / "one" / "last")["model"]
    for key, value in found["model"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-9, msg=key)

    line = torchrun(settings.model, *options, "--batch", "9", "--out", str(tmp_path / "odd"))
    assert line.returncode != 0
    assert "batch 9: can't be divided among 2 processes" in line.stderr
