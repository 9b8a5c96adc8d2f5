"""Every convolution of a network in its three directions, beside PyTorch's own.

PyTorch's times are of ``aten::convolution`` and ``aten::convolution_backward``, of the convolution
alone. Those of the training primitives include what they fuse: statistics in the forward, batch
norm's gradient, the ReLU mask and its sums in the backward. Each layer is timed by itself, the two
in turns, with its operands as the layers around it leave them in memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..ops.flops import conv_flops

#: Turns of each of the two; the fastest counts.
TURNS = 5

DIRECTIONS = ("forward", "data gradient", "weight gradient")


@dataclass(frozen=True)
class Layer:
    """A convolution of a network on maps of one size.

    Attributes:
        x: Shape of its input, ``(N, C, H, W)``.
        weight: Shape of its filters, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of groups of channels.
        needs_input: Whether a data gradient is wanted: not by the first convolution.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    needs_input: bool

    def __str__(self) -> str:
        k, _, kh, kw = self.weight
        _, c, h, w = self.x
        parts = f"{c} to {k}, {kh}x{kw}, {h}x{w}"
        parts += f", stride {self.stride[0]}" if self.stride != (1, 1) else ""
        return parts + (f", {self.groups} groups" if self.groups > 1 else "")

    @property
    def geometry(self) -> tuple[Any, ...]:
        """The arguments of an operator after its tensors."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def flops(self) -> int:
        """Operations of one direction, by the direct sum."""
        return conv_flops(self.x, self.weight, self.stride, self.padding, self.dilation)


@torch.no_grad()
def layers_of(model: nn.Module, images: Tensor) -> Counter[Layer]:
    """How often each convolution occurs in a forward.

    Args:
        model: A plain network of ``nn.Conv2d``.
        images: Batch of images, ``(N, 3, H, W)``.
    """
    found: Counter[Layer] = Counter()

    def note(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        assert not isinstance(conv.padding, str)
        layer = Layer(
            x=tuple(inputs[0].shape),
            weight=tuple(conv.weight.shape),
            stride=(conv.stride[0], conv.stride[1]),
            padding=(conv.padding[0], conv.padding[1]),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            needs_input=inputs[0] is not images,
        )
        found[layer] += 1

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def measure(layer: Layer, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Milliseconds of each direction, by ``"pytorch"`` and ``"fused"``.

    Args:
        layer: The convolution.
        dtype: Dtype of the maps and the weight.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        t = torch.randn(*shape, generator=generator).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    x, weight = drawn(*layer.x), drawn(*layer.weight)
    own = torch.float64 if dtype is torch.float64 else torch.float32
    c, k = layer.x[1], layer.weight[0]
    affine = [torch.rand(c, generator=generator).to(own) for _ in range(3)]
    a, b, shift = (torch.rand(k, generator=generator).to(own) for _ in range(3))
    inputs = (x, *affine[:2]) if layer.needs_input else (x, None, None)
    ops = torch.ops.fused_resnet
    z = ops.conv_forward(*inputs, weight, *layer.geometry, True, True)[0]
    g = torch.randn_like(z)

    def ours(need_input: bool, need_weight: bool) -> Any:
        mean = affine[2] if layer.needs_input else None
        return ops.conv_backward(
            g, z, a, b, shift, *inputs, mean, weight, None, *layer.geometry, need_input,
            need_weight, layer.needs_input and need_input, True,
        )  # fmt: skip

    def theirs(mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0],
            layer.groups, mask,
        )  # fmt: skip

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (
            lambda: torch.conv2d(x, weight, None, *layer.geometry),
            lambda: ops.conv_forward(*inputs, weight, *layer.geometry, True, True),
        ),
        "weight gradient": (lambda: theirs([False, True, False]), lambda: ours(False, True)),
    }
    if layer.needs_input:
        calls["data gradient"] = (lambda: theirs([True, False, False]), lambda: ours(True, False))
    return {name: _in_turns(*calls[name]) for name in DIRECTIONS if name in calls}


@torch.no_grad()
def _in_turns(theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, float]:
    best = {"pytorch": float("inf"), "fused": float("inf")}
    for _ in range(TURNS):
        for name, call in (("pytorch", theirs), ("fused", ours)):
            start = time.perf_counter()
            call()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def peak(dtype: torch.dtype) -> float:
    """Multiply-adds that all threads together make in a second, in GFLOP/s, measured.

    Args:
        dtype: Dtype of the maps; half precision is held against the peak of its products.
    """
    return _C.peak_flops(dtype) / 1e9
