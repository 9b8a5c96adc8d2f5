"""Finds the groups of a graph: nodes that one operation can replace.

A group runs at the position of its last node, so its convolution and batch norm move after the
nodes in between. That is allowed only where every result inside the group has a single reader, and
where no node in between writes to the group's inputs or calls one of its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import (
    activation_of,
    inner_activation,
    is_fusible_norm_class,
    norm_reason,
    original_class,
)
from .aliasing import Aliases
from .patterns import (
    activation_path,
    addition,
    is_conv,
    is_identity,
    is_normalisation,
    is_pool,
)

#: The reason of a batch norm that has nothing to be fused with.
NOTHING_AROUND = "no convolution before it, and no ReLU or addition after it"


@dataclass
class Match:
    """One group, as nodes of a graph.

    Attributes:
        source: The input of the group.
        bn: The batch norm.
        conv: The convolution before it; None for none.
        residual: The other operand of the addition; None for no addition.
        in_place: Whether the addition overwrites the batch norm's result.
        act: Path of the activation; empty for none, one of :data:`.patterns.FUNCTION_PATHS` for a
            function.
        pool: The max-pool; None for none.
        members: All nodes of the group, in order; the last one is the result.
        identities: Paths of the ``nn.Identity`` modules between them.
    """

    source: fx.Node
    bn: fx.Node
    conv: fx.Node | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    act: str = ""
    pool: fx.Node | None = None
    members: list[fx.Node] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)

    @property
    def is_useful(self) -> bool:
        """Whether the group has more than the batch norm."""
        return self.conv is not None or self.residual is not None or bool(self.act)


@dataclass
class Matches:
    """The groups of a graph.

    Attributes:
        groups: The groups, in the order of their batch norms.
        unfused: ``(path, reason)`` of the batch norms that are in no group.
    """

    groups: list[Match]
    unfused: list[tuple[str, str]]


def find(graph: fx.Graph, module: nn.Module, lists: frozenset[str] = frozenset()) -> Matches:
    """Find the groups of a graph.

    Args:
        graph: The graph of a forward.
        module: The module that the forward belongs to.
        lists: Names of the arguments that are lists.
    """
    aliases = Aliases(graph, module, lists)
    order = {node: index for index, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    found = Matches([], [])
    # Last batch norm first: where both operands of an addition are batch norms, the later one is
    # closer to the addition and has fewer nodes to move after.
    for node in reversed(list(graph.nodes)):
        if not is_normalisation(module, node):
            continue
        for match in _candidates(module, node, taken):
            if match.is_useful and _movable(match, module, aliases, order):
                found.groups.append(match)
                taken.update(match.members)
                break
        else:
            found.unfused.append((str(node.target), _unfused_reason(module, node)))
    found.groups.reverse()
    found.unfused.reverse()
    return found


def _candidates(module: nn.Module, bn: fx.Node, taken: set[fx.Node]) -> Iterator[Match]:
    """Groups around a batch norm, the largest first."""
    child = module.get_submodule(str(bn.target))
    if not is_fusible_norm_class(original_class(child)):
        return
    before = Match(bn.args[0], bn, members=[bn])  # type: ignore[arg-type]
    _add_convolution(module, before)
    own = inner_activation(child)
    if own is not None:
        if before.conv is not None or activation_of(own):
            yield _copy(before, act=f"{bn.target}.act")
        return
    last, passed = _follow(module, bn)
    with_add = _with_addition(module, before, last, passed, taken)
    if with_add is not None:
        yield _with_activation(module, with_add)
        yield with_add
    activated = _with_activation(module, before)
    if activated.act:
        pooled = _with_pool(module, activated)
        if pooled.pool is not None:
            yield pooled
        yield activated
    yield before


def _copy(match: Match, **changes: Any) -> Match:
    values: dict[str, Any] = {**vars(match), **changes}
    values["members"] = list(values["members"])
    values["identities"] = list(values["identities"])
    return Match(**values)


def _add_convolution(module: nn.Module, match: Match) -> None:
    node, passed = match.source, []
    while is_identity(module, node) and len(node.users) == 1:
        passed.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if is_conv(module, node) and len(node.users) == 1:
        match.conv, match.source = node, node.args[0]  # type: ignore[assignment]
        match.members = [node, *reversed(passed), *match.members]
        match.identities += [str(n.target) for n in passed]


def _follow(module: nn.Module, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The last of the identities after a node, each with one reader; and all of them."""
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_identity(module, user):
            break
        passed.append(user)
        node = user
    return node, passed


def _with_addition(
    module: nn.Module, match: Match, last: fx.Node, passed: list[fx.Node], taken: set[fx.Node]
) -> Match | None:
    if len(last.users) != 1:
        return None
    node = next(iter(last.users))
    sides = addition(node)
    if sides is None or node in taken:
        return None
    left, right, in_place = sides
    if in_place and left is not last:
        return None  # it overwrites the other operand, which may be used elsewhere
    other = right if left is last else left
    if other.op == "get_attr":
        return None
    return _copy(
        match,
        residual=other,
        in_place=in_place,
        members=[*match.members, *passed, node],
        identities=[*match.identities, *(str(n.target) for n in passed)],
    )


def _with_activation(module: nn.Module, match: Match) -> Match:
    last, passed = _follow(module, match.members[-1])
    if len(last.users) != 1:
        return match
    node = next(iter(last.users))
    act = activation_path(module, node)
    if not act:
        return match
    return _copy(
        match,
        act=act,
        members=[*match.members, *passed, node],
        identities=[*match.identities, *(str(n.target) for n in passed)],
    )


def _with_pool(module: nn.Module, match: Match) -> Match:
    last, passed = _follow(module, match.members[-1])
    if match.conv is None or len(last.users) != 1:
        return match
    node = next(iter(last.users))
    if not is_pool(module, node):
        return match
    return _copy(
        match,
        pool=node,
        members=[*match.members, *passed, node],
        identities=[*match.identities, *(str(n.target) for n in passed)],
    )


def _movable(match: Match, module: nn.Module, aliases: Aliases, order: dict[fx.Node, int]) -> bool:
    members = set(match.members)
    first, last = match.members[0], match.members[-1]
    between = [
        node
        for node, index in order.items()
        if order[first] < index < order[last] and node not in members
    ]
    if not between:
        return True
    read = aliases.of([match.source])
    if match.residual is not None:
        read |= aliases.of([match.residual])
    state = _state_of(module, [n for n in match.members if n.op == "call_module"])
    return not any(
        aliases.written(node) & read
        or (node.op == "call_module" and _state_of(module, [node]) & state)
        for node in between
    )


def _state_of(module: nn.Module, nodes: list[fx.Node]) -> set[int]:
    """The ids of the stateful modules, parameters and buffers of the modules that nodes call."""
    state: set[int] = set()
    for node in nodes:
        child = module.get_submodule(str(node.target))
        state.update(id(m) for m in child.modules() if m._parameters or m._buffers)
        state.update(map(id, child.parameters()))
        state.update(map(id, child.buffers()))
    return state


def _unfused_reason(module: nn.Module, bn: fx.Node) -> str:
    child = module.get_submodule(str(bn.target))
    reason = norm_reason(child)
    if reason:
        return reason
    source: fx.Node = bn.args[0]  # type: ignore[assignment]
    if len(bn.users) != 1:
        return f"its result is used {len(bn.users)} times"
    if is_conv(module, source) and len(source.users) != 1:
        return f"the convolution's result is used {len(source.users)} times"
    if is_conv(module, source):
        return "something between the convolution and the end of the group may change its input"
    return NOTHING_AROUND
