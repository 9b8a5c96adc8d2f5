"""How many of a network's batch norms run as part of a fused group, and why not the rest.

Every group has one batch norm, so batch norms are counted: the total does not depend on what the
matcher recognises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..fusion.fuse import fuse
from ..fusion.report import groups_of
from ..nn.module_kinds import is_norm


@dataclass(frozen=True)
class Coverage:
    """Counts of one network, or sums over several.

    Attributes:
        groups: Number of batch norms of any class.
        fused: Number of those that a fused operation runs.
        left: Numbers of the unfused ones by reason.
        operations: Numbers of fused groups by operation.
    """

    groups: int
    fused: int
    left: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The counts as a dictionary for JSON."""
        return dict(vars(self))


def count(model: nn.Module) -> Coverage:
    """Fuse a model and count its groups, as :func:`fused_resnet.report` lists them.

    Args:
        model: Any model, which is not changed. The counts are those of its current mode.
    """
    return count_fused(fuse(model))


def count_fused(model: nn.Module) -> Coverage:
    """Count the groups of a fused model.

    Args:
        model: A result of :func:`fused_resnet.fuse`.
    """
    norms = {path: module for path, module in model.named_modules() if is_norm(module)}
    fused: set[int] = set()
    reasons: dict[int, str] = {}
    whole: dict[str, str] = {}
    operations: Counter[str] = Counter()
    for path, group in groups_of(model):
        if group.operation:
            operations[group.operation] += 1
        if group.bn:
            norm = id(model.get_submodule(_join(path, group.bn)))
            if group.operation:
                fused.add(norm)
            else:
                reasons[norm] = group.reason
        elif not group.conv:
            whole[path] = group.reason
    left = Counter(
        reasons.get(id(norm)) or _reason_above(path, whole)
        for path, norm in norms.items()
        if id(norm) not in fused
    )
    return Coverage(len(norms), len(norms) - left.total(), dict(left), dict(operations))


def total(counts: Iterable[Coverage]) -> Coverage:
    """The sums over several networks.

    Args:
        counts: Counts of each network.
    """
    groups = fused = 0
    left: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for one in counts:
        groups += one.groups
        fused += one.fused
        left.update(one.left)
        operations.update(one.operations)
    return Coverage(groups, fused, dict(left.most_common()), dict(operations.most_common()))


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _reason_above(path: str, whole: dict[str, str]) -> str:
    """The reason of the nearest enclosing module that is unfused as a whole."""
    while path not in whole:
        if not path:
            return "the report does not name it"
        path = path.rpartition(".")[0]
    return whole[path]
