"""A module whose whole forward is one residual block, whatever it is made of.

A block may call its convolutions itself, or children that do, or children of children. All of them
are traced with it, so that one graph has every operation of the block; if the groups found there
are a row of convolutions and a shortcut, and there is nothing in the graph besides them, then that
is what the module computes. What was assumed on the way is asked for at every call, as for any
trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from torch import fx, nn

from ...nn.module_kinds import is_norm
from .emitting import Block, Traced
from .errors import Untraceable
from .matching import Match, Matches, find
from .patterns import is_identity
from .tracing import TENSOR, Argument, Trace, trace

#: A block's own convolutions, with the one of a shortcut.
_CONVOLUTIONS = range(2, 5)


def trace_block(
    module: nn.Module, arguments: tuple[Argument, ...], may_enter: Callable[[nn.Module], bool]
) -> Traced | None:
    """A module's trace with all of its children, when it is a residual block.

    Args:
        module: Any.
        arguments: What is assumed of each of the forward's parameters.
        may_enter: Whether a child may be traced as part of the module.

    Returns:
        The trace, its groups and the block; None for a module that is no block.
    """
    if not _has_the_size_of_a_block(module) or not _takes_one_tensor(arguments):
        return None
    entered: frozenset[str] = frozenset()
    try:
        while True:
            result = trace(module, arguments, entered)
            called = [str(n.target) for n in result.graph.nodes if n.op == "call_module"]
            more = {
                path
                for path in called
                if called.count(path) == 1 and may_enter(module.get_submodule(path))
            }
            if not more - entered:
                break
            entered |= more
    except Untraceable:
        return None
    matches = find(result.graph, module)
    block = _block_of(module, result, matches)
    return None if block is None else Traced(result, matches, block)


def _has_the_size_of_a_block(module: nn.Module) -> bool:
    members = list(module.modules())
    convolutions = sum(isinstance(member, nn.Conv2d) for member in members)
    return convolutions in _CONVOLUTIONS and sum(map(is_norm, members)) == convolutions


def _takes_one_tensor(arguments: tuple[Argument, ...]) -> bool:
    """Whether the assumed call gives the first argument, a tensor, and no other."""
    return (
        bool(arguments)
        and arguments[0].given == TENSOR
        and not arguments[0].keyword_only
        and all(
            a.given != TENSOR and a.default is not inspect.Parameter.empty for a in arguments[1:]
        )
    )


def _block_of(module: nn.Module, result: Trace, matches: Matches) -> Block | None:
    nodes = list(result.graph.nodes)
    image, output = nodes[0], nodes[-1]
    if result.conditions or matches.left or not isinstance(output.args[0], fx.Node):
        return None
    ends = {match.members[-1]: match for match in matches.groups}
    known = {image, output, *(node for match in matches.groups for node in match.members)}
    identities: list[str] = []

    def behind(node: fx.Node) -> fx.Node:
        """What a node gives back through placeholder modules."""
        while is_identity(module, node):
            identities.append(str(node.target))
            known.add(node)
            node = node.args[0]  # type: ignore[assignment]
        return node

    last = ends.get(behind(output.args[0]))
    if last is None or last.residual is None or not _is_convolution(last, relu=True):
        return None
    if behind(last.source) is image:
        # The shortcut's batch norm is the later one, and the group of the addition is its.
        other = ends.get(behind(last.residual))
        if other is None or other.residual is not None or not _is_convolution(other, relu=False):
            return None
        groups, shortcut = [replace(other, act=last.act)], replace(last, act="")
    else:
        groups, shortcut = [last], None
    while (source := behind(groups[0].source)) is not image:
        match = ends.get(source)
        if match is None or match.residual is not None or not _is_convolution(match, relu=True):
            return None
        groups.insert(0, match)
    side = image if shortcut is not None else behind(last.residual)
    if side is not image:
        shortcut = ends.get(side)
        if shortcut is None or shortcut.residual is not None:
            return None
        if not _is_convolution(shortcut, relu=False) or behind(shortcut.source) is not image:
            return None
    found = len(groups) + (shortcut is not None)
    unused = {node for node in nodes if node.op == "placeholder" and not node.users}
    if len(groups) not in (2, 3) or found != len(matches.groups) or set(nodes) - known - unused:
        return None
    return Block(groups, shortcut, identities)


def _is_convolution(match: Match, *, relu: bool) -> bool:
    return match.conv is not None and match.pool is None and bool(match.act) is relu
