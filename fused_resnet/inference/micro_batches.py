"""A large batch in small parts, so that a network's feature maps stay in the cache.

A batch of 16 at 224x224 makes maps of 50 MB: each is written to memory and read back by the next
block, and a result that large is returned to the system and mapped anew for every block. In parts
of two images they stay in the last cache; weights are read once for each part, which costs less. A
block's own parts (``csrc/cpu/residual_block.cpp``) do this for the maps inside of it only:
ResNet-50 at batch 16 on two cores takes 334 ms with neither, 301 with the blocks' parts alone, 249
with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn.fused_forward import BasicBlockForward, BottleneckForward, FusedForward, SequentialForward
from ..nn.module_kinds import FoldedBatchNorm, PackedConv, is_hooked, original_class
from .guard import Guard

#: Bytes that the largest map of one part may have: of a last cache of 32 MiB, one map being read,
#: one being written, one kept for the residual, and some room.
MAP_BYTES = 8 * 1024 * 1024

#: The largest map of a ResNet (stage 1 of a bottleneck network, the stem's before its pool) has 256
#: channels at a quarter of the size, or 64 at half: 16 elements for each pixel of the image.
ELEMENTS_PER_PIXEL = 16


#: Layers that treat each image by itself, whatever their settings. A batch norm that was left may
#: not: its statistics are the batch's own in training, and without running ones.
_LAYERS = (nn.Conv2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)


def run_micro_batches(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    members: Callable[[], Iterable[nn.Module]],
    image_pixels: int = 1,
) -> Tensor:
    """``forward(x)``, computed for some images at a time and put together.

    In one go where the modules of the forward can't be proved to treat each image by itself, where
    a hook somewhere in ``model`` would see the parts, and under a compiler, which would unroll
    them.

    Args:
        model: The network, whose hooks are looked for.
        forward: Takes ``(N, C, H, W)``, returns ``(N, ...)``.
        x: ``(N, C, H, W)``.
        members: The modules that ``forward`` calls.
        image_pixels: Of the network's input, for each pixel of ``x``.
    """
    if x.device.type != "cpu" or x.dim() != 4 or torch.compiler.is_compiling():
        return forward(x)
    pixel_bytes = image_pixels * ELEMENTS_PER_PIXEL * x.element_size()
    images = MAP_BYTES // max(x.shape[2] * x.shape[3] * pixel_bytes, 1)
    images = max(images, torch.get_num_threads())
    if x.shape[0] <= images or not _divisible(model, members):
        return forward(x)
    count = -(-x.shape[0] // images)  # of parts that are as equal as can be: 4 of 4, not 5, 5, 5, 1
    return torch.cat([forward(part) for part in x.split(-(-x.shape[0] // count))])


def _divisible(model: nn.Module, members: Callable[[], Iterable[nn.Module]]) -> bool:
    """Whether parts give what the whole gives, and no hook sees them; kept until a change."""
    held = model.__dict__.get("_frozen_cache")
    if held is not None and held.holds():
        return True
    modules = list(model.modules())
    if any(map(is_hooked, modules)) or not all(map(_treats_images_apart, members())):
        return False
    model.__dict__["_frozen_cache"] = Guard(modules, model)
    return True


def _treats_images_apart(module: nn.Module) -> bool:
    """Whether each image's result is known to depend on that image alone."""
    if isinstance(module, PackedConv) or original_class(module) in _LAYERS:
        return True
    forward = original_class(module).forward
    chained = forward is nn.Sequential.forward or forward is SequentialForward.forward
    if chained or isinstance(module, (FoldedBatchNorm, BasicBlockForward, BottleneckForward)):
        return all(map(_treats_images_apart, module.children()))
    block = module.block_modules() if isinstance(module, FusedForward) else None
    if block is None:
        return False
    called = [*block.convs, *block.norms, *(act for act in block.acts if act is not None)]
    return all(map(_treats_images_apart, called))
