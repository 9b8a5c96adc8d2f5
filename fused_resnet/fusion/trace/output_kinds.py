"""The kind of a node's result during a trace: a tensor, or a list of known length.

A forward that inspects the class of a result, or iterates over it, can be traced where the kind
follows from the operation: PyTorch's layers and functions return tensors. The kind of any other
submodule's result is found by tracing that submodule (:mod:`.generate`). It is valid while the
submodule's code is unchanged, which the guard of the generated forward checks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import original_class
from .errors import Untraceable

#: The kind of a result: None for a tensor, the length of a list.
OutputKind = int | None

#: Files of torch.nn.modules whose layers return one tensor, or raise.
_LAYERS = ("activation", "batchnorm", "conv", "linear", "normalization", "padding", "pooling",
           "upsampling")  # fmt: skip

#: Functions of torch that return a tensor, or raise, when an argument is a tensor.
_FUNCTIONS = {
    "adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "cat", "conv2d", "div", "flatten",
    "gelu", "iadd", "imul", "interpolate", "mul", "pad", "relu", "relu_", "sigmoid", "silu",
    "softmax", "sub", "tanh", "truediv",
}  # fmt: skip


class NeedsOutputKind(Untraceable):
    """The code depends on the kind of a submodule's result; tracing the submodule can tell.

    Args:
        path: Path of the submodule.
        question: What the code does with the result; completes "its forward ...".
    """

    def __init__(self, path: str, question: str) -> None:
        super().__init__(f"its forward {question}")
        self.path = path


def layer_returns_tensor(module: nn.Module) -> bool:
    """Whether a module is a layer of PyTorch that returns one tensor.

    Args:
        module: Any module.
    """
    cls = original_class(module)
    home, _, file = cls.__module__.rpartition(".")
    if home != "torch.nn.modules" or file not in _LAYERS:
        return False
    return cls is not nn.MultiheadAttention and not hasattr(module, "return_indices")


class OutputKinds:
    """The kinds of the results of one trace's nodes.

    Args:
        module: The traced module.
        tensors: Names of its arguments that are tensors.
        known: The kinds of submodules' results that were found by tracing them, by path.

    Attributes:
        inspected: Paths of the submodules whose result's kind was used.
    """

    def __init__(
        self, module: nn.Module, tensors: Container[str], known: Mapping[str, OutputKind]
    ) -> None:
        self.module, self.tensors, self.known = module, tensors, known
        self.inspected: dict[str, None] = {}

    def of(self, node: fx.Node, question: str) -> OutputKind:
        """The kind of a node's result.

        Args:
            node: Node of the traced graph.
            question: What the code does with the result; completes "its forward ...".

        Raises:
            NeedsOutputKind: It depends on the code of a submodule.
            Untraceable: It is unknown.
        """
        if node.op == "placeholder" and node.target in self.tensors:
            return None
        if node.op == "call_module":
            path = str(node.target)
            if path not in self.known and not self._is_layer(path):
                raise NeedsOutputKind(path, question)
            self.inspected[path] = None
            return self.known.get(path)
        if node.op == "call_function" and self._returns_tensor(node):
            return None
        raise Untraceable(f"its forward {question}")

    def _returns_tensor(self, node: fx.Node) -> bool:
        if getattr(node.target, "__name__", "") not in _FUNCTIONS:
            return False
        # One tensor among the operands is enough: the result is then a tensor.
        return _is_of_torch(node.target) or any(map(self._is_tensor, node.all_input_nodes))

    def _is_layer(self, path: str) -> bool:
        return layer_returns_tensor(self.module.get_submodule(path))

    def _is_tensor(self, node: fx.Node) -> bool:
        try:
            return self.of(node, "") is None
        except Untraceable:
            return False


def _is_of_torch(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "torch"
