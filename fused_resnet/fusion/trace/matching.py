"""The groups in a graph: which nodes one operation may stand for.

A group runs where its last node was, so its convolution and batch norm are moved behind what came
between. That is done only where every result inside the group has one reader, and where nothing in
between writes to what the group reads or calls a module of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ...nn.module_kinds import (
    inner_activation,
    is_fusible_norm_class,
    is_relu,
    norm_reason,
    original_class,
)
from .aliasing import Aliases
from .patterns import (
    addition,
    is_conv,
    is_identity,
    is_normalisation,
    is_pool,
    is_relu_function,
    is_relu_module,
)

#: Stands for the path of a ReLU that is a function.
FUNCTION = "<relu>"

#: Why a batch norm is left that no operation has a use for.
NOTHING_AROUND = "no convolution before it, and no ReLU or addition behind it"


@dataclass
class Match:
    """One group, by nodes.

    Attributes:
        source: What the group reads.
        bn: The normalisation.
        conv: The convolution before it; None for none.
        residual: The other side of the addition; None for none.
        in_place: Whether the addition was written to the batch norm's result.
        act: The path of the activation, :data:`FUNCTION`, or empty.
        pool: The max-pool; None for none.
        members: All nodes of the group, in order; the last one gives the result.
        identities: Paths of placeholder modules that are passed over.
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
    def worth(self) -> bool:
        """Whether there is anything to fuse the batch norm with."""
        return self.conv is not None or self.residual is not None or bool(self.act)


@dataclass
class Matches:
    """All groups of a graph, and the batch norms that are in none, with the reason."""

    groups: list[Match]
    left: list[tuple[str, str]]


def find(graph: fx.Graph, module: nn.Module, lists: frozenset[str] = frozenset()) -> Matches:
    """Match a graph.

    Args:
        graph: Of ``module``.
        module: Whose children the graph calls.
        lists: Names of the arguments that are lists.
    """
    aliases = Aliases(graph, module, lists)
    order = {node: index for index, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    found = Matches([], [])
    # The last batch norm first: of an addition's two sides it is the nearer one.
    for node in reversed(list(graph.nodes)):
        if not is_normalisation(module, node):
            continue
        for match in _candidates(module, node, taken):
            if match.worth and _movable(match, module, aliases, order):
                found.groups.append(match)
                taken.update(match.members)
                break
        else:
            found.left.append((str(node.target), _why_left(module, node)))
    found.groups.reverse()
    found.left.reverse()
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
        if before.conv is not None or is_relu(own):
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
    """The last of the placeholder modules behind a node, each with one reader; and all of them."""
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
        return None  # it writes to the other side, which somebody may keep
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
    if is_relu_module(module, node):
        act = str(node.target)
    elif is_relu_function(node):
        act = FUNCTION
    else:
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
    own = _held(module, [n for n in match.members if n.op == "call_module"])
    return not any(
        aliases.written(node) & read or (node.op == "call_module" and _held(module, [node]) & own)
        for node in between
    )


def _held(module: nn.Module, nodes: list[fx.Node]) -> set[int]:
    """Identities of the stateful modules, parameters and buffers that the nodes call upon."""
    held: set[int] = set()
    for node in nodes:
        child = module.get_submodule(str(node.target))
        held.update(id(m) for m in child.modules() if m._parameters or m._buffers)
        held.update(map(id, child.parameters()))
        held.update(map(id, child.buffers()))
    return held


def _why_left(module: nn.Module, bn: fx.Node) -> str:
    child = module.get_submodule(str(bn.target))
    why = norm_reason(child)
    if why:
        return why
    source: fx.Node = bn.args[0]  # type: ignore[assignment]
    if len(bn.users) != 1:
        return f"its result is used {len(bn.users)} times"
    if is_conv(module, source) and len(source.users) != 1:
        return f"the convolution's result is used {len(source.users)} times"
    if is_conv(module, source):
        return "something between the convolution and the end of the group may change its input"
    return NOTHING_AROUND
