"""A forward that calls stages one after another: where the last two of them begin."""

from __future__ import annotations

from torch import fx, nn

from ...nn.module_kinds import is_norm
from .matching import Matches


def early_stages(
    module: nn.Module, graph: fx.Graph, matches: Matches, tensors: set[str]
) -> tuple[fx.Node, list[str], fx.Node] | None:
    """The row of calls from the input up to the last two stages, whose weights outweigh their maps.

    A stage is a child with batch norms below. Every call of the row takes the result of the one
    before, which nobody else reads.

    Args:
        module: Whose graph it is.
        graph: Of the module.
        matches: The groups in it.
        tensors: The arguments that are tensors.

    Returns:
        The node of the result, the paths of all modules that are called until then, and the input;
        None where there are no three stages.
    """
    first = {match.members[0]: match for match in matches.groups}
    image = next(iter(graph.nodes))
    at, paths = image, list[str]()
    stages: list[tuple[fx.Node, list[str]]] = []
    while len(at.users) == 1:
        node = next(iter(at.users))
        match = first.get(node)
        if match is not None and match.source is at and match.residual is None:
            members, end = match.members, match.members[-1]
        elif node.op == "call_module" and node.args == (at,) and not node.kwargs:
            members, end = [node], node
        else:
            break
        if match is None and _is_stage(module.get_submodule(str(node.target))):
            stages.append((at, list(paths)))
        paths += [str(member.target) for member in members if member.op == "call_module"]
        at = end
    if image.target not in tensors or len(stages) < 3:
        return None
    return (*stages[-2], image)


def _is_stage(child: nn.Module) -> bool:
    return not is_norm(child) and any(map(is_norm, child.modules()))
