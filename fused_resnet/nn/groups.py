"""The fused forwards: functions over modules that somebody else built, and the groups they form.

A *group* is a run of modules that one operation stands for: convolution, batch norm, the residual
add and ReLU. Every function here reads the live parameters, buffers and settings of its modules at
every call and keeps nothing, so it cannot go stale, and decides at every call whether the operation
still means what the modules mean. Where it does not (a hook, a parametrisation, another padding
mode, another class in a slot), the modules are called one by one, as the unfused network would.

The routes (``BasicBlockRoute`` and so on) are mix-ins that give a module such a forward. The
modules of :mod:`fused_resnet.nn` inherit them, and :func:`fused_resnet.fuse` adds them to the
modules of others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from .. import ops


class Packed(nn.Module):
    """What :func:`fused_resnet.freeze` leaves in a convolution's slot: a whole group as one module.

    Called with ``(x, residual, relu, pool)``; alone it is the convolution and its batch norm.

    Attributes:
        operation: The operation that it runs.
        relu: Whether the group has a ReLU.
        span: How many modules of a chain it stands for, itself included.
    """

    operation: str
    relu: bool
    span: int


class Folded(nn.Identity):
    """Where a batch norm was that is now in its convolution's :class:`Packed`.

    Keeps the activation that the batch norm had inside; called only where its owner's forward runs
    as it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        """What the batch norm did behind its normalisation."""
        act = self._modules.get("act")
        return input if act is None else act(input)


@dataclass(frozen=True)
class Group:
    """One run of modules, named by the attributes of the module that owns them.

    Attributes:
        operation: The operation of :mod:`fused_resnet.ops` that runs it; empty when none does.
        reason: Why no operation runs it; empty when one does.
        conv: The convolution; empty when it is not part of the group.
        bn: The batch norm; empty when it is not part of the group.
            Both may be paths into the owner's children.
        pool: The max-pool, when it is part of the group.
        relu: Whether the operation applies ReLU.
        length: How many modules of a chain the group covers.
        foldable: Whether the batch norm may be folded into the convolution: neither is called for
            anything else.
    """

    operation: str
    reason: str = ""
    conv: str = ""
    bn: str = ""
    pool: str = ""
    relu: bool = False
    length: int = 1
    foldable: bool = True

    @property
    def path(self) -> str:
        """The attribute that stands for the group in a report."""
        return self.conv or self.bn


# What a module is


def kind(module: nn.Module) -> type[nn.Module]:
    """The class that a module was built as, whatever this package has mixed into it since."""
    cls = type(module)
    return getattr(cls, "fused_resnet_base", cls)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs anything besides its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_conv(conv: nn.Module) -> str:
    """Why the operations cannot stand for this convolution; empty when they can."""
    if kind(conv) is not nn.Conv2d:
        return f"{kind(conv).__name__} is not a plain Conv2d"
    if hooked(conv):
        return "a hook or a replaced forward on the Conv2d"
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if padding_of(conv) is None:
        return "padding='same' with an even kernel pads one side more than the other"
    return ""


def why_not_norm(bn: nn.Module) -> str:
    """Why the operations cannot stand for this normalisation; empty when they can."""
    cls = kind(bn)
    if cls is not nn.BatchNorm2d and not is_known_norm(cls):
        return f"{cls.__name__} is not a plain BatchNorm2d"
    if hooked(bn):
        return f"a hook or a replaced forward on the {cls.__name__}"
    if has_activation(cls) and (kind(bn.drop) is not nn.Identity or hooked(bn.drop)):  # type: ignore[arg-type]
        return f"{kind(bn.drop).__name__} inside the {cls.__name__}"  # type: ignore[arg-type]
    return ""


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm, of whatever class, known here or not."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_known_norm(kind(module))


# By name: these libraries are optional, and only an imported one can have made an instance.


def is_known_norm(cls: type[nn.Module]) -> bool:
    """Whether instances are batch norms that the operations can stand for."""
    return cls is nn.BatchNorm2d or has_activation(cls) or _is_frozen_batch_norm(cls)


def has_activation(cls: type[nn.Module]) -> bool:
    """Whether instances are timm's batch norms with children ``drop`` and ``act`` behind them."""
    named = cls.__name__ in ("BatchNormAct2d", "FrozenBatchNormAct2d")
    return named and cls.__module__ == "timm.layers.norm_act"


def _is_frozen_batch_norm(cls: type[nn.Module]) -> bool:
    if not cls.__name__.endswith("FrozenBatchNorm2d"):
        return False
    # Transformers copies the class into each detection model; all have an eps of 1e-5.
    home = cls.__module__
    return home == "torchvision.ops.misc" or home.startswith("transformers.models.")


def eps_of(bn: nn.Module) -> float:
    """What is added to the variance; frozen batch norms of transformers do not keep it."""
    return getattr(bn, "eps", 1e-5)


def inner_activation(bn: nn.Module) -> nn.Module | None:
    """The activation that is part of a normalisation; None for none."""
    cls = kind(bn)
    if cls is nn.BatchNorm2d or not (cls is Folded or has_activation(cls)):
        return None
    act = bn._modules.get("act")
    return None if act is None or (kind(act) is nn.Identity and not hooked(act)) else act


def is_relu(act: nn.Module | None) -> bool:
    """Whether the module is a ReLU and nothing else."""
    return act is not None and kind(act) is nn.ReLU and not hooked(act)


def is_max_pool(pool: nn.Module) -> bool:
    """Whether the module is a max-pool that :func:`ops.conv_bn_relu_maxpool` can stand for."""
    return (
        isinstance(pool, nn.MaxPool2d)
        and kind(pool) is nn.MaxPool2d
        and not hooked(pool)
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros on each side as a pair; None when the two sides differ."""
    if not isinstance(conv.padding, str):
        return conv.padding[0], conv.padding[1]
    if conv.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)


# Running a group


def apart(x: Any) -> bool:
    """Whether all modules must be called one by one: someone watches every call, or only traces.

    A ``torch.fx`` trace then records the modules that the unfused network has.
    """
    return _has_any_global_hook() or isinstance(x, Proxy)


def conv_bn(
    conv: nn.Module,
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Callable[[Tensor, Tensor], Tensor] = operator.iadd,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` with as much of it in one operation as can be proved equal.

    Args:
        conv: The convolution, or what :func:`fused_resnet.freeze` put in its place.
        bn: The normalisation.
        act: The activation; None for none. Any module will do, ReLU is fused.
        x: ``(N, C, H, W)``.
        residual: Shape of the result; None for none.
        add: How the modules' owner adds the residual: in place like torchvision, where the result
            keeps the dtype of the batch norm's, or not.

    Returns:
        What calling the modules in turn returns, up to rounding.
    """
    if isinstance(conv, Packed):
        return _packed(conv, bn, act, x, residual, add)
    if why_not_norm(bn) or apart(x):
        return _one_by_one(bn, act, conv(x), residual, add)
    if why_not_conv(conv):
        return norm_add_act(bn, act, conv(x), residual, add)
    assert isinstance(conv, nn.Conv2d)
    inner = inner_activation(bn)
    if inner is not None:
        if residual is not None or act is not None:
            return _one_by_one(bn, act, conv(x), residual, add)
        act = inner
    relu = is_relu(act)
    if residual is not None and not _fits(conv, x, residual):
        return _one_by_one(bn, act, conv(x), residual, add)
    y = _conv_bn_add_relu(conv, bn, x, residual, relu)
    return y if relu or act is None else act(y)


def _packed(
    conv: Packed,
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None,
    add: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    inner = inner_activation(bn)
    act = act if inner is None else inner
    relu = is_relu(act)
    if residual is not None and not _fits(conv, x, residual):
        y = add(conv(x, None, False), residual)
        return y if act is None else act(y)
    y = conv(x, residual, relu)
    return y if relu or act is None else act(y)


def norm_add_act(
    bn: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    add: Callable[[Tensor, Tensor], Tensor] = operator.iadd,
) -> Tensor:
    """``act(bn(x) [+ residual])``, as :func:`conv_bn` without the convolution."""
    inner = inner_activation(bn)
    alone = bool(why_not_norm(bn)) or apart(x) or x.dim() != 4
    if inner is not None:
        alone = alone or residual is not None or act is not None
        act = act if alone else inner
    if residual is not None and not alone:
        alone = residual.shape != x.shape or residual.dtype != x.dtype
    if alone:
        return _one_by_one(bn, act, x, residual, add)
    relu = is_relu(act)
    y = _bn_add_relu(bn, x, residual, relu)
    return y if relu or act is None else act(y)


def _one_by_one(
    bn: nn.Module,
    act: nn.Module | None,
    z: Tensor,
    residual: Tensor | None,
    add: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    y: Tensor = bn(z)
    if residual is not None:
        y = add(y, residual)
    return y if act is None else act(y)


def _fits(conv: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether the residual has the shape and dtype of the convolution's result.

    An add in PyTorch broadcasts and promotes; the operations do neither.
    """
    device = x.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    padding = padding_of(conv)
    if residual.dtype is not dtype or x.dim() != 4 or residual.dim() != 4 or padding is None:
        return False
    return (
        residual.shape[0] == x.shape[0]
        and residual.shape[1] == conv.out_channels
        and residual.shape[2] == _window(conv, x, padding, 0)
        and residual.shape[3] == _window(conv, x, padding, 1)
    )


def _window(conv: Any, x: Tensor, padding: tuple[int, int], axis: int) -> int:
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    return (x.shape[axis + 2] + 2 * padding[axis] - reach) // conv.stride[axis] + 1


def _norm_arguments(bn: Any) -> dict[str, Any]:
    """What an operation needs to know of a batch norm; counts the call as PyTorch counts it.

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
    if not isinstance(bn, nn.BatchNorm2d):  # a FrozenBatchNorm2d has no mode
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


def _bn_add_relu(bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return ops.bn_add_relu(x, residual=residual, relu=relu, **_norm_arguments(bn))


def _conv_bn_add_relu(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return ops.conv_bn_add_relu(
        x,
        conv.weight,
        residual=residual,
        relu=relu,
        **_conv_arguments(conv),
        **_norm_arguments(bn),
    )


def _conv_bn_relu_maxpool(conv: nn.Conv2d, bn: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    return ops.conv_bn_relu_maxpool(
        x,
        conv.weight,
        pool_kernel=pool.kernel_size,  # type: ignore[arg-type]
        pool_stride=pool.stride,  # type: ignore[arg-type]
        pool_padding=pool.padding,  # type: ignore[arg-type]
        **_conv_arguments(conv),
        **_norm_arguments(bn),
    )


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "conv_bias": conv.bias,
        "stride": conv.stride,
        "padding": padding_of(conv),
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def bn_add_relu(bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(bn(x) [+ residual])`` with the parameters, statistics and mode of ``bn``.

    Args:
        bn: Its class and hooks are not looked at: the caller is the module.
        x: ``(N, C, H, W)``.
        residual: Shape and dtype of ``x``; None for none.
    """
    return _bn_add_relu(bn, x, residual, True)


# Chains: modules called one after another, each with the result of the one before


def match(modules: Sequence[nn.Module], start: int) -> tuple[str, int]:
    """The operation that runs the chain from ``start`` on, and how many modules it covers.

    Returns:
        The name of an operation of :mod:`fused_resnet.ops` and a length, or ``("", 1)`` when the
        module is to be called.
    """
    has_conv = not why_not_conv(modules[start])
    end = start + 2 if has_conv else start + 1
    if end > len(modules) or why_not_norm(modules[end - 1]):
        return "", 1
    inner = inner_activation(modules[end - 1])
    if inner is not None and not is_relu(inner):
        return "", 1
    relu = inner is not None
    if not relu and end < len(modules) and is_relu(modules[end]):
        relu = True
        end += 1
    if not has_conv:
        # A batch norm alone is PyTorch's: there is nothing to fuse it with.
        return ("bn_add_relu", end - start) if relu else ("", 1)
    if relu and end < len(modules) and is_max_pool(modules[end]):
        return "conv_bn_relu_maxpool", end + 1 - start
    return "conv_bn_add_relu", end - start


def chain(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Call modules one after another, with the runs that an operation stands for as that operation.

    Args:
        modules: In the order of their calls.
        x: The input of the first.
    """
    members = list(modules)
    if apart(x):
        for module in members:
            x = module(x)
        return x
    at = 0
    while at < len(members):
        first = members[at]
        if isinstance(first, Packed):
            x, at = _packed_run(first, members, at, x)
            continue
        operation, length = match(members, at)
        if not operation:
            x = first(x)
        elif operation == "bn_add_relu":
            x = _bn_add_relu(first, x, None, True)
        elif operation == "conv_bn_relu_maxpool":
            assert isinstance(first, nn.Conv2d)
            pool = members[at + length - 1]
            x = _conv_bn_relu_maxpool(first, members[at + 1], pool, x)
        else:
            assert isinstance(first, nn.Conv2d)
            relu = length == 3 or inner_activation(members[at + 1]) is not None
            x = _conv_bn_add_relu(first, members[at + 1], x, None, relu)
        at += length
    return x


def _packed_run(
    conv: Packed, members: Sequence[nn.Module], at: int, x: Tensor
) -> tuple[Tensor, int]:
    """Run what was frozen, and go to the module behind it."""
    end = at + 2
    if conv.operation == "conv_bn_relu_maxpool" and at + conv.span <= len(members):
        return conv(x, None, True, True), at + conv.span
    act = members[end] if end < len(members) and is_relu(members[end]) else None
    y = _packed(conv, members[at + 1], act, x, None, operator.iadd)
    return y, end if act is None else end + 1


def chain_groups(modules: Mapping[str, nn.Module]) -> list[Group]:
    """The groups that :func:`chain` finds, and the batch norms that it leaves, with the reason.

    Args:
        modules: By the attribute of their owner, in the order of their calls.
    """
    names, members = list(modules), list(modules.values())
    groups: list[Group] = []
    at = 0
    while at < len(members):
        first = members[at]
        if isinstance(first, Packed):
            groups.append(Group(first.operation, conv=names[at], length=first.span))
            at += first.span
            continue
        operation, length = match(members, at)
        run = names[at : at + length]
        if operation == "bn_add_relu":
            if at and isinstance(members[at - 1], nn.Conv2d):
                groups.append(Group("", why_not_conv(members[at - 1]), conv=names[at - 1]))
            groups.append(Group(operation, bn=run[0], relu=True, length=length))
        elif operation:
            pool = run[-1] if operation == "conv_bn_relu_maxpool" else ""
            relu = length > 2 or inner_activation(members[at + 1]) is not None
            groups.append(Group(operation, "", run[0], run[1], pool, relu, length))
        elif is_norm(first) and not isinstance(first, Route):
            groups.append(Group("", _why_left_alone(members, at), bn=run[0]))
        at += length
    return groups


def _why_left_alone(members: Sequence[nn.Module], at: int) -> str:
    before = why_not_conv(members[at - 1]) if at else "it is the first of its chain"
    return why_not_norm(members[at]) or f"no ReLU behind it, and before it: {before}"


# Residual blocks


def basic_block(m: Any, x: Tensor) -> Tensor:
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)``, with torchvision's children.

    Args:
        m: Has ``conv1``, ``bn1``, ``conv2``, ``bn2``, ``relu`` and ``downsample`` (or None).
        x: ``(N, C, H, W)``.

    Source:
        He et al., 2015, figure 5 left; ``torchvision.models.resnet.BasicBlock.forward``.
    """
    y = conv_bn(m.conv1, m.bn1, m.relu, x)
    identity = x if m.downsample is None else m.downsample(x)
    return conv_bn(m.conv2, m.bn2, m.relu, y, identity)


def bottleneck(m: Any, x: Tensor) -> Tensor:
    """The block of three convolutions, with torchvision's children.

    Args:
        m: Has ``conv1`` to ``conv3``, ``bn1`` to ``bn3``, ``relu`` and ``downsample`` (or None).
        x: ``(N, C, H, W)``.

    Source:
        He et al., 2015, figure 5 right; ``torchvision.models.resnet.Bottleneck.forward``.
    """
    y = conv_bn(m.conv1, m.bn1, m.relu, x)
    y = conv_bn(m.conv2, m.bn2, m.relu, y)
    identity = x if m.downsample is None else m.downsample(x)
    return conv_bn(m.conv3, m.bn3, m.relu, y, identity)


def block_groups(m: nn.Module, count: int) -> list[Group]:
    """The groups of a residual block with ``conv1``, ``bn1`` to ``conv<count>``, ``bn<count>``."""
    groups: list[Group] = []
    relu: nn.Module = m.relu  # type: ignore[assignment]
    for i in range(1, count + 1):
        groups += conv_bn_groups(m, f"conv{i}", f"bn{i}", relu)
    if isinstance(relu, nn.ReLU) and hooked(relu):
        groups.append(Group("", "a hook or a replaced forward on the ReLU", "relu"))
    return groups


def conv_bn_groups(m: nn.Module, conv: str, bn: str, act: nn.Module | None) -> list[Group]:
    """What :func:`conv_bn` does with the children of ``m`` of these names."""
    packed = getattr(m, conv)
    if isinstance(packed, Packed):
        return [Group(packed.operation, conv=conv)]
    reason = why_not_norm(getattr(m, bn))
    if reason:
        return [Group("", reason, conv, bn)]
    reason = why_not_conv(getattr(m, conv))
    if reason:
        return [Group("bn_add_relu", bn=bn, relu=is_relu(act)), Group("", reason, conv)]
    if inner_activation(getattr(m, bn)) is not None:
        return [Group("", "an activation inside the batch norm, and one behind it", conv, bn)]
    return [Group("conv_bn_add_relu", "", conv, bn, relu=is_relu(act))]


# Routes


class Route(nn.Module):
    """A module whose forward runs groups as operations."""

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for this, and would else complain of the first type it doesn't know.
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} has a forward that only Python runs; use "
            "torch.export or torch.jit.trace, or script the model that fuse() or freeze() was given"
        )

    def fused_groups(self) -> list[Group]:
        """The groups among the module's own children, as the next call will run them."""
        raise NotImplementedError

    def covered(self) -> list[nn.Module]:
        """Modules below whose forward runs as part of this one, their groups among its own."""
        return []

    def whole_block(self) -> WholeBlock | None:
        """The residual block that a call with one tensor is now; None where it is something else.

        Whether there is an operation for its convolutions is for the caller to see.
        """
        return None


#: Of a shortcut that is the identity or a convolution, see :attr:`WholeBlock.padding`.
NO_PADDING = (0, 1)


@dataclass(frozen=True)
class WholeBlock:
    """A residual block by its modules: convolutions in a row, a shortcut, and nothing else.

    Attributes:
        convs: The block's own two or three in order, and then the shortcut's, if it has one.
        norms: What stands behind each.
        acts: What stands behind those of the block's own, the last one's behind the addition; None
            where that is in the normalisation.
        members: All modules on which this depends.
        reads: Whether the attributes of the block on which it depends are as they were; None for
            none.
        padding: Of a shortcut without parameters: channels of zeros on each side, and its stride.
    """

    convs: list[nn.Module]
    norms: list[nn.Module]
    acts: list[nn.Module | None]
    members: list[nn.Module]
    reads: Callable[[nn.Module], bool] | None = None
    padding: tuple[int, int] = NO_PADDING


def block_with(
    m: Any,
    count: int,
    shortcut: nn.Module | None,
    reads: Callable[[nn.Module], bool] | None = None,
) -> WholeBlock | None:
    """The block with ``conv1``, ``bn1`` to ``conv<count>``, ``bn<count>`` and one ``relu``.

    Args:
        m: The block.
        count: Of its own convolutions.
        shortcut: A chain of a convolution and a batch norm, or of nothing; None for the identity.
        reads: See :class:`WholeBlock`.
    """
    convs = [getattr(m, f"conv{i}") for i in range(1, count + 1)]
    norms = [getattr(m, f"bn{i}") for i in range(1, count + 1)]
    members: list[nn.Module] = [m.relu, *convs]
    if shortcut is not None:
        forward = kind(shortcut).forward
        chained = forward is nn.Sequential.forward or forward is ChainRoute.forward
        if not chained or len(shortcut._modules) not in (0, 2):
            return None
        chain_of: list[Any] = list(shortcut._modules.values())
        convs += chain_of[:1]
        norms += chain_of[1:]
        members += [shortcut, *chain_of]
    return WholeBlock(convs, norms, [m.relu] * count, members, reads)


class BasicBlockRoute(Route):
    """:func:`basic_block` as a forward."""

    def forward(self, x: Tensor) -> Tensor:
        """See :func:`basic_block`."""
        return basic_block(self, x)

    def fused_groups(self) -> list[Group]:
        """See :meth:`Route.fused_groups`."""
        return block_groups(self, 2)

    def whole_block(self) -> WholeBlock | None:
        """See :meth:`Route.whole_block`."""
        return block_with(self, 2, self.downsample)  # type: ignore[arg-type]


class BottleneckRoute(Route):
    """:func:`bottleneck` as a forward."""

    def forward(self, x: Tensor) -> Tensor:
        """See :func:`bottleneck`."""
        return bottleneck(self, x)

    def fused_groups(self) -> list[Group]:
        """See :meth:`Route.fused_groups`."""
        return block_groups(self, 3)

    def whole_block(self) -> WholeBlock | None:
        """See :meth:`Route.whole_block`."""
        return block_with(self, 3, self.downsample)  # type: ignore[arg-type]


class ResNetRoute(Route):
    """A ResNet with torchvision's children: the stem as a chain, the rest as it is."""

    def _early_stages(self, x: Tensor) -> Tensor:
        """The stem and all stages but the last two, whose weights outweigh their maps."""
        m: Any = self
        x = chain((m.conv1, m.bn1, m.relu, m.maxpool), x)
        return m.layer2(m.layer1(x))

    def _forward_impl(self, x: Tensor) -> Tensor:
        m: Any = self
        x = m.layer4(m.layer3(self._early_stages(x)))
        return m.fc(torch.flatten(m.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        return self._forward_impl(x)

    def fused_groups(self) -> list[Group]:
        """See :meth:`Route.fused_groups`."""
        return chain_groups({n: getattr(self, n) for n in ("conv1", "bn1", "relu", "maxpool")})


class ChainRoute(Route):
    """An ``nn.Sequential`` as a :func:`chain`."""

    def forward(self, input: Tensor) -> Tensor:
        """See :func:`chain`; the argument has the name that ``nn.Sequential`` gives it."""
        return chain(self._modules.values(), input)  # type: ignore[arg-type]

    def fused_groups(self) -> list[Group]:
        """See :meth:`Route.fused_groups`."""
        return chain_groups(self._modules)  # type: ignore[arg-type]
