"""Groups: which modules one operation runs, and why the others are not fused.

A *group* is a sequence of modules that one operation computes: convolution, batch norm, the
residual add and an activation, and a max-pool in the stem. What the modules of a group must be is
decided here only: the forwards of :mod:`.group_calls` act on it and :func:`fused_resnet.report`
shows it, so the two can't disagree. Decisions read the modules at every call and are not cached, so
they can't go stale. Which groups the graph of a traced forward has is found once, by
``fusion/trace/matching.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..backends.activation import Activation
from .module_kinds import (
    activation_of,
    activation_reason,
    conv_reason,
    inner_activation,
    is_hooked,
    is_max_pool,
    is_norm,
    norm_reason,
    original_class,
)
from .sync_batch_norm import group_of


class Decision(NamedTuple):
    """How a sequence of modules is computed.

    Attributes:
        operation: The operation of :mod:`fused_resnet.ops` that computes it; empty when the modules
            are called one by one.
        reason: Why the sequence, or the convolution before a ``bn_add_relu``, is not fused.
        activation: Activation that the operation applies.
        length: Number of modules that the operation replaces.
    """

    operation: str
    reason: str = ""
    activation: Activation = Activation.NONE
    length: int = 1


@dataclass(frozen=True)
class Group:
    """One group, named by the attributes of the module that owns its members.

    Attributes:
        operation: Operation of :mod:`fused_resnet.ops` that runs it; empty when none does.
        reason: Why no operation runs it; empty when one does.
        conv: The convolution; empty when it is not part of the group.
        bn: The batch norm; empty when it is not part of the group. ``conv`` and ``bn`` may also be
            paths of submodules further down.
        pool: The max-pool, when it is part of the group.
        activation: Activation that the operation applies.
        foldable: Whether the batch norm may be folded into the convolution, because no other group
            calls either of them.
    """

    operation: str
    reason: str = ""
    conv: str = ""
    bn: str = ""
    pool: str = ""
    activation: Activation = Activation.NONE
    foldable: bool = True

    @property
    def path(self) -> str:
        """The attribute that names the group in a report."""
        return self.conv or self.bn


# Decisions


def decide_conv_bn(
    conv: nn.Module, bn: nn.Module, act: nn.Module | None, adds: bool = False
) -> Decision:
    """How ``act(bn(conv(x)) [+ residual])`` is computed.

    Args:
        conv: The convolution.
        bn: The batch norm.
        act: The activation after it; None for none.
        adds: Whether a residual is added before the activation.

    Returns:
        ``conv_bn_add_relu`` for all of it; ``bn_add_relu`` where the convolution can't be fused and
        is called as a module; else no operation, and the reason.
    """
    decision = decide_norm(bn, act, adds)
    if not decision.operation:
        return decision
    reason = conv_reason(conv)
    if reason:
        return Decision("bn_add_relu", reason, decision.activation)
    return Decision("conv_bn_add_relu", "", decision.activation)


def decide_norm(bn: nn.Module, act: nn.Module | None, adds: bool = False) -> Decision:
    """How ``act(bn(x) [+ residual])`` is computed.

    Args:
        bn: The batch norm.
        act: The activation after it; None for none.
        adds: Whether a residual is added before the activation.

    Returns:
        ``bn_add_relu``, or no operation and the reason.
    """
    reason = norm_reason(bn)
    if reason:
        return Decision("", reason)
    inner = inner_activation(bn)
    if inner is None:
        return Decision("bn_add_relu", "", activation_of(act))
    if adds or act is not None:
        return Decision("", "an activation inside the batch norm, and another after it")
    return Decision("bn_add_relu", "", activation_of(inner))


def decide_run(members: Sequence[nn.Module], start: int) -> Decision:
    """The largest group that starts at one module of a sequence.

    Args:
        members: Modules in the order of their calls, each called with the result of the one before.
        start: Index of the group's first module.

    Returns:
        The operation and the number of modules that it replaces; no operation, and 1, when the
        module at ``start`` is called by itself.
    """
    first = members[start]
    unfused = conv_reason(first)
    end = start + 1 if unfused else start + 2
    if end > len(members) or norm_reason(members[end - 1]):
        return Decision("")
    inner = inner_activation(members[end - 1])
    activation = activation_of(inner)
    if inner is not None and not activation:
        return Decision("")
    if inner is None and end < len(members) and activation_of(members[end]):
        activation = activation_of(members[end])
        end += 1
    if unfused:
        # A batch norm without an activation has nothing to be fused with: PyTorch runs it.
        return Decision("bn_add_relu", "", activation, end - start) if activation else Decision("")
    if activation and end < len(members) and is_max_pool(members[end]):
        return Decision("conv_bn_relu_maxpool", "", activation, end + 1 - start)
    return Decision("conv_bn_add_relu", "", activation, end - start)


def decide_residual_block(
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    acts: Sequence[nn.Module | None],
    others: Sequence[nn.Module] = (),
) -> Decision:
    """How a residual block is computed in training, as far as its modules decide.

    Args:
        convs: The block's own convolutions in order, and then the shortcut's, if it has one.
        norms: The normalisation after each convolution.
        acts: The activation after each of the block's own convolutions, the last one's after the
            addition; None where it is inside the normalisation.
        others: Further modules that the block calls.

    Returns:
        ``residual_block`` for forward and backward of the whole block; else no operation, and the
        reason why its groups run one by one.
    """
    for module in others:
        if is_hooked(module):
            return Decision("", f"a hook or a replaced forward on the {_name(module)}")
    activation = Activation.NONE
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        reason = conv_reason(conv) or ("" if group_of(norm) else norm_reason(norm))
        if not reason and conv.bias is not None:
            reason = "a Conv2d with a bias"
        if reason:
            return Decision("", reason)
        inner = inner_activation(norm)
        last = i >= len(acts) - 1  # the last one's activation is after the addition
        act = acts[i] if i < len(acts) else None
        if inner is not None and (last or act is not None):
            return Decision("", "an activation inside the batch norm in front of the addition")
        if i >= len(acts):
            continue
        kind = act if inner is None else inner
        if not activation_of(kind):
            if kind is not None and is_hooked(kind):
                return Decision("", f"a hook or a replaced forward on the {_name(kind)}")
            return Decision("", f"its activation is {'missing' if kind is None else _name(kind)}")
        if i and activation_of(kind) is not activation:
            return Decision("", "its activations are not the same")
        activation = activation_of(kind)
    return Decision("residual_block", "", activation)


def _name(module: nn.Module) -> str:
    return original_class(module).__name__


# The groups that follow from the decisions, by name


def conv_bn_groups(owner: nn.Module, conv: str, bn: str, act: nn.Module | None) -> list[Group]:
    """The groups of ``act(bn(conv(x)))``.

    Args:
        owner: The module that has the convolution and the batch norm as attributes.
        conv: Attribute of the convolution.
        bn: Attribute of the batch norm.
        act: The activation; None for none.
    """
    decision = decide_conv_bn(getattr(owner, conv), getattr(owner, bn), act)
    if not decision.operation:
        return [Group("", decision.reason, conv, bn)]
    if decision.reason:
        return [
            Group("bn_add_relu", bn=bn, activation=decision.activation),
            Group("", decision.reason, conv),
        ]
    return [Group(decision.operation, "", conv, bn, activation=decision.activation)]


def residual_block_groups(block: nn.Module, count: int) -> list[Group]:
    """The groups of a block whose children are named as in torchvision.

    Args:
        block: Has ``conv1``, ``bn1`` to ``conv<count>``, ``bn<count>`` and ``relu``.
        count: Number of convolutions of the main branch.
    """
    groups: list[Group] = []
    relu: nn.Module = block.relu  # type: ignore[assignment]
    for i in range(1, count + 1):
        groups += conv_bn_groups(block, f"conv{i}", f"bn{i}", relu)
    called = called_activation_group(relu, "relu")
    return groups if called is None else [*groups, called]


def called_activation_group(act: nn.Module | None, name: str) -> Group | None:
    """An activation that is called as a module, because of a hook for example, as a group.

    Args:
        act: The activation; None for none.
        name: Attribute or path of the activation.
    """
    reason = "" if act is None else activation_reason(act)
    return Group("", reason, name) if reason else None


def sequence_groups(modules: Mapping[str, nn.Module]) -> list[Group]:
    """The groups of modules that are called one after another, and the batch norms in none.

    Args:
        modules: The modules by the attribute of their owner, in the order of their calls.
    """
    return list(_sequence_groups(list(modules), list(modules.values())))


def _sequence_groups(names: Sequence[str], members: Sequence[nn.Module]) -> Iterator[Group]:
    at = 0
    while at < len(members):
        first = members[at]
        decision = decide_run(members, at)
        length = decision.length
        if decision.operation == "bn_add_relu":
            if at and isinstance(members[at - 1], nn.Conv2d):
                yield Group("", conv_reason(members[at - 1]), conv=names[at - 1])
            yield Group("bn_add_relu", bn=names[at], activation=decision.activation)
        elif decision.operation:
            has_pool = decision.operation == "conv_bn_relu_maxpool"
            pool = names[at + length - 1] if has_pool else ""
            conv, bn = names[at : at + 2]
            yield Group(decision.operation, "", conv, bn, pool, decision.activation)
        elif is_norm(first):
            yield Group("", _unfused_norm_reason(members, at), bn=names[at])
        elif at and is_norm(members[at - 1]) and activation_reason(first):
            yield Group("", activation_reason(first), names[at])
        at += length


def _unfused_norm_reason(members: Sequence[nn.Module], at: int) -> str:
    before = conv_reason(members[at - 1]) if at else "it is the first of its sequence"
    return norm_reason(members[at]) or f"no ReLU after it, and before it: {before}"
