"""Networks that call stages one after another: everything before the last two stages.

In those stages the activations are larger than the weights, so a frozen model runs them in
micro-batches.
"""

from __future__ import annotations

from torch import fx, nn

from ...nn.module_kinds import is_norm
from .matching import Matches


def early_stages(
    module: nn.Module, graph: fx.Graph, matches: Matches, tensors: set[str]
) -> tuple[fx.Node, list[str], fx.Node] | None:
    """The sequence of calls from the input up to the last two stages.

    A stage is a child that contains batch norms. Every call of the sequence takes the result of the
    call before it and nothing else, and that result has no other reader.

    Args:
        module: The traced module.
        graph: The graph of its forward.
        matches: The groups of the graph.
        tensors: Names of the arguments that are tensors.

    Returns:
        The node of the result, the paths of all modules that are called up to it, and the node of
        the input; None where there are fewer than three stages.
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
