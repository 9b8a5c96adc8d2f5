"""What every module of a frozen model refuses: training, gradients and conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.module_kinds import PackedConv


class Frozen(nn.Module):
    """Mixin for every module of a frozen model."""

    fused_resnet_prefix = "Frozen"

    def train(self, mode: bool = True) -> Frozen:
        """Accept ``train(False)``, which is ``eval()``; raise for ``train(True)``."""
        if mode:
            raise RuntimeError(_refusal("train()"))
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Accept ``requires_grad_(False)``; raise for ``requires_grad_(True)``."""
        if requires_grad:
            raise RuntimeError(_refusal("requires_grad_()"))
        return super().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        # The cache refers to modules and tensors, which would be stored twice.
        return {k: v for k, v in self.__dict__.items() if k != "_frozen_cache"}

    def _replicate_for_data_parallel(self) -> Frozen:
        # The cache refers to the weights of the module that is copied.
        replica: Frozen = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_frozen_cache", None)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        # Checked before the first tensor is converted, so that a refusal leaves the model intact.
        packed: Iterator[Any] = (
            module.packed for module in self.modules() if isinstance(module, PackedConv)
        )
        for dtype, device in {
            (t.dtype, t.device) for t in chain(self.parameters(), self.buffers(), packed)
        }:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if probe.dtype != dtype or probe.device != device:
                raise RuntimeError(_refusal(f"conversion to {probe.dtype} on {probe.device}"))
        return super()._apply(fn, recurse)


def _refusal(what: str) -> str:
    return f"{what}: this model is frozen for inference; use the model that freeze() was given"
