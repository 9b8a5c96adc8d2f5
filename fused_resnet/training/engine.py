"""Devices, precision and processes, by PyTorch's own means.

Several processes are started by ``torchrun``; each finds its number in the environment. Their
gradients are averaged by DistributedDataParallel, over NCCL on GPUs and over gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import TrainingError
from .settings import Settings


class Engine:
    """Where and how the steps of a run are computed; made by :func:`started`.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: The device of this process.
        storage: Dtype of parameters and images; autocast computes in another one.
        memory_format: Memory format of parameters and images.
        scaler: Scales the loss of float16, whose small gradients would become zero.
    """

    def __init__(self, settings: Settings, device: torch.device, rank: int, world: int) -> None:
        self.rank, self.world, self.device = rank, world, device
        dtype = getattr(torch, settings.dtype)
        self.storage = torch.float64 if dtype == torch.float64 else torch.float32
        self._autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    def placed(self, model: nn.Module) -> nn.Module:
        """A network on this process's device, in the run's dtype and memory format.

        Args:
            model: The network.
        """
        return model.to(self.device, self.storage).to(memory_format=self.memory_format)

    def wrapped(self, model: nn.Module, compiled: bool) -> nn.Module:
        """What a training step calls: the network, compiled and with reduced gradients if asked.

        Args:
            model: A result of :meth:`placed`.
            compiled: Whether to use ``torch.compile``.
        """
        if self.world > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices)
        if compiled:
            model.compile()
        return model

    def summed(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes.

        Args:
            values: Tensor of any shape, of the same shape in every process; it is overwritten.
        """
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's running statistics.

        Args:
            model: The network.
        """
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def gathered(self, value: Any) -> list[Any]:
        """One value of each process, in their order.

        Args:
            value: Value of this process.
        """
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[Engine]:
    """Join the other processes, choose the device, and leave both as they were.

    Args:
        settings: Settings of the run.

    Raises:
        TrainingError: There is no such device, or the batch can't be divided among the processes.
    """
    world, rank = (int(os.environ.get(key, value)) for key, value in _NUMBERS)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device 'cuda': PyTorch finds no GPU")
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if settings.batch % world:
        raise TrainingError(
            f"batch {settings.batch}: can't be divided among {world} processes; it counts the "
            "images of all of them together"
        )
    joined = world > 1 and not dist.is_initialized()
    if cuda:
        torch.cuda.set_device(device)
    if joined:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        with _determinism(settings.deterministic):
            yield Engine(settings, device, rank, world)
    finally:
        if joined:
            dist.destroy_process_group()


_NUMBERS = (("WORLD_SIZE", 1), ("RANK", 0))


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms; this package's tuner then times nothing either."""
    # mypy does not see this module's one property.
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    if wanted:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling finds bugs, and costs a pass over memory for every new tensor.
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
