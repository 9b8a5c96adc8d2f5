"""Predicates on the nodes of a graph: layers, activation, addition, zero-padded subsampling."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...backends.activation import LEAKY_SLOPE, Activation
from ...nn.module_kinds import ACTIVATIONS, activation_of, is_max_pool, is_norm

#: What a match has as the path of an activation that is called as a function.
FUNCTION_PATHS = {f"<{a.name.lower()}>": a for a in Activation if a}

_RELU_FUNCTIONS: tuple[Any, ...] = (torch.relu, torch.relu_, F.relu, F.relu_)
_LEAKY_FUNCTIONS: tuple[Any, ...] = (F.leaky_relu, F.leaky_relu_)
_ADD_FUNCTIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


def child_of(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The submodule that a node calls with a single tensor; None for any other node.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    if not isinstance(node.args[0], fx.Node):
        return None
    return module.get_submodule(str(node.target))


def is_conv(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls a two-dimensional convolution, supported or not.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    return isinstance(child_of(module, node), nn.Conv2d)


def is_normalisation(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls a batch norm of any class.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    child = child_of(module, node)
    return child is not None and is_norm(child)


def is_identity(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls an ``nn.Identity``.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    child = child_of(module, node)
    return child is not None and type(child) is nn.Identity


def is_pool(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls a max-pool that the stem's operation supports.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    child = child_of(module, node)
    return child is not None and is_max_pool(child)


def activation_path(module: nn.Module, node: fx.Node) -> str:
    """The path of an activation that the node calls, or that of a function; empty for none.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph. A module counts whether or not an operation applies it.
    """
    if isinstance(child_of(module, node), ACTIVATIONS):
        return str(node.target)
    function = _function(node)
    return f"<{function.name.lower()}>" if function else ""


def activation_at(module: nn.Module, node: fx.Node) -> Activation:
    """The activation of the operations that a node applies; NONE for any other node.

    Args:
        module: Module that the graph belongs to.
        node: Node of the graph.
    """
    return _function(node) or activation_of(child_of(module, node))


def _function(node: fx.Node) -> Activation:
    """The activation that a function or method applies.

    ``clamp(min=0)`` is none: its gradient at zero is not ReLU's in every version of PyTorch.
    """
    if node.op == "call_function" and node.target in _RELU_FUNCTIONS:
        return Activation.RELU
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return Activation.RELU
    if node.op == "call_function" and node.target in _LEAKY_FUNCTIONS:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return Activation.LEAKY_RELU if slope == LEAKY_SLOPE else Activation.NONE
    return Activation.NONE


def addition(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """The operands of an addition of two results, and whether it overwrites the left one.

    Args:
        node: Node of the graph; None is returned for one that is not such an addition.
    """
    method = node.op == "call_method" and node.target in ("add", "add_")
    function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    if not (method or function) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    return left, right, node.target in (operator.iadd, "add_")


def subsampling(node: fx.Node) -> tuple[int, int] | None:
    """The strides of ``x[:, :, ::s, ::s]``.

    Args:
        node: Node of the graph.

    Returns:
        ``(height, width)``; None for any other node.
    """
    if node.target is not operator.getitem:
        return None
    index: Any = node.args[1]
    whole = slice(None, None, None)
    if not isinstance(index, tuple) or len(index) != 4 or index[:2] != (whole, whole):
        return None
    if any(not isinstance(i, slice) or i.start is not None or i.stop is not None for i in index):
        return None
    first, second = ((1 if i.step is None else i.step) for i in index[2:])
    return (first, second) if type(first) is int and type(second) is int else None


def zeros_of(node: fx.Node) -> int | None:
    """The channels of zeros that a node pads with on each side.

    Args:
        node: Node of the graph.

    Returns:
        The number of channels; None for any other node.
    """
    if node.target is not F.pad or len(node.args) < 2 or not set(node.kwargs) <= {"mode", "value"}:
        return None
    amount, *rest = node.args[1:]
    mode, value = [*rest, *("constant", None)[len(rest) :]][:2]
    mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
    plain = mode == "constant" and value in (None, 0, 0.0)
    if not plain or not isinstance(amount, (tuple, list)) or len(amount) != 6:
        return None
    zeros = amount[4]
    return zeros if tuple(amount) == (0, 0, 0, 0, zeros, zeros) and type(zeros) is int else None
