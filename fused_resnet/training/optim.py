"""The optimizer, the schedule of its learning rate, and the average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .settings import Settings

#: The factor of the learning rate at the first step of a warm-up.
_WARM_UP_START = 0.01


def optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    """The optimizer of the parameters that are trained.

    Args:
        settings: Settings of the run.
        model: The network.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, momentum=settings.momentum, **common)
    return torch.optim.SGD(
        parameters, momentum=settings.momentum, nesterov=settings.nesterov, **common
    )


def schedule(
    settings: Settings, optimizer: Optimizer, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The learning rate of each step; the scheduler is stepped after every one.

    Args:
        settings: Settings of the run.
        optimizer: A result of :func:`optimizer`.
        steps_per_epoch: Steps of an epoch.
    """
    total = settings.epochs * steps_per_epoch
    warm = min(round(settings.warmup * steps_per_epoch), total - 1)
    rest: lr_scheduler.LRScheduler
    if settings.schedule == "cosine":
        rest = lr_scheduler.CosineAnnealingLR(optimizer, total - warm)
    else:
        drops = settings.drops if settings.schedule == "steps" else ()
        rest = lr_scheduler.MultiStepLR(optimizer, [round(f * total) - warm for f in drops])
    if not warm:
        return rest
    first = lr_scheduler.LinearLR(optimizer, _WARM_UP_START, total_iters=warm)
    return lr_scheduler.SequentialLR(optimizer, [first, rest], [warm])


def average(settings: Settings, model: nn.Module) -> AveragedModel | None:
    """An exponential moving average of parameters and running statistics, if the run has one.

    Args:
        settings: Settings of the run.
        model: The network.
    """
    if not settings.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
