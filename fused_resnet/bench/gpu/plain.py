"""The unfused network: its parameters, its compiled form, its training step.

Needs no built extension where torchvision is installed: it is also compiled while the extension is
being built, so that the compiler's cache has it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import calibrate, randomise
from .cases import Target, UnavailableError
from .operands import DTYPES

#: The network of a window, its images, and the classes of their labels.
NAME, SIZE, CLASSES = "resnet50", 224, 1000
TINY_NAME, TINY_SIZE, TINY_CLASSES = "a residual block", 6, 8

#: Batch of a training step, and of inference besides 1.
BATCH, TINY_BATCH = 256, 2


class _TinyNetwork(nn.Module):
    """A residual block with a convolution before it and a classifier after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, TINY_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def name_of(target: Target) -> str:
    """The network's name in rows.

    Args:
        target: Device and sizes to run on.
    """
    return TINY_NAME if target.tiny else NAME


def batch_of(target: Target) -> int:
    """Images of a large batch.

    Args:
        target: Device and sizes to run on.
    """
    return TINY_BATCH if target.tiny else BATCH


class UnfusedBatchNorm(nn.BatchNorm2d):
    """A batch norm that is not fused, because its class is not ``nn.BatchNorm2d``."""


def _bare(tiny: bool) -> nn.Module:
    if tiny:
        return _TinyNetwork()
    try:
        import torchvision
    except ImportError:
        pass
    else:
        model: nn.Module = getattr(torchvision.models, NAME)()
        return model
    try:
        from ...models import resnet
    except ImportError:
        raise UnavailableError("torchvision is not installed") from None
    return resnet.resnet50(norm_layer=UnfusedBatchNorm)


@functools.cache
def parameters(tiny: bool) -> dict[str, Tensor]:
    """Seeded parameters on the CPU, with batch norms calibrated on similar images.

    Args:
        tiny: Whether it is a rehearsal.
    """
    torch.manual_seed(0)
    model = _bare(tiny)
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    size = TINY_SIZE if tiny else SIZE
    calibrate(model, torch.randn(4, 3, size, size, generator=generator))
    return model.state_dict()


def unfused(tiny: bool) -> nn.Module:
    """The network of plain modules, float32, on the CPU, in eval mode.

    Args:
        tiny: Whether it is a rehearsal.
    """
    model = _bare(tiny)
    model.load_state_dict(parameters(tiny))
    return model.eval()


def channels_last(model: nn.Module, target: Target, dtype: torch.dtype | None = None) -> nn.Module:
    """The network on the target.

    Args:
        model: The network.
        target: Device that the network is moved to.
        dtype: Dtype of the parameters; None keeps theirs.
    """
    layout: Any = torch.channels_last
    return model.to(target.device, dtype).to(memory_format=layout)


def images(target: Target, batch: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers as images, channels_last.

    Args:
        target: Device and sizes to run on.
        batch: Number of images.
        dtype: Dtype of the result.
        seed: Seed of the random numbers.
    """
    size = TINY_SIZE if target.tiny else SIZE
    generator = torch.Generator(target.device).manual_seed(seed)
    found = torch.randn((batch, 3, size, size), generator=generator, device=target.device)
    return found.to(dtype).contiguous(memory_format=torch.channels_last)


def compiled(model: nn.Module, target: Target, mode: str | None = None) -> Any:
    """``torch.compile`` of a network; a rehearsal only traces.

    Args:
        model: The network.
        target: Device and sizes to run on.
        mode: Mode of ``torch.compile``; None for its default.
    """
    torch._dynamo.reset()
    if target.tiny:
        return torch.compile(model, backend="eager")
    return torch.compile(model, mode=mode)


class TrainingStep:
    """Forward under autocast, loss, backward and SGD.

    Args:
        network: Trainable, float32, channels_last, on the target; or its compiled form.
        target: Device and sizes to run on.
        precision: Precision of autocast, a key of :data:`.operands.DTYPES`.

    Attributes:
        dtype: Dtype of autocast.
        images: Batch of images, ``(N, 3, H, W)``, float32.
        labels: Class of each image, ``(N,)``, int64.
        optimizer: Optimizer of the network's parameters.
        loss: Loss of the last step; None before the first.
    """

    def __init__(self, network: Any, target: Target, precision: str) -> None:
        batch = batch_of(target)
        self.network, self.target, self.dtype = network, target, DTYPES[precision]
        self.images = images(target, batch, torch.float32)
        generator = torch.Generator(target.device).manual_seed(1)
        classes = TINY_CLASSES if target.tiny else CLASSES
        self.labels = torch.randint(0, classes, (batch,), generator=generator, device=target.device)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        """One step; its loss is kept."""
        with torch.autocast(self.target.device.type, self.dtype):
            loss = F.cross_entropy(self.network(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()


def training_step(target: Target, precision: str, mode: str | None = "") -> TrainingStep:
    """A step of the unfused network.

    Args:
        target: Device and sizes to run on.
        precision: Precision of autocast, a key of :data:`.operands.DTYPES`.
        mode: Mode of ``torch.compile``; the empty string leaves it uncompiled.
    """
    model = channels_last(unfused(target.tiny), target).train()
    network = model if mode == "" else compiled(model, target, mode)
    return TrainingStep(network, target, precision)
