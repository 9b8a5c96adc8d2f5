"""Frozen residual blocks: a block is one operation, its convolutions' epilogues and all.

On the CPU a large batch goes through the block in parts that stay in the cache, and the maps
between its convolutions lie in memory that the next block uses again. On CUDA two things are gained
over one call for each convolution: where a bottleneck has 64 or 128 middle channels its last two
convolutions are one kernel (``csrc/cuda/kernels/residual_block.cuh``); and where a block has a
shortcut, that one's convolution and the block's last are one sum over both depths, so that the
shortcut's result is never written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import exported, ops
from .backends import select
from .blocks import BasicBlockRoute, BottleneckRoute, apart, hooked, is_relu
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .freeze import FrozenConv


class Plan(NamedTuple):
    """What one call of :func:`ops.residual_block` needs besides the map."""

    tensors: tuple[list[Tensor], list[Tensor], list[Tensor]]
    settings: dict[str, Any]


class FrozenBlock(nn.Module):
    """Mixed into a frozen basic block or bottleneck: a forward that is :func:`ops.residual_block`.

    It stands for the block's own forward as long as nobody looks in between.

    Attributes:
        whole: Whether it does so; :func:`one_by_one` sets it.
    """

    whole = True

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, OH, OW)``, channels_last."""
        whole = self.whole and not apart(x)
        plan = self._plan(select("residual_block", x)) if whole else None
        if plan is None:
            return super().forward(x)
        made_of = exported if torch.compiler.is_exporting() else ops
        return made_of.residual_block(x, *plan.tensors, **plan.settings)

    def _plan(self, backend: str) -> Plan | None:
        """For a call on that backend, kept until something changes; None: run the modules."""
        if backend not in ("cpu", "cuda"):
            return None
        if torch.compiler.is_compiling():  # a trace should not keep what it computes
            convs = self._convs()
            return None if convs is None else self._make_plan(convs, None, None)
        held = self.__dict__.get("_held")
        if held is not None and held[0].holds():
            return held[1]
        convs = self._convs()
        if convs is None:
            return None
        m: Any = self
        shortcut = [] if m.downsample is None else [m.downsample, *m.downsample]
        both = join(*convs[-2:]) if backend == "cuda" and shortcut else (None, None)
        plan = self._make_plan(convs, *both)
        snapshot = Snapshot(dict.fromkeys([m.relu, *convs, *shortcut]), m)
        self.__dict__["_held"] = (snapshot, plan)
        return plan

    def _make_plan(
        self, convs: list[FrozenConv], joined: Tensor | None, joined_shift: Tensor | None
    ) -> Plan:
        own = 3 if isinstance(self, BottleneckRoute) else 2
        middle = convs[1] if own == 3 else convs[0]
        return Plan(
            ([c.operand for c in convs], [c.scale for c in convs], [c.shift for c in convs]),
            {
                "joined": joined,
                "joined_shift": joined_shift,
                "bottleneck": own == 3,
                "stride": middle.stride[0],
                "dilation": middle.dilation[0],
                "groups": middle.groups,
                "winograd": all(c.winograd for c in convs),
            },
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
            if not isinstance(m.downsample, nn.Sequential) or hooked(m.downsample):
                return None
            members += list(m.downsample)
            convs += members[count : count + 1]
        from .freeze import Folded, FrozenConv

        kinds = (FrozenConv,) * count + (FrozenConv, Folded)
        as_expected = len(members) in (count, count + 2) and all(
            not hooked(member) and isinstance(member, expected)
            for member, expected in zip(members, kinds[: len(members)], strict=True)
        )
        return convs if as_expected and _is_plain(self, convs) else None


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


@contextlib.contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Run the convolutions of a frozen model's blocks each by itself, so that they can be timed."""
    blocks = [module for module in model.modules() if isinstance(module, FrozenBlock)]
    try:
        for block in blocks:
            block.whole = False
        yield
    finally:
        for block in blocks:
            del block.whole


def is_block(module: nn.Module) -> bool:
    """Whether :class:`FrozenBlock` can be mixed into the module."""
    return isinstance(module, (BasicBlockRoute, BottleneckRoute))
