"""A training step of a whole network: the problem, and the ways to run it that are compared.

A step is forward, cross entropy, backward, SGD with momentum and clearing the gradients, always on
the same batch. Every provider starts from the same parameters; before anything is timed, its logits
and all of its gradients are compared with those of a float64 step of the plain network.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr

from ..models.sources import our_model, plain_model
from .harness import Entry
from .networks import LIMITS, randomised, relative_error
from .subject import Subject

#: Relative L2 error of all gradients together beyond which a provider is not timed. ReLU's kinks
#: alone make PyTorch's float32 gradients differ from float64 by 1e-2 on small maps (measured on
#: ResNet-50 at 64x64), so this tells a wrong step from a rounded one, and no more.
GRADIENT_LIMITS = {"float32": 5e-2, "float64": 1e-9, "bfloat16": 5e-1, "float16": 5e-1}

#: Steps whose phases are timed apart, after all rounds.
PHASE_STEPS = 5

LEARNING_RATE = 1e-4


def channels_last(model: nn.Module) -> nn.Module:
    """PyTorch's own modules in channels_last: the baseline of the ratios.

    Args:
        model: Network in training mode; it is changed.
    """
    return model.to(memory_format=torch.channels_last)


#: By name, what makes the module that is trained from a plain network in training mode.
PROVIDERS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "channels_last": channels_last,
    "compile": lambda model: torch.compile(channels_last(model)),
    "fused": lambda model: fr.fuse(channels_last(model)),
    "fused_recompute": lambda model: fr.fuse(channels_last(model), recompute=True),
    "fused_compile": lambda model: torch.compile(fr.fuse(channels_last(model))),
}
NAMES = tuple(PROVIDERS)
OURS = tuple(name for name in NAMES if name.startswith("fused"))
#: What this package is compared with.
PEERS = tuple(name for name in NAMES if name not in OURS)

#: What ``fused-resnet bench --training`` runs if nothing else is asked for.
DEFAULT = ("eager", "channels_last", "compile", "fused")


def train_only(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A network in training mode that is fine-tuned: the rest of it and all batch norms are frozen.

    Args:
        model: The network, which is changed.
        names: Names of its children that learn; none for all of it, with the batch norms of
            training.

    Raises:
        ValueError: It has no child of that name.
    """
    children = dict(model.named_children())
    for name in names:
        if name not in children:
            raise ValueError(f"unknown part {name!r}; expected of {', '.join(children)}")
    model.train()
    if not names:
        return model
    model.requires_grad_(False)
    for name in names:
        children[name].requires_grad_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def write_problem(
    folder: Path, name: str, batch: int, size: int, trainable: Sequence[str] = ()
) -> None:
    """Write parameters, a batch with labels, and the float64 logits and gradients.

    Args:
        folder: An existing, empty folder.
        name: Network, as :func:`fused_resnet.models.sources.parse` returns it.
        batch: Number of images.
        size: Height and width of the images.
        trainable: Names of the network's children that learn; the rest of the network and all batch
            norms are frozen. Empty trains the whole network.

    Raises:
        ValueError: The network has no child of a name in ``trainable``.
    """
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, size, size, generator=generator)
    others = torch.randn(8, 3, size, size, generator=generator)
    torch.manual_seed(0)
    model = randomised(plain_model(name), others)
    exact = train_only(copy.deepcopy(model).double(), trainable)
    logits = exact(images.double())
    labels = torch.randint(logits.shape[1], (batch,), generator=generator)
    F.cross_entropy(logits, labels).backward()
    truth = {"logits": logits.detach(), "gradients": gradients_of(exact)}
    torch.save(model.state_dict(), folder / "state.pt")
    step = {"images": images, "labels": labels, "truth": truth, "trainable": list(trainable)}
    torch.save(step, folder / "step.pt")


def gradients_of(model: nn.Module) -> Tensor:
    """All gradients as one vector; parameters without one are left out.

    Args:
        model: Network after a backward pass.
    """
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Step:
    """A training step that can be called again and again.

    Args:
        model: Network in training mode.
        images: Batch of images, ``(N, 3, H, W)``, float32 or float64.
        labels: Class of each image, ``(N,)``, int64.
        autocast: Dtype for :class:`torch.autocast`; None for none.

    Attributes:
        optimizer: Optimizer of the model's parameters.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None
    ) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def __call__(self) -> None:
        """Run one step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> Tensor:
        """The loss."""
        with self.precision():
            return F.cross_entropy(self.model(self.images), self.labels)

    def precision(self) -> AbstractContextManager[Any]:
        """The context that the forward runs in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.images.device.type, self.autocast)

    def error(self, truth: dict[str, Tensor], dtype: str) -> float:
        """Error of logits and gradients, each in units of its limit, as one number.

        Args:
            truth: ``logits`` and ``gradients`` of a float64 step.
            dtype: Names the limits.

        Returns:
            At most ``LIMITS[dtype]`` exactly when both errors are within their limits.
        """
        with self.precision():
            logits = self.model(self.images)
        F.cross_entropy(logits, self.labels).backward()
        logits_error = relative_error(logits.detach(), truth["logits"]) / (10 * LIMITS[dtype])
        gradients = gradients_of(self.model)
        gradients_error = relative_error(gradients, truth["gradients"]) / GRADIENT_LIMITS[dtype]
        self.optimizer.zero_grad()
        return max(logits_error, gradients_error) * LIMITS[dtype]

    def phases(self) -> dict[str, float]:
        """Median seconds of forward, backward and optimizer over a few steps."""
        times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        for _ in range(PHASE_STEPS):
            marks = [time.perf_counter()]
            loss = self.forward()
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            del loss
            self.optimizer.step()
            self.optimizer.zero_grad()
            marks.append(time.perf_counter())
            for name, start, end in zip(times, marks, marks[1:], strict=False):
                times[name].append(end - start)
        return {name: statistics.median(values) for name, values in times.items()}


def build(provider: str, model: str, dtype: str, folder: str) -> Subject:
    """The workers' target: one provider on the problem in ``folder``.

    Args:
        provider: Name of the provider, one of :data:`NAMES`.
        model: Network, as :func:`fused_resnet.models.sources.parse` returns it.
        dtype: ``float32`` or ``float64``; ``bfloat16`` and ``float16`` by autocast.
        folder: Folder that :func:`write_problem` filled.
    """
    state = torch.load(Path(folder) / "state.pt", weights_only=True)
    step = torch.load(Path(folder) / "step.pt", weights_only=True)
    # float64 trains in float64; half precision by autocast, with float32 parameters.
    storage = torch.float64 if dtype == "float64" else torch.float32
    autocast = getattr(torch, dtype) if dtype in ("bfloat16", "float16") else None
    make = our_model if provider in OURS else plain_model
    network = train_only(make(model, state).to(storage), step["trainable"])
    network = PROVIDERS[provider](network)
    images = step["images"].to(storage)
    if provider != "eager":
        images = images.contiguous(memory_format=torch.channels_last)
    call = Step(network, images, step["labels"], autocast)
    return Subject(
        call, lambda: call.error(step["truth"], dtype), training=True, details=call.phases
    )


def entries(providers: Sequence[str], model: str, dtype: str, folder: Path) -> list[Entry]:
    """One entry a provider, for :func:`fused_resnet.bench.harness.compare`.

    Args:
        providers: Names of the providers, each one of :data:`NAMES`.
        model: Network, as :func:`fused_resnet.models.sources.parse` returns it.
        dtype: ``float32`` or ``float64``; ``bfloat16`` and ``float16`` by autocast.
        folder: Folder that :func:`write_problem` filled.
    """
    return [
        Entry(
            name,
            f"{__name__}:build",
            {"provider": name, "model": model, "dtype": dtype, "folder": str(folder)},
            LIMITS[dtype],
        )
        for name in providers
    ]
