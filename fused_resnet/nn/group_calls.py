"""Calls groups of existing modules as single operations.

Every function here reads the parameters, buffers and settings of its modules at each call and
caches nothing, so it can't go stale. :mod:`.groups` decides which operation runs; where none can
replace the modules they are called one by one, as in the unfused network.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.activation import Activation
from ..ops.training_reference import count_batch
from .groups import Decision, decide_conv_bn, decide_norm, decide_run
from .module_kinds import (
    activate,
    eps_of,
    has_mode,
    inner_activation,
    is_observed,
    padding_of,
    result_fits,
    running_statistics,
    tensor_of,
    uses_batch_statistics,
)

#: The addition that the unfused forward uses: in place as in torchvision, where the result has the
#: dtype of the batch norm's result, or out of place.
Add = Callable[[Tensor, Tensor], Tensor]


def conv_bn(
    conv: nn.Module,
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Add = operator.iadd,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` as one operation, as far as its result is the same.

    Args:
        conv: The convolution.
        bn: The batch norm.
        act: The activation; None for none. Any module is allowed, not all are fused.
        x: Input, ``(N, C, H, W)``.
        residual: Tensor of the result's shape; None for none.
        add: Adds the residual where no operation does.

    Returns:
        The result of calling the modules in turn, up to rounding.
    """
    decision = decide_conv_bn(conv, bn, act, residual is not None)
    if not decision.operation or is_observed(x):
        return _one_by_one(bn, act, conv(x), residual, add)
    if decision.operation == "bn_add_relu":
        return norm_add_act(bn, act, conv(x), residual, add)
    if residual is not None and not result_fits(conv, x, residual):
        return _one_by_one(bn, act, conv(x), residual, add)
    assert isinstance(conv, nn.Conv2d)
    y = _conv_bn_add_relu(conv, bn, x, residual, decision.activation)
    return _apply_unfused_activation(decision, bn, act, y)


def norm_add_act(
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Add = operator.iadd,
) -> Tensor:
    """``act(bn(x) [+ residual])`` as one operation, as far as its result is the same.

    Args:
        bn: The batch norm.
        act: The activation; None for none. Any module is allowed, not all are fused.
        x: Input, ``(N, C, H, W)``.
        residual: Tensor of ``x``'s shape; None for none.
        add: Adds the residual where no operation does.

    Returns:
        The result of calling the modules in turn, up to rounding.
    """
    decision = decide_norm(bn, act, residual is not None)
    fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if not decision.operation or is_observed(x) or x.dim() != 4 or not fits:
        return _one_by_one(bn, act, x, residual, add)
    return _apply_unfused_activation(
        decision, bn, act, _bn_add_relu(bn, x, residual, decision.activation)
    )


def _apply_unfused_activation(
    decision: Decision, bn: nn.Module, act: nn.Module | None, y: Tensor
) -> Tensor:
    """Apply the activation to an operation's result, unless the operation did."""
    if decision.activation:
        return y
    unfused = act if act is not None else inner_activation(bn)
    return activate(unfused, y)


def _one_by_one(
    bn: nn.Module, act: nn.Module | None, z: Tensor, residual: Tensor | None, add: Add
) -> Tensor:
    y: Tensor = bn(z)
    if residual is not None:
        y = add(y, residual)
    return activate(act, y)


def run_sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Call modules one after another, with each group among them as one operation.

    Args:
        modules: The modules in the order of their calls.
        x: Input of the first module.

    Returns:
        The result of the last module, up to rounding.
    """
    members = list(modules)
    if is_observed(x):
        for module in members:
            x = module(x)
        return x
    at = 0
    while at < len(members):
        first, decision = members[at], decide_run(members, at)
        following = members[at + 1 : at + decision.length]
        if not decision.operation:
            x = first(x)
        elif decision.operation == "bn_add_relu":
            x = _bn_add_relu(first, x, None, decision.activation)
        elif decision.operation == "conv_bn_relu_maxpool":
            assert isinstance(first, nn.Conv2d)
            x = _conv_bn_relu_maxpool(first, following[0], following[-1], x, decision.activation)
        else:
            assert isinstance(first, nn.Conv2d)
            x = _conv_bn_add_relu(first, following[0], x, None, decision.activation)
        at += decision.length
    return x


# The arguments of an operation, taken from modules


def bn_add_relu(
    bn: nn.Module, x: Tensor, residual: Tensor | None, activation: Activation
) -> Tensor:
    """``activation(bn(x) [+ residual])`` with the parameters, statistics and mode of ``bn``.

    Args:
        bn: Any batch norm; its class and hooks are not checked, since the module itself calls this.
        x: Input, ``(N, C, H, W)``.
        residual: Tensor of ``x``'s shape and dtype; None for none.
        activation: The activation that is applied to the sum.
    """
    return _bn_add_relu(bn, x, residual, activation)


def norm_arguments(bn: Any) -> dict[str, Any]:
    """The arguments of an operation that come from a batch norm; updates its batch counter.

    Args:
        bn: A batch norm that :func:`.norm_reason` accepts.
    """
    mean, var, batches = running_statistics(bn)
    arguments = {
        "bn_weight": tensor_of(bn, "weight"),
        "bn_bias": tensor_of(bn, "bias"),
        "running_mean": mean,
        "running_var": var,
        "training": uses_batch_statistics(bn),
        "eps": eps_of(bn),
    }
    if has_mode(bn):
        arguments["momentum"] = count_batch(bn.momentum, batches)
    return arguments


def _counting(operation: Callable[..., Tensor], bn: Any, *tensors: Tensor, **others: Any) -> Tensor:
    """Call an operation with the arguments of a batch norm; a call that is refused counts nothing.

    The batch is counted first, as in PyTorch: activation checkpointing may end a call after it.
    """
    arguments = norm_arguments(bn)
    if torch.compiler.is_compiling():
        return operation(*tensors, **others, **arguments)
    try:
        return operation(*tensors, **others, **arguments)
    except (RuntimeError, TypeError, ValueError):
        batches = running_statistics(bn)[2]
        if batches is not None:
            batches.sub_(1)
        raise


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments of an operation that come from a convolution, except for its weight.

    Args:
        conv: A convolution that :func:`.conv_reason` accepts.
    """
    return {
        "conv_bias": tensor_of(conv, "bias"),
        "stride": conv.stride,
        "padding": padding_of(conv),
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def _bn_add_relu(
    bn: nn.Module, x: Tensor, residual: Tensor | None, activation: Activation
) -> Tensor:
    return _counting(ops.bn_add_relu, bn, x, residual=residual, activation=activation)


def _conv_bn_add_relu(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, residual: Tensor | None, activation: Activation
) -> Tensor:
    return _counting(
        ops.conv_bn_add_relu,
        bn,
        x,
        tensor_of(conv, "weight"),
        residual=residual,
        activation=activation,
        **conv_arguments(conv),
    )


def _conv_bn_relu_maxpool(
    conv: nn.Conv2d, bn: nn.Module, pool: nn.Module, x: Tensor, activation: Activation
) -> Tensor:
    return _counting(
        ops.conv_bn_relu_maxpool,
        bn,
        x,
        tensor_of(conv, "weight"),
        pool_kernel=pool.kernel_size,
        pool_stride=pool.stride,
        pool_padding=pool.padding,
        activation=activation,
        **conv_arguments(conv),
    )
