"""The ways to run a network's inference that a benchmark compares.

Each takes torchvision's network in eval and a batch of images in the storage dtype, and returns
what is called under ``torch.inference_mode``. All but ``eager`` are given channels_last, which is
the faster format for each of them on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_resnet as fr

Call = Callable[[], Tensor]


def eager(model: nn.Module, images: Tensor) -> Call:
    """PyTorch as it comes: contiguous, operator by operator."""
    model, images = model.to(images.dtype), images.contiguous()
    return lambda: model(images)


def channels_last(model: nn.Module, images: Tensor) -> Call:
    """The same in channels_last: the baseline of the ratios."""
    model, images = _channels_last(model, images)
    return lambda: model(images)


def compile(model: nn.Module, images: Tensor) -> Call:
    """``torch.compile`` with freezing, which folds the batch norms and packs the weights."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model, images = _channels_last(model, images)
    compiled = torch.compile(model)
    return lambda: compiled(images)


def jit(model: nn.Module, images: Tensor) -> Call:
    """``torch.jit.trace``, ``freeze`` and ``optimize_for_inference``."""
    model, images = _channels_last(model, images)
    with warnings.catch_warnings(), torch.no_grad():
        # Deprecated in favour of torch.compile, and still what many serve with.
        warnings.simplefilter("ignore")
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, images)))
        for _ in range(2):  # its profiling executor specialises on the first calls
            traced(images)
    return lambda: traced(images)


def fused(model: nn.Module, images: Tensor) -> Call:
    """``fused_resnet.fuse``: the live parameters, blocks in one pass each."""
    model, images = _channels_last(model, images)
    swapped = fr.fuse(model)
    return lambda: swapped(images)


def frozen(model: nn.Module, images: Tensor) -> Call:
    """``fused_resnet.freeze``: batch norms folded, weights packed for this machine."""
    images = images.contiguous(memory_format=torch.channels_last)
    packed = fr.freeze(model, dtype=images.dtype)
    return lambda: packed(images)


PROVIDERS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compile,
    "jit": jit,
    "fused": fused,
    "frozen": frozen,
}


def _channels_last(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    model = model.to(dtype=images.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, images.contiguous(memory_format=torch.channels_last)
