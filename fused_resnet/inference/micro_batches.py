"""A large batch in micro-batches, so that a network's feature maps stay in the cache.

At 224x224 a batch of 16 makes maps of 50 MB: each is written to memory and read back by the next
block, and the allocator returns a result that large to the system and maps it anew for every block.
In micro-batches of two images the maps stay in the last-level cache; weights are read once for each
micro-batch, which costs less. The micro-batches inside a block (``csrc/cpu/residual_block.cpp``)
cover only the maps between its convolutions: ResNet-50 at batch 16 on two cores takes 334 ms with
neither, 301 ms with those alone, 249 ms with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn.fused_forward import BasicBlockForward, BottleneckForward, FusedForward, SequentialForward
from ..nn.module_kinds import FoldedBatchNorm, PackedConv, is_hooked, original_class
from .frozen_module import Frozen

#: Bytes of the largest map of one micro-batch: a last-level cache of 32 MiB has room for the map
#: that is read, the one that is written, the one kept for the residual, and weights.
MAP_BYTES = 8 * 1024 * 1024

#: The largest map of a ResNet (stage 1 of a bottleneck network, or the stem's before its pool) has
#: 256 channels at a quarter of the image's height and width, or 64 at half: 16 elements for each
#: pixel of the image.
ELEMENTS_PER_PIXEL = 16


#: Layers that compute each image independently, whatever their settings. A batch norm may not: in
#: training, and without running statistics, it uses those of the batch.
_LAYERS = (nn.Conv2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)


def run_micro_batches(
    model: Frozen,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    members: Callable[[], Iterable[nn.Module]],
    image_pixels: int = 1,
) -> Tensor:
    """``forward(x)``, computed a few images at a time and concatenated.

    The whole batch runs at once where the modules can't be proved to compute each image
    independently, where a hook in ``model`` would see the micro-batches, and under a compiler,
    which would unroll them.

    Args:
        model: The network whose modules are searched for hooks.
        forward: Maps ``(N, C, H, W)`` to ``(N, ...)``.
        x: ``(N, C, H, W)``.
        members: Returns the modules that ``forward`` calls.
        image_pixels: Number of pixels of the network's input for each pixel of ``x``.

    Returns:
        The result of ``forward`` for the whole batch.
    """
    if (
        not isinstance(x, Tensor)
        or x.device.type != "cpu"
        or x.dim() != 4
        or torch.compiler.is_compiling()
    ):
        return forward(x)
    pixel_bytes = image_pixels * ELEMENTS_PER_PIXEL * x.element_size()
    images = MAP_BYTES // max(x.shape[2] * x.shape[3] * pixel_bytes, 1)
    images = max(images, torch.get_num_threads())
    if x.shape[0] <= images:
        return forward(x)
    if not model.derived("micro-batches", lambda: _can_split(model, members)):
        return forward(x)
    count = -(-x.shape[0] // images)  # micro-batches of nearly equal size: 4 of 4, not 5, 5, 5, 1
    return torch.cat([forward(batch) for batch in x.split(-(-x.shape[0] // count))])


def _can_split(model: nn.Module, members: Callable[[], Iterable[nn.Module]]) -> bool:
    """Whether micro-batches give the result of the whole batch and no hook sees them."""
    inner = (module for module in model.modules() if module is not model)
    return not any(map(is_hooked, inner)) and all(map(_is_per_image, members()))


def _is_per_image(module: nn.Module) -> bool:
    """Whether each image's result is known to depend on that image alone."""
    if isinstance(module, PackedConv) or original_class(module) in _LAYERS:
        return True
    forward = original_class(module).forward
    sequential = forward is nn.Sequential.forward or forward is SequentialForward.forward
    if sequential or isinstance(module, (FoldedBatchNorm, BasicBlockForward, BottleneckForward)):
        return all(map(_is_per_image, module.children()))
    block = module.block_modules() if isinstance(module, FusedForward) else None
    if block is None:
        return False
    called = [*block.convs, *block.norms, *(act for act in block.acts if act is not None)]
    return all(map(_is_per_image, called))
