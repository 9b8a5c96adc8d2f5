"""What is known of a result while a module is traced: that it is a tensor, or a list of so many.

A forward that asks for the class of a result, or goes through it, can be traced where the answer
follows from the operation: PyTorch's layers and functions give tensors. What any other child gives
is found out by looking into it, which :mod:`.swapper` does; then the answer holds while the code
that was looked into stays as it was, and the forward that is made asks for that at each call.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import original_class
from .errors import Untraceable

#: The result of a child: None for a tensor, or how long a list.
Given = int | None

#: Files of torch.nn.modules whose layers give one tensor, or raise.
_LAYERS = ("activation", "batchnorm", "conv", "linear", "normalization", "padding", "pooling",
           "upsampling")  # fmt: skip

#: Functions of torch that give a tensor, or raise, when they are given one.
_FUNCTIONS = {
    "adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "cat", "conv2d", "div", "flatten",
    "gelu", "iadd", "imul", "interpolate", "mul", "pad", "relu", "relu_", "sigmoid", "silu",
    "softmax", "sub", "tanh", "truediv",
}  # fmt: skip


class AsksForResult(Untraceable):
    """The code asks what a child gives back; whoever looks into that child can tell.

    Attributes:
        path: Of the child.
    """

    def __init__(self, path: str, question: str) -> None:
        super().__init__(f"its forward {question}")
        self.path = path


def layer_gives_tensor(module: nn.Module) -> bool:
    """Whether a module is a layer of PyTorch whose result is one tensor."""
    cls = original_class(module)
    home, _, file = cls.__module__.rpartition(".")
    if home != "torch.nn.modules" or file not in _LAYERS:
        return False
    return cls is not nn.MultiheadAttention and not hasattr(module, "return_indices")


class Results:
    """The results of one trace's nodes.

    Args:
        module: That is traced.
        tensors: Names of its arguments that are tensors.
        given: What its children give, by path, where somebody looked into them.

    Attributes:
        asked: Paths of the layers and children that an answer relied on.
    """

    def __init__(
        self, module: nn.Module, tensors: Container[str], given: Mapping[str, Given]
    ) -> None:
        self.module, self.tensors, self.given = module, tensors, given
        self.asked: dict[str, None] = {}

    def of(self, node: fx.Node, question: str) -> Given:
        """What a node gives.

        Raises:
            AsksForResult: It depends on what is in a child.
            Untraceable: Nothing is known of it.
        """
        if node.op == "placeholder" and node.target in self.tensors:
            return None
        if node.op == "call_module":
            path = str(node.target)
            if path not in self.given and not self._is_layer(path):
                raise AsksForResult(path, question)
            self.asked[path] = None
            return self.given.get(path)
        if node.op == "call_function" and self._gives_tensor(node):
            return None
        raise Untraceable(f"its forward {question}")

    def _gives_tensor(self, node: fx.Node) -> bool:
        if getattr(node.target, "__name__", "") not in _FUNCTIONS:
            return False
        # Of two operands one is enough: with a tensor, addition gives a tensor or raises.
        return _is_of_torch(node.target) or any(map(self._is_tensor, node.all_input_nodes))

    def _is_layer(self, path: str) -> bool:
        return layer_gives_tensor(self.module.get_submodule(path))

    def _is_tensor(self, node: fx.Node) -> bool:
        try:
            return self.of(node, "") is None
        except Untraceable:
            return False


def _is_of_torch(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "torch"
