"""Providers of inference on PyTorch, which a benchmark compares.

Those of other runtimes are in :mod:`.peers`. Each provider takes a network in eval mode and a batch
of images in the storage dtype, and returns a function to call under ``torch.inference_mode``. All
but ``eager`` run in channels_last, which is the faster format for each of them on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_resnet as fr

from .peers import RUNTIMES

Call = Callable[[], Tensor]


def eager(model: nn.Module, images: Tensor) -> Call:
    """PyTorch by default: contiguous, operator by operator.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    model, images = model.to(images.dtype), images.contiguous()
    return lambda: model(images)


def channels_last(model: nn.Module, images: Tensor) -> Call:
    """PyTorch in channels_last, the baseline of the ratios.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    model, images = _channels_last(model, images)
    return lambda: model(images)


def compile(model: nn.Module, images: Tensor) -> Call:
    """``torch.compile`` with freezing, which folds the batch norms and packs the weights.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model, images = _channels_last(model, images)
    compiled = torch.compile(model)
    return lambda: compiled(images)


def jit(model: nn.Module, images: Tensor) -> Call:
    """``torch.jit.trace``, ``freeze`` and ``optimize_for_inference``.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    model, images = _channels_last(model, images)
    with warnings.catch_warnings(), torch.no_grad():
        # Deprecated in favour of torch.compile, and still common in serving.
        warnings.simplefilter("ignore")
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, images)))
        for _ in range(2):  # the profiling executor specialises on the first calls
            traced(images)
    return lambda: traced(images)


def fused(model: nn.Module, images: Tensor) -> Call:
    """``fused_resnet.fuse``: live parameters, each group in one pass.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    return _call_of(*OURS["fused"](model, images))


def frozen(model: nn.Module, images: Tensor) -> Call:
    """``fused_resnet.freeze``: batch norms folded, weights packed for this machine.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    return _call_of(*OURS["frozen"](model, images))


def frozen_direct(model: nn.Module, images: Tensor) -> Call:
    """``fused_resnet.freeze(..., winograd=False)``: all convolutions direct.

    Args:
        model: Network in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, in the storage dtype.

    Returns:
        A function that runs the network on the images and returns its result.
    """
    return _call_of(*OURS["frozen_direct"](model, images))


PROVIDERS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compile,
    "jit": jit,
    "fused": fused,
    "frozen": frozen,
    "frozen_direct": frozen_direct,
}

#: This package's providers: the network and the images in its memory format.
OURS: dict[str, Callable[[nn.Module, Tensor], tuple[nn.Module, Tensor]]] = {
    "fused": lambda model, images: _fused_network(model, images),
    "frozen": lambda model, images: _frozen_network(model, images, winograd=True),
    "frozen_direct": lambda model, images: _frozen_network(model, images, winograd=False),
}


def _fused_network(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    model, images = _channels_last(model, images)
    return fr.fuse(model), images


def _frozen_network(
    model: nn.Module, images: Tensor, *, winograd: bool
) -> tuple[nn.Module, Tensor]:
    frozen = fr.freeze(model, dtype=images.dtype, winograd=winograd)
    return frozen, images.contiguous(memory_format=torch.channels_last)


def _call_of(network: nn.Module, images: Tensor) -> Call:
    return lambda: network(images)


def _channels_last(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    model = model.to(dtype=images.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, images.contiguous(memory_format=torch.channels_last)


#: Every provider's name, this package's last.
NAMES = (*(name for name in PROVIDERS if name not in OURS), *RUNTIMES, *OURS)

#: The providers that this package is compared with.
PEERS = tuple(name for name in NAMES if name not in OURS)
