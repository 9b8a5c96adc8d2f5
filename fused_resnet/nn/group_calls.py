"""Running groups: functions over modules that somebody else built.

Every function here reads the live parameters, buffers and settings of its modules at every call and
keeps nothing, so it can't go stale. Which operation runs is decided in :mod:`.groups`; where no
operation can stand for the modules they are called one by one, as the unfused network would.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import ops
from .groups import Decision, decide_conv_bn, decide_norm, decide_run
from .module_kinds import (
    PackedConv,
    activate,
    eps_of,
    inner_activation,
    is_observed,
    is_relu,
    padding_of,
    result_fits,
)

#: How the owner of the modules adds the residual: in place like torchvision, where the result keeps
#: the dtype of the batch norm's, or not.
Add = Callable[[Tensor, Tensor], Tensor]


def conv_bn(
    conv: nn.Module,
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Add = operator.iadd,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` with as much of it in one operation as can be proved equal.

    Args:
        conv: The convolution, or the :class:`.PackedConv` in its place.
        bn: The normalisation.
        act: The activation; None for none. Any module will do, ReLU is fused.
        x: ``(N, C, H, W)``.
        residual: Shape of the result; None for none.
        add: Adds the residual where no operation does.

    Returns:
        What calling the modules in turn returns, up to rounding.
    """
    if isinstance(conv, PackedConv):
        return _packed(conv, bn, act, x, residual, add)
    decision = decide_conv_bn(conv, bn, act, residual is not None)
    if not decision.operation or is_observed(x):
        return _one_by_one(bn, act, conv(x), residual, add)
    if decision.operation == "bn_add_relu":
        return norm_add_act(bn, act, conv(x), residual, add)
    if residual is not None and not result_fits(conv, x, residual):
        return _one_by_one(bn, act, conv(x), residual, add)
    assert isinstance(conv, nn.Conv2d)
    y = _conv_bn_add_relu(conv, bn, x, residual, decision.relu)
    return _rest_of(decision, bn, act, y)


def norm_add_act(
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Add = operator.iadd,
) -> Tensor:
    """``act(bn(x) [+ residual])`` with as much of it in one operation as can be proved equal.

    Args:
        bn: The normalisation.
        act: The activation; None for none. Any module will do, ReLU is fused.
        x: ``(N, C, H, W)``.
        residual: Shape of ``x``; None for none.
        add: Adds the residual where no operation does.

    Returns:
        What calling the modules in turn returns, up to rounding.
    """
    decision = decide_norm(bn, act, residual is not None)
    fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if not decision.operation or is_observed(x) or x.dim() != 4 or not fits:
        return _one_by_one(bn, act, x, residual, add)
    return _rest_of(decision, bn, act, _bn_add_relu(bn, x, residual, decision.relu))


def _rest_of(decision: Decision, bn: nn.Module, act: nn.Module | None, y: Tensor) -> Tensor:
    """The activation behind an operation that did not apply it."""
    if decision.relu:
        return y
    rest = act if act is not None else inner_activation(bn)
    return activate(rest, y)


def _packed(
    conv: PackedConv,
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None,
    add: Add,
) -> Tensor:
    inner = inner_activation(bn)
    act = act if inner is None else inner
    relu = is_relu(act)
    if residual is not None and not result_fits(conv, x, residual):
        y = add(conv(x, None, False), residual)
        return activate(act, y)
    y = conv(x, residual, relu)
    return y if relu else activate(act, y)


def _one_by_one(
    bn: nn.Module, act: nn.Module | None, z: Tensor, residual: Tensor | None, add: Add
) -> Tensor:
    y: Tensor = bn(z)
    if residual is not None:
        y = add(y, residual)
    return activate(act, y)


def run_sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Call modules one after another, with each run that an operation computes as that operation.

    Args:
        modules: In the order of their calls.
        x: The input of the first.
    """
    members = list(modules)
    if is_observed(x):
        for module in members:
            x = module(x)
        return x
    at = 0
    while at < len(members):
        first, decision = members[at], decide_run(members, at)
        behind = members[at + 1 : at + decision.length]
        if not decision.operation:
            x = first(x)
        elif isinstance(first, PackedConv):
            x = _packed_run(first, decision, behind, x)
        elif decision.operation == "bn_add_relu":
            x = _bn_add_relu(first, x, None, True)
        elif decision.operation == "conv_bn_relu_maxpool":
            assert isinstance(first, nn.Conv2d)
            x = _conv_bn_relu_maxpool(first, behind[0], behind[-1], x)
        else:
            assert isinstance(first, nn.Conv2d)
            x = _conv_bn_add_relu(first, behind[0], x, None, decision.relu)
        at += decision.length
    return x


def _packed_run(conv: PackedConv, decision: Decision, behind: list[nn.Module], x: Tensor) -> Tensor:
    if decision.operation == "conv_bn_relu_maxpool":
        return conv(x, None, True, True)
    act = behind[1] if len(behind) > 1 else None
    return _packed(conv, behind[0], act, x, None, operator.iadd)


# The arguments of an operation, from the modules


def bn_add_relu(bn: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(bn(x) [+ residual])`` with the parameters, statistics and mode of ``bn``.

    Args:
        bn: Any batch norm. Its class and hooks are not checked: the caller is the module itself.
        x: ``(N, C, H, W)``.
        residual: Shape and dtype of ``x``; None for none.
    """
    return _bn_add_relu(bn, x, residual, True)


def norm_arguments(bn: Any) -> dict[str, Any]:
    """The arguments of an operation that come from a batch norm; counts the call as PyTorch does.

    Args:
        bn: A batch norm that :func:`.norm_reason` accepts.

    Source:
        ``torch.nn.modules.batchnorm._BatchNorm.forward``.
    """
    arguments = {
        "bn_weight": bn.weight,
        "bn_bias": bn.bias,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
        "training": False,
        "eps": eps_of(bn),
    }
    if not isinstance(bn, _NormBase):  # a FrozenBatchNorm2d has no mode
        return arguments
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if bn.training and not bn.track_running_stats:
        arguments["running_mean"] = arguments["running_var"] = None
    arguments["training"] = bn.training or (bn.running_mean is None and bn.running_var is None)
    arguments["momentum"] = momentum
    return arguments


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments of an operation that come from a convolution, its weight apart.

    Args:
        conv: A convolution that :func:`.conv_reason` accepts.
    """
    return {
        "conv_bias": conv.bias,
        "stride": conv.stride,
        "padding": padding_of(conv),
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def _bn_add_relu(bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return ops.bn_add_relu(x, residual=residual, relu=relu, **norm_arguments(bn))


def _conv_bn_add_relu(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return ops.conv_bn_add_relu(
        x,
        conv.weight,
        residual=residual,
        relu=relu,
        **conv_arguments(conv),
        **norm_arguments(bn),
    )


def _conv_bn_relu_maxpool(conv: nn.Conv2d, bn: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    return ops.conv_bn_relu_maxpool(
        x,
        conv.weight,
        pool_kernel=pool.kernel_size,  # type: ignore[arg-type]
        pool_stride=pool.stride,  # type: ignore[arg-type]
        pool_padding=pool.padding,  # type: ignore[arg-type]
        **conv_arguments(conv),
        **norm_arguments(bn),
    )
