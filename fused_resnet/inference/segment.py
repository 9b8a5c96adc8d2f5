"""Frozen residual blocks in a row: one question whether they are what they were, and one operator.

Calling a block costs ``Module.__call__``, the block's forward, that question, and the operator's
own call: together half of what a small block computes in. A row asks for all its blocks at once,
and calls one operator for all of them, whose arguments the extension holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._C import ResidualRow
from ..backends.availability import resolve_backend
from ..nn.fused_forward import BlockModules
from ..nn.module_kinds import is_hooked, is_observed
from ..ops.dispatch import has_single_backend
from .frozen_block import FrozenBlock, block_operands, is_block
from .frozen_module import Frozen
from .guard import Guard


class Inlined(NamedTuple):
    """A block that runs without being called, and what it reads (see :class:`BlockModules`)."""

    block: FrozenBlock
    reads: Callable[[nn.Module], bool] | None

    def holds(self) -> bool:
        """Whether a call of the block, which has no hook, would be its operator and no more."""
        block, reads = self
        return block.whole and block._compiled_call_impl is None and (not reads or reads(block))


class Row(NamedTuple):
    """What calling the children in turn came to when that was last looked at.

    Attributes:
        snapshot: Of the children, and of the modules on which the blocks depend.
        inlined: The blocks that are not called.
        steps: In order, the operator of blocks in a row, or another child.
    """

    snapshot: Guard
    inlined: list[Inlined]
    steps: list[ResidualRow | nn.Module]

    def holds(self) -> bool:
        """Whether it still comes to that."""
        return self.snapshot.holds() and all(map(Inlined.holds, self.inlined))


class FrozenSegment(Frozen):
    """Mixed into a frozen ``nn.Sequential`` of residual blocks, some other modules among them.

    It stands for the forward of ``nn.Sequential`` as long as nobody looks at a block's call.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the last child's result; the argument's name is that of PyTorch."""
        row = self._row() if _takes(input) else None
        if row is None:
            result: Tensor = super().forward(input)
            return result
        x = input
        for step in row.steps:
            x = step(x)
        return x

    def _row(self) -> Row | None:
        """Kept until something changes; None: call the children."""
        held: Row | None = self.__dict__.get("_frozen_cache")
        if held is not None and held.holds():
            return held
        row = _row_of(self)
        if row is not None:
            self.__dict__["_frozen_cache"] = row
        return row


def is_segment(module: nn.Module) -> bool:
    """Whether :class:`FrozenSegment` can be mixed into the module."""
    cls = type(module)
    if cls.forward is not nn.Sequential.forward or cls.__iter__ is not nn.Sequential.__iter__:  # type: ignore[attr-defined]
        return False
    return sum(map(is_block, module._modules.values())) > 1  # type: ignore[arg-type]


def _takes(x: Any) -> bool:
    """Whether rows run on that map; else the children are to be called.

    On CUDA a graph already leaves all Python out, and each block chooses its backend.
    """
    if not isinstance(x, Tensor) or x.device.type != "cpu" or is_observed(x):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they note which module calls what
        return False
    return resolve_backend("residual_block", x) == "cpu" and has_single_backend(
        "residual_block", "cpu"
    )


def _row_of(owner: FrozenSegment) -> Row | None:
    """The row as it is now; None while somebody looks at a block, which is seldom for long."""
    members: list[nn.Module] = []
    inlined: list[Inlined] = []
    steps: list[list[BlockModules] | nn.Module] = []
    for child in owner._modules.values():
        assert child is not None
        if not isinstance(child, FrozenBlock) or not _is_called_plainly(child):
            steps.append(child)
            continue
        if any(map(is_hooked, child.modules())):
            return None
        block = child.block_now()
        if block is None:
            steps.append(child)
            continue
        one = Inlined(child, block.reads)
        if not one.holds():
            return None
        inlined.append(one)
        members += (child, *block.members)
        if steps and isinstance(steps[-1], list):
            steps[-1].append(block)
        else:
            steps.append([block])
    held = [_operator_of(step) if isinstance(step, list) else step for step in steps]
    return Row(Guard(dict.fromkeys(members), owner), inlined, held)


def _operator_of(blocks: list[BlockModules]) -> ResidualRow:
    packed: list[Tensor] = []
    scale: list[Tensor] = []
    shift: list[Tensor] = []
    settings: list[tuple[Any, ...]] = []
    for block in blocks:
        own, convs = len(block.acts), len(block.convs)
        w, a, b, _, _, _, stride, dilation, groups, winograd = block_operands(block)
        packed += w
        scale += a
        shift += b
        settings.append((own, convs > own, block.padding[0], stride, dilation, groups, winograd))
    return ResidualRow(packed, scale, shift, *map(list, zip(*settings, strict=True)))


def _is_called_plainly(block: FrozenBlock) -> bool:
    """Whether its class leaves the forward, and what stands before it, as they are here and there.

    That of a model that was frozen by itself, and put here, converts its input.
    """
    cls = type(block)
    return cls.forward is FrozenBlock.forward and cls.__call__ is nn.Module.__call__
