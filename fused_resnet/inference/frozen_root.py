"""The outermost module of a frozen model: dtype, memory format and CUDA graphs of its calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .cuda_graphs import Graphs, is_one_tensor
from .frozen_module import Frozen


class FrozenRoot(Frozen):
    """Mixin for the outermost module: converts dtype and memory format of inputs and results.

    Attributes:
        frozen_dtype: Dtype of the feature maps; None for that of each input.
        cuda_graphs: The model's CUDA graphs.
    """

    fused_resnet_settable = Frozen.fused_resnet_settable | {
        "cuda_graphs",
        "_compiled_call_impl",
        "_is_full_backward_hook",
    }
    fused_resnet_keeps_signature = True
    frozen_dtype: torch.dtype | None
    cuda_graphs: Graphs

    # Hooks around the whole model run outside of all that is derived from its modules.
    register_forward_pre_hook = nn.Module.register_forward_pre_hook
    register_forward_hook = nn.Module.register_forward_hook
    register_backward_hook = nn.Module.register_backward_hook
    register_full_backward_pre_hook = nn.Module.register_full_backward_pre_hook
    register_full_backward_hook = nn.Module.register_full_backward_hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward between two conversions.

        Args:
            args: Positional arguments of the model's forward.
            kwargs: Keyword arguments of the model's forward.
        """
        if "frozen_dtype" not in self.__dict__:  # a slice of a frozen nn.Sequential
            return super().forward(*args, **kwargs)
        if is_one_tensor(args, kwargs) and self._is_plain_call(args[0]):
            return super().forward(args[0].to(memory_format=torch.channels_last))
        # Flattening a structure takes ten times as long as checking for a single tensor.
        leaves = args if is_one_tensor(args, kwargs) else tree_leaves((args, kwargs))
        input_dtype = self._input_dtype(leaves)
        with torch.no_grad():
            result = self.cuda_graphs.run(self, super().forward, args, kwargs, self._enter)
            if input_dtype is None or input_dtype is (self.frozen_dtype or input_dtype):
                return result
            return tree_map(lambda leaf: leaf.to(input_dtype) if _is_map(leaf) else leaf, result)

    def _is_plain_call(self, x: Tensor) -> bool:
        """Whether nothing is to be converted but the memory format: most calls on a CPU."""
        return (
            x.dtype is self.frozen_dtype
            and x.dim() == 4
            and not x.requires_grad
            and not torch.compiler.is_compiling()
            and not self.cuda_graphs.takes(x)
        )

    def _input_dtype(self, leaves: Iterable[Any]) -> torch.dtype | None:
        found = None
        for leaf in leaves:
            if not _is_map(leaf):
                continue
            if self.frozen_dtype and leaf.dtype not in (self.frozen_dtype, torch.float32):
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
        dtype = self.frozen_dtype or leaf.dtype
        if leaf.dim() == 4:
            return leaf.to(dtype, memory_format=torch.channels_last)
        return leaf.to(dtype)


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
