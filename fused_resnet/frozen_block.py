"""Frozen residual blocks on CUDA: a block is one operation, its convolutions' epilogues and all.

Two things are gained over one call for each convolution. Where a bottleneck has 64 or 128 middle
channels its last two convolutions are one kernel (``csrc/cuda/kernels/residual_block.cuh``); and
where a block has a shortcut, that one's convolution and the block's last are one sum over both
depths, so that the shortcut's result is never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .backends import select
from .blocks import BasicBlockRoute, BottleneckRoute, hooked, is_relu

if TYPE_CHECKING:
    from .freeze import FrozenConv


class FrozenBlock(nn.Module):
    """Mixed into a frozen basic block or bottleneck: a forward that is :func:`ops.residual_block`.

    It stands for the block's own forward on CUDA, as long as nobody looks in between.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, OH, OW)``, channels_last."""
        convs = self._convs() if select("residual_block", x) == "cuda" else None
        if convs is None:
            return super().forward(x)
        middle = convs[1] if isinstance(self, BottleneckRoute) else convs[0]
        joined, joined_shift = self._joined(convs)
        return ops.residual_block(
            x,
            [c.packed for c in convs],
            [c.scale for c in convs],
            [c.shift for c in convs],
            joined=joined,
            joined_shift=joined_shift,
            bottleneck=isinstance(self, BottleneckRoute),
            stride=middle.stride[0],
            dilation=middle.dilation[0],
            groups=middle.groups,
        )

    def _convs(self) -> list[FrozenConv] | None:
        """The block's convolutions and its shortcut's; None where the operation is another one."""
        m: Any = self
        count = 3 if isinstance(self, BottleneckRoute) else 2
        convs = [getattr(m, f"conv{i}") for i in range(1, count + 1)]
        if not is_relu(m.relu):
            return None
        members: list[Any] = list(convs)
        if m.downsample is not None:
            if hooked(m.downsample):
                return None
            members += list(m.downsample)
            convs.append(m.downsample[0])
        from .freeze import Folded, FrozenConv

        kinds = (FrozenConv,) * count + (FrozenConv, Folded)
        as_expected = len(members) in (count, count + 2) and all(
            not hooked(member) and isinstance(member, expected)
            for member, expected in zip(members, kinds[: len(members)], strict=True)
        )
        return convs if as_expected and _is_plain(self, convs) else None

    def _joined(self, convs: list[FrozenConv]) -> tuple[Tensor | None, Tensor | None]:
        """The last convolution and the shortcut's as one, made at the first call and kept."""
        m: Any = self
        if m.downsample is None:
            return None, None
        last, shortcut = convs[-2:]
        held = m.__dict__.get("_held")
        if held is None or held[0] is not last.packed or held[1] is not shortcut.packed:
            if torch.compiler.is_compiling():  # a trace should not keep what it computes
                return None, None
            held = (last.packed, shortcut.packed, *join(last, shortcut))
            m.__dict__["_held"] = held
        return held[2], held[3]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_held"}


def _is_plain(block: nn.Module, convs: list[FrozenConv]) -> bool:
    """Whether geometry and channels are those that the operation has for such a block."""
    own = convs[:3] if isinstance(block, BottleneckRoute) else convs[:2]
    spatial = own[1] if isinstance(block, BottleneckRoute) else own[0]
    stride, dilation = spatial.stride[0], spatial.dilation[0]
    plain: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    strided: dict[str, Any] = {"stride": (stride, stride), "dilation": (dilation, dilation)}
    if isinstance(block, BottleneckRoute):
        expected: list[tuple[int, dict[str, Any]]] = [(1, plain), (3, strided), (1, plain)]
    else:
        expected = [(3, {**plain, **strided}), (3, plain)]
        if dilation != 1:
            return False
    if len(convs) > len(own):
        expected.append((1, {**plain, "stride": (stride, stride)}))
    for conv, (size, settings) in zip(convs, expected, strict=True):
        padding = conv.dilation[0] if size == 3 else 0
        if conv.kernel_size != (size, size) or conv.padding != (padding, padding):
            return False
        if any(getattr(conv, name) != value for name, value in settings.items()):
            return False
    relus = [True] * len(own) + [False] * (len(convs) - len(own))
    return [conv.relu for conv in convs] == relus


@torch.no_grad()
def join(last: FrozenConv, shortcut: FrozenConv) -> tuple[Tensor, Tensor]:
    """Weights of two convolutions that are added, each times its scale, filter by filter.

    Scales are multiplied in float64, and the product rounded once to the weights' dtype.
    """
    parts = [
        (conv.packed.double().view(conv.out_channels, -1) * conv.scale.double().view(-1, 1))
        for conv in (last, shortcut)
    ]
    packed = torch.cat(parts, 1).to(last.packed.dtype).flatten()
    return packed, last.shift + shortcut.shift


def is_block(module: nn.Module) -> bool:
    """Whether :class:`FrozenBlock` can be mixed into the module."""
    return isinstance(module, (BasicBlockRoute, BottleneckRoute))
