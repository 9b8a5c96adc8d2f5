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
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.availability import resolve_backend
from ..nn.fused_forward import NO_PADDING, BlockModules, FusedForward
from ..nn.module_kinds import FoldedBatchNorm, inner_activation, is_hooked, is_observed, is_relu
from ..ops import packed as packed_ops
from . import export
from .frozen_conv import FrozenConv
from .frozen_module import Frozen
from .guard import Guard

#: What the operator ``residual_block`` takes behind the map, in its order: made once, and the calls
#: build nothing.
Plan = tuple[Any, ...]


class FrozenBlock(Frozen):
    """Mixed into a frozen basic block or bottleneck: a forward that is :func:`ops.residual_block`.

    It stands for the block's own forward as long as nobody looks in between.

    Attributes:
        whole: Whether it does so; :func:`separate_convolutions` sets it.
    """

    whole = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``(N, C, H, W)`` to ``(N, K, OH, OW)``, channels_last."""
        # Any other call may mean something else to the block's own forward.
        if self.whole and len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, Tensor) and not is_observed(x):
                backend = resolve_backend("residual_block", x)
                plan = self._plan(backend)
                if plan is not None:
                    made_of = export if export.is_exporting() else packed_ops
                    return made_of.run_residual_block(backend, x, plan)
        return super().forward(*args, **kwargs)

    def _plan(self, backend: str) -> Plan | None:
        """For a call on that backend, kept until something changes; None: run the modules."""
        if backend not in ("cpu", "cuda", "triton"):
            return None
        if torch.compiler.is_compiling():  # a trace should not keep what it computes
            block = self._alone()
            return None if block is None else block_operands(block)
        held = self.__dict__.get("_frozen_cache")
        if held is not None:
            snapshot, plan, reads = held
            if snapshot.holds() and (reads is None or reads(self)):
                return plan
        block = self._alone()
        if block is None:
            return None
        convs: Any = block.convs
        has_shortcut = len(convs) > len(block.acts)
        both = join(*convs[-2:]) if backend != "cpu" and has_shortcut else (None, None)
        plan = block_operands(block, *both)
        self.__dict__["_frozen_cache"] = (
            Guard(dict.fromkeys(block.members), self),
            plan,
            block.reads,
        )
        return plan

    def _alone(self) -> BlockModules | None:
        """:meth:`block_now`, but None where only an operation on rows has such a shortcut."""
        block = self.block_now()
        return None if block is None or block.padding != NO_PADDING else block

    def block_now(self) -> BlockModules | None:
        """The block by its modules; None where the operation is another one."""
        m: Any = self
        block = m.block_modules()
        if block is None or any(map(is_hooked, block.members)):
            return None
        for conv, norm in zip(block.convs, block.norms, strict=True):
            if not isinstance(conv, FrozenConv) or not isinstance(norm, FoldedBatchNorm):
                return None
        own = len(block.acts)
        inner = [inner_activation(norm) for norm in block.norms]
        # One activation behind each: the normalisation's or the block's, and behind the addition.
        if any(inner[own - 1 :]) or any(map(_are_both, inner, block.acts)):
            return None
        if not all(is_relu(act or inner[i]) for i, act in enumerate(block.acts)):
            return None
        return block if _is_plain(block.convs, own, block.padding) else None


def _are_both(inner: nn.Module | None, act: nn.Module | None) -> bool:
    return inner is not None and act is not None


def block_operands(
    block: BlockModules, joined: Tensor | None = None, joined_shift: Tensor | None = None
) -> Plan:
    """The plan of a block that :meth:`FrozenBlock.block_now` gave.

    Args:
        block: See there.
        joined: See :func:`fused_resnet.ops.residual_block`.
        joined_shift: See there.
    """
    convs: Any = block.convs
    own = len(block.acts)
    middle = convs[own - 2]
    return (
        [c.operand for c in convs],
        [c.scale for c in convs],
        [c.shift for c in convs],
        joined,
        joined_shift,
        own == 3,
        middle.stride[0],
        middle.dilation[0],
        middle.groups,
        all(c.winograd for c in convs),
    )


def _is_plain(convs: list[Any], own: int, padding: tuple[int, int]) -> bool:
    """Whether geometry and channels are those that the operation has for such a block.

    Args:
        convs: :class:`~fused_resnet.freeze.FrozenConv`, the block's own and its shortcut's.
        own: How many are the block's own.
        padding: See :class:`~fused_resnet.nn.fused_forward.BlockModules`.
    """
    bottleneck = own == 3
    spatial = convs[own - 2]
    stride, dilation = spatial.stride[0], spatial.dilation[0]
    plain: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    strided: dict[str, Any] = {"stride": (stride, stride), "dilation": (dilation, dilation)}
    if bottleneck:
        expected: list[tuple[int, dict[str, Any]]] = [(1, plain), (3, strided), (1, plain)]
    else:
        expected = [(3, {**plain, **strided}), (3, plain)]
        if dilation != 1:
            return False
    if len(convs) > own:
        expected.append((1, {**plain, "stride": (stride, stride)}))
    for conv, (size, settings) in zip(convs, expected, strict=True):
        border = conv.dilation[0] if size == 3 else 0
        if conv.kernel_size != (size, size) or conv.padding != (border, border):
            return False
        if any(getattr(conv, name) != value for name, value in settings.items()):
            return False
    # An addition in PyTorch would stretch one channel, or one pixel, to many.
    result = (convs[own - 1].out_channels, stride)
    if len(convs) > own:
        return (convs[own].out_channels, stride) == result and padding == NO_PADDING
    channels, step = padding
    return (convs[0].in_channels + 2 * channels, step) == result


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
def separate_convolutions(model: nn.Module) -> Iterator[None]:
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
    return isinstance(module, FusedForward) and module.block_modules() is not None
