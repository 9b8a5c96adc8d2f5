"""Alias analysis: what a node of a graph may write to, and what its result may be a view of.

Needed before an operation is moved after other nodes, none of which may write to its inputs. The
analysis is conservative: an unknown operation writes to its inputs and returns a view of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import PackedConv, is_hooked, original_class
from .patterns import addition

#: Functions and methods that always return newly allocated memory.
_FRESH = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "avg_pool2d", "batch_norm", "cat",
    "clamp", "clamp_min", "clone", "conv2d", "div", "gelu", "interpolate", "linear", "matmul",
    "max_pool2d", "mean", "mul", "neg", "pow", "relu", "sigmoid", "silu", "softmax", "stack", "sub",
    "sum", "tanh", "truediv",
}  # fmt: skip

#: Functions that return no tensor.
_QUERIES = {"size", "dim", "ndimension", "_assert", "eq", "ne", "lt", "le", "gt", "ge"}

#: Layers of torch.nn that may return their input or a view of it.
_MAY_RETURN_INPUT = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad2d,
)


class Aliases:
    """For every node of a graph, the nodes whose memory its result may share.

    Args:
        graph: The graph of a forward.
        module: The module that the forward belongs to.
        lists: Names of the arguments that are lists.

    Attributes:
        roots: For each node, itself and the nodes whose memory its result may share.
    """

    def __init__(
        self, graph: fx.Graph, module: nn.Module, lists: frozenset[str] = frozenset()
    ) -> None:
        self.module = module
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        arguments = frozenset(n for n in graph.nodes if n.op == "placeholder")
        for node in graph.nodes:
            if node.op == "placeholder":
                # Two arguments may be views of one tensor.
                self.roots[node] = arguments
            elif self._is_fresh(node):
                self.roots[node] = frozenset([node])
            else:
                self.roots[node] = self.of(_passed_on(node)) | {node}
        self._merge_list_items(graph, lists)

    def _merge_list_items(self, graph: fx.Graph, lists: frozenset[str]) -> None:
        """Whatever is stored in a list may be read through any reference to the list."""
        for node in graph.nodes:
            inputs = node.all_input_nodes
            takes_list = any(n.op == "placeholder" and n.target in lists for n in inputs)
            stores = _name(node) == "setitem" if node.op == "call_function" else takes_list
            if not stores or node.op not in ("call_function", "call_module"):
                continue
            merged = self.of(inputs)
            for other, roots in self.roots.items():
                if roots & merged:
                    self.roots[other] = roots | merged

    def of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The nodes whose memory the results of ``nodes`` may share.

        Args:
            nodes: Nodes of the graph.
        """
        return frozenset().union(*(self.roots[node] for node in nodes))

    def written(self, node: fx.Node) -> frozenset[fx.Node]:
        """The nodes whose memory a node may write to.

        Args:
            node: Node of the graph.
        """
        if node.op in ("placeholder", "get_attr", "output"):
            return frozenset()
        if node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            return self.of(node.all_input_nodes) if writes_to_input(child) else frozenset()
        name = _name(node)
        in_place = (
            name.endswith("_")
            or name in ("setitem", "copy")
            or (name.startswith("i") and name[1:] in _OPERATORS)
            or node.kwargs.get("inplace", False) is not False
            or "out" in node.kwargs
            or any(argument is True for argument in node.args)
        )
        return self.of(_passed_on(node)) if in_place else frozenset()

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            return returns_new_tensor(child)
        if node.op not in ("call_function", "call_method"):
            return False
        return _name(node) in _FRESH | _QUERIES and not self._may_be_in_place(node)

    @staticmethod
    def _may_be_in_place(node: fx.Node) -> bool:
        flags = any(argument is True for argument in node.args)
        return flags or node.kwargs.get("inplace", False) is not False or "out" in node.kwargs


#: Names in ``operator`` that have an in-place form, with an ``i`` in front.
_OPERATORS = {
    "add", "and", "floordiv", "matmul", "mod", "mul", "or", "pow", "sub", "truediv", "xor",
}  # fmt: skip


def _passed_on(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write to or return: of an addition in place, the left one."""
    sides = addition(node)
    return [sides[0]] if sides is not None and sides[2] else node.all_input_nodes


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _is_torch_layer(module: nn.Module) -> bool:
    return original_class(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def returns_new_tensor(module: nn.Module) -> bool:
    """Whether the module always returns newly allocated memory, never a view of its input.

    Args:
        module: Any module.
    """
    if isinstance(module, PackedConv):
        return not is_hooked(module)
    if not _is_torch_layer(module) or is_hooked(module) or isinstance(module, _MAY_RETURN_INPUT):
        return False
    return not getattr(module, "inplace", False) and not any(True for _ in module.children())


def writes_to_input(module: nn.Module) -> bool:
    """Whether calling the module may change its arguments.

    Args:
        module: Any module.
    """
    if is_hooked(module):
        return True
    if isinstance(module, PackedConv):
        return False
    if _is_torch_layer(module) and not any(True for _ in module.children()):
        return bool(getattr(module, "inplace", False))
    return any(map(_is_in_place, module.modules())) and not _writes_only_to_own_results(module)


def _writes_only_to_own_results(module: nn.Module) -> bool:
    """Whether it is an ``nn.Sequential`` that computes a new tensor before it writes in place."""
    if original_class(module).forward is not nn.Sequential.forward:
        return False
    for child in module.children():
        if writes_to_input(child):
            return False
        if returns_new_tensor(child):
            return True
    return True


def _is_in_place(module: nn.Module) -> bool:
    # A module that is not PyTorch's may write to anything.
    own_code = not _is_torch_layer(module) and original_class(module) not in (
        nn.Sequential,
        nn.ModuleList,
    )
    return own_code or bool(getattr(module, "inplace", False)) or is_hooked(module)
