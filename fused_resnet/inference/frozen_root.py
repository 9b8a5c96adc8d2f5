"""The outermost module of a frozen model: dtype, memory format and CUDA graphs of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .cuda_graphs import Graphs, is_one_tensor
from .frozen_module import Frozen


class FrozenRoot(Frozen):
    """Mixin for the outermost module: converts dtype and memory format of inputs and results."""

    frozen_dtype: torch.dtype
    cuda_graphs: Graphs

    @classmethod
    def fused_resnet_members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """A forward with the signature of the base's, which exporters read."""

        def forward(self: FrozenRoot, *args: Any, **kwargs: Any) -> Any:
            return FrozenRoot.forward(self, *args, **kwargs)

        forward.__doc__ = base.forward.__doc__
        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward between two conversions."""
        # Flattening a structure takes ten times as long as checking for a single tensor.
        leaves = args if is_one_tensor(args, kwargs) else tree_leaves((args, kwargs))
        input_dtype = self._input_dtype(leaves)
        with torch.no_grad():
            result = self.cuda_graphs.run(self, super().forward, args, kwargs, self._enter)
            if input_dtype is None or input_dtype is self.frozen_dtype:
                return result
            return tree_map(lambda leaf: leaf.to(input_dtype) if _is_map(leaf) else leaf, result)

    def _input_dtype(self, leaves: Iterable[Any]) -> torch.dtype | None:
        found = None
        for leaf in leaves:
            if not _is_map(leaf):
                continue
            if leaf.dtype not in (self.frozen_dtype, torch.float32):
                wanted = dict.fromkeys((str(self.frozen_dtype), "torch.float32"))
                raise TypeError(
                    f"{type(self).__name__}: input: expected dtype {' or '.join(wanted)}, "
                    f"got {leaf.dtype}"
                )
            found = found or leaf.dtype
        return found

    def _enter(self, leaf: Any) -> Any:
        if not _is_map(leaf):
            return leaf
        if leaf.dim() == 4:
            return leaf.to(self.frozen_dtype, memory_format=torch.channels_last)
        return leaf.to(self.frozen_dtype)


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
