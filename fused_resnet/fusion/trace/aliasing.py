"""What an operation of a graph may write to, and what its result may be a view of.

Both are asked before an operation is moved behind others: nothing in between may write to what it
reads. Every answer errs to the side of a write or a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import is_hooked, original_class

#: Functions and methods whose result is always memory of its own.
_FRESH = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "avg_pool2d", "batch_norm", "cat",
    "clamp", "clamp_min", "clone", "conv2d", "div", "gelu", "interpolate", "linear", "matmul",
    "max_pool2d", "mean", "mul", "neg", "pow", "relu", "sigmoid", "silu", "softmax", "stack", "sub",
    "sum", "tanh", "truediv",
}  # fmt: skip

#: Functions that ask and give no tensor back.
_ASKING = {"size", "dim", "ndimension", "_assert", "eq", "ne", "lt", "le", "gt", "ge"}

#: Layers of torch.nn that give back their input, or may: not those that compute into new memory.
_PASSING = (
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
        graph: Of ``module``.
        module: Whose children the graph calls.
        lists: Names of the arguments that are lists.
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
                self.roots[node] = self.of(node.all_input_nodes) | {node}
        self._join_what_lists_hold(graph, lists)

    def _join_what_lists_hold(self, graph: fx.Graph, lists: frozenset[str]) -> None:
        """What is put into a list is read from it later, by whoever has the list."""
        for node in graph.nodes:
            inputs = node.all_input_nodes
            given_list = any(n.op == "placeholder" and n.target in lists for n in inputs)
            stores = _name(node) == "setitem" if node.op == "call_function" else given_list
            if not stores or node.op not in ("call_function", "call_module"):
                continue
            together = self.of(inputs)
            for other, roots in self.roots.items():
                if roots & together:
                    self.roots[other] = roots | together

    def of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The union over several nodes."""
        return frozenset().union(*(self.roots[node] for node in nodes))

    def written(self, node: fx.Node) -> frozenset[fx.Node]:
        """The memory that the operation may write to."""
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
        return self.of(node.all_input_nodes) if in_place else frozenset()

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            return computes_anew(child)
        if node.op not in ("call_function", "call_method"):
            return False
        return _name(node) in _FRESH | _ASKING and not self._may_be_in_place(node)

    @staticmethod
    def _may_be_in_place(node: fx.Node) -> bool:
        flags = any(argument is True for argument in node.args)
        return flags or node.kwargs.get("inplace", False) is not False or "out" in node.kwargs


#: Those that ``operator`` has in place as well, with an ``i`` before the name.
_OPERATORS = {
    "add", "and", "floordiv", "matmul", "mod", "mul", "or", "pow", "sub", "truediv", "xor",
}  # fmt: skip


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _is_torch_layer(module: nn.Module) -> bool:
    return original_class(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def computes_anew(module: nn.Module) -> bool:
    """Whether the result is always memory of its own, and never a view of the input."""
    if not _is_torch_layer(module) or is_hooked(module) or isinstance(module, _PASSING):
        return False
    return not getattr(module, "inplace", False) and not any(True for _ in module.children())


def writes_to_input(module: nn.Module) -> bool:
    """Whether calling the module may change its arguments."""
    if is_hooked(module):
        return True
    if _is_torch_layer(module) and not any(True for _ in module.children()):
        return bool(getattr(module, "inplace", False))
    return any(map(_is_in_place, module.modules())) and not _starts_anew(module)


def _starts_anew(module: nn.Module) -> bool:
    """Whether it is a sequence that computes into new memory before it writes in place."""
    if original_class(module).forward is not nn.Sequential.forward:
        return False
    for child in module.children():
        if writes_to_input(child):
            return False
        if computes_anew(child):
            return True
    return True


def _is_in_place(module: nn.Module) -> bool:
    # What is not PyTorch's own may write wherever its code likes; ReLU is what usually does.
    own_code = not _is_torch_layer(module) and original_class(module) not in (
        nn.Sequential,
        nn.ModuleList,
    )
    return own_code or bool(getattr(module, "inplace", False)) or is_hooked(module)
