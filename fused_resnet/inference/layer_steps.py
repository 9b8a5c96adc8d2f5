"""Which steps the nodes of a graph stand for: PyTorch's layers, functions and methods."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn.module_kinds import is_hooked, original_class
from ..nn.module_settings import has_pool_settings
from ..ops.program_steps import Step


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose results a node reads, as often as it does.

    Args:
        node: Node of a graph.
    """
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def is_layer(module: nn.Module, node: fx.Node, cls: type[nn.Module]) -> bool:
    """Whether a node calls one of PyTorch's layers, without hooks, on a single value.

    Args:
        module: Module to which paths are relative.
        node: Node of the module's graph.
        cls: The class of the layer.
    """
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    child = module.get_submodule(str(node.target))
    return original_class(child) is cls and not is_hooked(child)


def unchanged_input(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """The input of a node that returns it as it is.

    Args:
        module: Module to which paths are relative.
        node: Node of the module's graph.

    Returns:
        The node that made the input; None for a node that does not return its input.
    """
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if any(is_layer(module, node, cls) for cls in (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return node.args[0]
    if node.target in (F.dropout, F.dropout2d):
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return node.args[0] if training is False else None
    return None


#: Functions and methods of PyTorch's layers, by what they compute.
_FLATTEN: tuple[Any, ...] = (torch.flatten, "flatten")
_MEAN: tuple[Any, ...] = (torch.mean, "mean")


def layer_of(module: nn.Module, node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """The kind of step that a node may be, and its settings; None for none.

    Args:
        module: Module to which paths are relative.
        node: Node of the module's graph.
    """
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        child: Any = module.get_submodule(str(node.target))
        cls = original_class(child)
        if cls is nn.MaxPool2d:
            return _max_pool(child)
        if cls is nn.AvgPool2d:
            return _avg_pool(child)
        if cls is nn.AdaptiveAvgPool2d:
            one = child.output_size in (1, (1, 1), [1, 1])
            return ("global_avg_pool", {"keeps": True}) if one else None
        if cls is nn.Flatten:
            return ("flatten", {}) if (child.start_dim, child.end_dim) == (1, -1) else None
        return ("linear", {}) if cls is nn.Linear else None
    if node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)):
        return "global_avg_pool", {"keeps": True}
    if node.target in _FLATTEN and node.args[1:] == (1,) and not node.kwargs:
        return "flatten", {}
    if node.target in _MEAN:
        given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
        keeps = given.pop("keepdim", False)
        dims = given.pop("dim", None)
        if not given and isinstance(dims, (tuple, list)) and tuple(dims) in ((2, 3), (-2, -1)):
            return "global_avg_pool", {"keeps": bool(keeps)}
    return None


def _max_pool(pool: Any) -> tuple[str, dict[str, Any]] | None:
    plain = has_pool_settings(pool) and pool.dilation in (1, (1, 1)) and not pool.return_indices
    return ("max_pool", _window(pool)) if plain else None


def _avg_pool(pool: Any) -> tuple[str, dict[str, Any]] | None:
    if not has_pool_settings(pool):
        return None
    settings = _window(pool)
    counts = pool.count_include_pad or settings["padding"] == (0, 0)
    return ("avg_pool", settings) if counts and pool.divisor_override is None else None


def _window(pool: Any) -> dict[str, Any]:
    values = (pool.kernel_size, pool.stride, pool.padding)
    names = ("kernel", "stride", "padding")
    pairs = (v if isinstance(v, tuple) else (v, v) for v in values)
    return dict(zip(names, pairs, strict=True)) | {"ceil_mode": bool(pool.ceil_mode)}


def size_after(size: Any, step: Step) -> Any:
    """How the size of a step's result follows from that of the program's input.

    Of steps that only divide the size, rounded up, the product of the strides; of others their
    settings, one after the other.

    Args:
        size: How the size of the step's input follows from that of the program's input: ``(1, 1)``
            for the same size, or a result of this function.
        step: The step.
    """
    if step.operation == "zero_pad_shortcut":
        return divided(size, step.stride)
    beyond = [s - 1 if step.ceil_mode else 0 for s in step.stride]
    halves = [d * (k - 1) for d, k in zip(step.dilation, step.kernel, strict=True)]
    keeps = all(h == 2 * p + b for h, p, b in zip(halves, step.padding, beyond, strict=True))
    window = (step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    after = divided(size, step.stride) if keeps else (size, window)
    if step.operation != "conv_max_pool":
        return after
    pool = Step(
        "max_pool", 0, kernel=step.pool_kernel, stride=step.pool_stride, padding=step.pool_padding
    )
    return size_after(after, pool)


def divided(size: Any, stride: tuple[int, int]) -> Any:
    """How a size divided by a stride, and rounded up, follows from the program's input.

    Args:
        size: A result of :func:`size_after`.
        stride: Stride that divided it, ``(height, width)``.
    """
    if stride == (1, 1):
        return size
    if isinstance(size[0], int):
        return size[0] * stride[0], size[1] * stride[1]
    return size, stride
