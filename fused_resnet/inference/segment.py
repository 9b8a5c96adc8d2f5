"""Consecutive frozen residual blocks: one operator call.

Calling a block costs ``Module.__call__``, the block's forward and the dispatch of its operator:
together half of a small block's compute time. A segment calls a single operator, whose arguments
the extension keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._C import ResidualSegment
from ..backends.availability import resolve_backend
from ..nn.fused_forward import BlockModules
from ..nn.module_kinds import is_hooked, is_observed
from ..ops.dispatch import has_single_backend
from .frozen_block import FrozenBlock, block_operands, is_block
from .frozen_module import Frozen


class FrozenSegment(Frozen):
    """Mixin for a frozen ``nn.Sequential`` of residual blocks, with or without other modules.

    It replaces the forward of ``nn.Sequential`` unless a hook or a tracer observes a block's call.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the last child's result; PyTorch names the argument."""
        lowered = self.derived("steps", lambda: _lower(self)) if _is_supported(input) else None
        if lowered is None or not all(getattr(m, "whole", True) for m in self.children()):
            result: Tensor = super().forward(input)
            return result
        x = input
        for step in lowered:
            x = step(x)
        return x


def is_segment(module: nn.Module) -> bool:
    """Whether :class:`FrozenSegment` can be mixed into the module."""
    cls = type(module)
    if cls.forward is not nn.Sequential.forward or cls.__iter__ is not nn.Sequential.__iter__:  # type: ignore[attr-defined]
        return False
    return sum(map(is_block, module._modules.values())) > 1  # type: ignore[arg-type]


def _is_supported(x: Any) -> bool:
    """Whether segments run on this input; otherwise the children are called.

    On CUDA they need not: there a graph avoids all Python, and each block chooses its backend.
    """
    if not isinstance(x, Tensor) or x.device.type != "cpu" or is_observed(x):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # traces record each module's call
        return False
    return resolve_backend("residual_block", x) == "cpu" and has_single_backend(
        "residual_block", "cpu"
    )


def _lower(owner: FrozenSegment) -> list[ResidualSegment | nn.Module] | None:
    """The children as steps: the operator of consecutive blocks, or another child.

    None if a child has a hook from before the model was frozen.
    """
    steps: list[list[BlockModules] | nn.Module] = []
    for child in owner._modules.values():
        assert child is not None
        if not isinstance(child, FrozenBlock) or not _has_plain_call(child):
            steps.append(child)
            continue
        if any(map(is_hooked, child.modules())):
            return None
        block = child.supported_modules()
        if block is None:
            steps.append(child)
        elif steps and isinstance(steps[-1], list):
            steps[-1].append(block)
        else:
            steps.append([block])
    return [_operator_of(step) if isinstance(step, list) else step for step in steps]


def _operator_of(blocks: list[BlockModules]) -> ResidualSegment:
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
    return ResidualSegment(packed, scale, shift, *map(list, zip(*settings, strict=True)))


def _has_plain_call(block: FrozenBlock) -> bool:
    """Whether calling the block runs :meth:`FrozenBlock.forward` and no code of a subclass.

    A block that was frozen by itself and then put here also converts its input.
    """
    cls = type(block)
    return cls.forward is FrozenBlock.forward and cls.__call__ is nn.Module.__call__
