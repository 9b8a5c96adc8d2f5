"""One training step and one validation, and the sums that metrics are made from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.optional import library
from .data import Data, Unreadable
from .engine import Engine
from .errors import DivergedError, TrainingError
from .seeds import drawn_from, mixed
from .settings import Settings


class Inputs:
    """Makes a network's input from a batch: on the device, normalised, mixed up if asked.

    Args:
        settings: Settings of the run.
        data: Data of the run, which has the channels' mean and standard deviation.
        engine: Device, dtype and processes of the run.

    Attributes:
        seed: Seed of the run, from which mixup draws.
        scale: What an image is divided by, ``(1, 3, 1, 1)``: 255 times the standard deviation.
        shift: What is then subtracted, ``(1, 3, 1, 1)``: the mean over the standard deviation.
        mixup: Mixes up images and labels; None for none.
    """

    def __init__(self, settings: Settings, data: Data, engine: Engine) -> None:
        self.engine, self.seed = engine, settings.seed
        scale = [255 * std for std in data.std]
        shift = [mean / std for mean, std in zip(data.mean, data.std, strict=True)]
        make: dict[str, Any] = {"dtype": engine.storage, "device": engine.device}
        self.scale = torch.tensor(scale, **make).view(1, 3, 1, 1)
        self.shift = torch.tensor(shift, **make).view(1, 3, 1, 1)
        self.mixup = None
        if settings.mixup:
            v2 = library("torchvision.transforms.v2", "train")
            self.mixup = v2.MixUp(alpha=settings.mixup, num_classes=len(data.classes))

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` in the run's dtype and memory format, and labels ``(N,)``.

        Args:
            batch: Batch that :func:`fused_resnet.training.data.collate` made.

        Raises:
            TrainingError: An image of it can't be read.
        """
        if isinstance(batch, Unreadable):
            raise TrainingError(f"data: {batch.what}")
        images, labels = batch
        device = self.engine.device
        images = images.to(device, non_blocking=True).to(self.engine.storage)
        images = (images / self.scale - self.shift).contiguous(
            memory_format=self.engine.memory_format
        )
        return images, labels.to(device, non_blocking=True)

    def mixed_up(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Any:
        """Images and labels after mixup, whose labels are ``(N, classes)``; as given without.

        Args:
            images: Batch of images, ``(N, 3, H, W)``.
            labels: Class of each image, ``(N,)``.
            epoch: Number of the epoch.
            step: Number of the step in it.
        """
        if self.mixup is None:
            return images, labels
        with drawn_from(mixed(self.seed, epoch, step, 1)):
            return self.mixup(images, labels)


class Sums:
    """Loss, right answers and images, added up on the device; and the first step that diverged.

    Args:
        engine: Device, dtype and processes of the run.

    Attributes:
        values: Sums of this process: loss, right answers and images; ``(3,)``, float64.
        diverged: Number of the first step whose loss was not finite; -1 for none.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.values = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self.diverged = torch.full((), -1, dtype=torch.int64, device=engine.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int = 0) -> None:
        """Add a batch.

        Args:
            loss: The mean loss of its images.
            logits: The network's results, ``(N, classes)``.
            labels: Class of each image, ``(N,)``; after mixup its share of every
                class, ``(N, classes)``.
            step: Number of the step, for :meth:`check`.
        """
        count = len(logits)
        wanted = labels if labels.dim() == 1 else labels.argmax(1)
        right = (logits.argmax(1) == wanted).sum()
        # This process's part of each sum; `means` adds up the others'.
        self.values += torch.stack([loss.double() * count, right, loss.new_tensor(count)])
        bad = ~torch.isfinite(loss) & (self.diverged < 0)
        self.diverged = torch.where(bad, step, self.diverged)

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy over the images of all processes."""
        loss, right, count = self.engine.summed(self.values.clone()).tolist()
        return (loss / count, right / count) if count else (float("nan"), float("nan"))

    def check(self, kept: bool) -> None:
        """Stop if the loss of a step was not finite, in any process.

        Args:
            kept: Whether there is a checkpoint.

        Raises:
            DivergedError: It was; the message names the step.
        """
        step = max(self.engine.gathered(int(self.diverged)))
        if step >= 0:
            raise DivergedError(diverged("the loss of", step, kept))


def diverged(what: str, step: int, kept: bool) -> str:
    """The line of a run that stops because a number is not finite.

    Args:
        what: What is not finite, before the words "step" and its number.
        step: Number of the step.
        kept: Whether there is a checkpoint.
    """
    checkpoint = "the last checkpoint is of before, and is kept"
    return (
        f"{what} step {step} is not finite: {checkpoint if kept else 'there is no checkpoint yet'}"
        "; a lower --lr or a longer --warmup may help"
    )


def train_step(
    settings: Settings,
    engine: Engine,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward and the optimizer's step.

    Args:
        settings: Settings of the run.
        engine: Device, dtype and processes of the run.
        network: Network that the step calls, from :meth:`Engine.wrapped`.
        optimizer: Optimizer of the network's parameters.
        images: Batch of images, ``(N, 3, H, W)``.
        labels: Class of each image, ``(N,)``; after mixup its share of every
            class, ``(N, classes)``.

    Returns:
        The mean loss and the logits, both detached.
    """
    optimizer.zero_grad(set_to_none=True)
    with engine.autocast():
        logits = network(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    engine.scaler.scale(loss).backward()
    engine.scaler.step(optimizer)
    engine.scaler.update()
    return loss.detach(), logits.detach()


@torch.no_grad()
def validate(
    engine: Engine, network: nn.Module, inputs: Inputs, batches: Iterable[Any]
) -> tuple[float, float]:
    """Mean loss and accuracy of a network in eval mode; its mode is left to the caller.

    Args:
        engine: Device, dtype and processes of the run.
        network: The network.
        inputs: Makes its inputs.
        batches: This process's part of the batches of validation images.
    """
    engine.share_buffers(network)
    network.eval()
    sums = Sums(engine)
    for batch in batches:
        images, labels = inputs(batch)
        with engine.autocast():
            logits = network(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        sums.add(F.cross_entropy(logits, labels), logits, labels)
    return sums.means()
