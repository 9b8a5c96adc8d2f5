"""``report``: what runs fused in a model, what does not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..nn.fused_forward import FusedForward
from ..nn.groups import Group
from ..nn.module_kinds import is_norm
from .fuse import decide_module
from .trace import Unfused, parents_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """The result of :func:`report`; prints as a table.

    Attributes:
        fused: ``(module path, operation)`` of every group that runs as one operation.
        left: ``(module path, reason)`` of every module that is not fused but might have been.
        blocks: ``(module path, reason)`` of every residual block in training mode, also with frozen
            batch norms; the reason is empty where forward and backward of the whole block are one
            operation, else it says why the block's groups run one by one.
        programs: ``(module path, number of steps)`` of every program of a frozen model, in the
            order of the modules that run them.
        graphs: Memory of each CUDA graph of a frozen model in bytes, by the shape and dtype of its
            input.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[tuple[str, str]] = field(default_factory=list)
    programs: list[tuple[str, int]] = field(default_factory=list)
    graphs: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """The number of groups that each operation runs."""
        return dict(Counter(operation for _, operation in self.fused))

    def summary(self) -> str:
        """The counts in one line."""
        kinds = ", ".join(f"{count} {operation}" for operation, count in self.counts.items())
        line = f"{len(self.fused)} groups fused{f' ({kinds})' if kinds else ''}"
        line += f", {len(self.left)} left"
        if self.blocks:
            whole = sum(not reason for _, reason in self.blocks)
            line += f"; {whole} of {len(self.blocks)} residual blocks train as one operation"
        if self.programs:
            count, steps = len(self.programs), sum(steps for _, steps in self.programs)
            line += f"; {count} program{'s' * (count > 1)} of {steps} steps"
        graphs = [f"{name} ({taken / 2**20:.1f} MiB)" for name, taken in self.graphs.items()]
        return line + (f"; CUDA graphs: {', '.join(graphs)}" if graphs else "")

    def __str__(self) -> str:
        rows = [("module", "fused as", "left because")]
        rows += [(path, operation, "") for path, operation in self.fused]
        rows += [(path, "", reason) for path, reason in self.left]
        rows += self._block_rows()
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{path:{widths[0]}}  {op:{widths[1]}}  {why}".rstrip() for path, op, why in rows]
        return "\n".join([*lines, self.summary()])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(caption=self.summary(), caption_justify="left")
        for header in ("module", "fused as", "left because"):
            table.add_column(header)
        for path, operation in self.fused:
            table.add_row(path, operation, "")
        for path, reason in self.left:
            table.add_row(path, "", reason)
        for row in self._block_rows():
            table.add_row(*row)
        return table

    def _block_rows(self) -> list[tuple[str, str, str]]:
        return [
            (path, "" if reason else "residual_block (training)", reason)
            for path, reason in self.blocks
        ]


def report(model: nn.Module) -> Report:
    """Which groups of a model run as fused operations, and why the others do not.

    Args:
        model: Any model; fused, frozen, built from this package's modules, or none of these.

    Returns:
        The report of the model's next call, which takes account of hooks added and modules replaced
        since :func:`fuse <fused_resnet.fuse>`.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model: expected a torch.nn.Module, got {type(model).__name__}")
    result = Report(graphs=_graphs_of(model))
    runs: dict[str, str] = {}  # operations of programs, by the path of their convolution
    for path, program in programs_of(model):
        result.programs.append((path or type(model).__name__, len(program.steps)))
        for step, name in zip(program.steps, program.modules, strict=True):
            runs[_join(path, name)] = _OPERATIONS.get(step.operation, "")
    for path, group in groups_of(model):
        name = _join(path, group.path)
        operation = runs.get(name) or group.operation
        name = name or type(model).__name__
        if operation:
            result.fused.append((name, operation))
        else:
            result.left.append((name, group.reason))
    for path, module in model.named_modules():
        decision = module.training_decision() if isinstance(module, FusedForward) else None
        if decision is not None:
            result.blocks.append((path or type(module).__name__, decision.reason))
    return result


def groups_of(model: nn.Module) -> Iterator[tuple[str, Group]]:
    """Every group of a model, fused or not, in the order of its modules.

    Args:
        model: Any model; fused, frozen, built from this package's modules, or none of these.

    Yields:
        The path of the module whose forward runs the group, and the group. A group without an
        operation has the reason; if it has no convolution and no batch norm either, it stands for
        the whole module.
    """
    reported: set[int] = set()
    inlined: set[int] = set()
    parents = parents_of(model)
    for path, module in model.named_modules():
        frozen = getattr(module, "fused_resnet_groups", None)  # which freeze() wrote down
        if frozen is not None:
            yield from ((path, group) for group in frozen)
            continue
        if id(module) in inlined:
            continue  # its own fused forward does not run
        if isinstance(module, FusedForward):
            inlined.update(map(id, module.inlined_modules()))
            for group in module.fused_groups():
                members = [module.get_submodule(name) for name in (group.conv, group.bn) if name]
                reported.update(map(id, members))
                yield path, group
            continue
        decision = decide_module(module, parents)
        if isinstance(decision, Unfused):
            for name, reason in decision.norms:
                reported.add(id(module.get_submodule(name)))
                yield path, Group("", reason, bn=name)
        elif decision is not None:
            reason = (
                decision if isinstance(decision, str) else "not fused: call fuse() on the model"
            )
            reported.update(map(id, module.children()))
            yield path, Group("", reason)
        elif is_norm(module) and id(module) not in reported:
            yield path, Group("", "no group around it that fuse() can prove")


#: The operations of a program's steps that have a convolution.
_OPERATIONS = {"conv": "conv_bn_add_relu", "conv_max_pool": "conv_bn_relu_maxpool"}


def programs_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The programs of a frozen model's largest modules that have a plan.

    Args:
        model: Any model.

    Yields:
        The path of the module that runs the program, and the program.
    """
    covered: list[str] = []
    called: list[str] = []
    for path, module in model.named_modules():
        plan = getattr(module, "fused_resnet_plan", None)
        if plan is None or -1 < _above(path, covered) >= _above(path, called):
            continue
        covered.append(path)
        calls = [item for item in plan.items if getattr(item, "kind", "") == "call_module"]
        called += [_join(path, call.target) for call in calls]
        yield from ((path, program) for program in plan.programs)


def _above(path: str, others: list[str]) -> int:
    """The length of the longest of these paths that is the path or leads to it; -1 for none."""
    above = [p for p in others if not p or f"{path}.".startswith(f"{p}.")]
    return max(map(len, above), default=-1)


def _graphs_of(model: nn.Module) -> dict[str, int]:
    memory = getattr(getattr(model, "cuda_graphs", None), "memory", None)  # of a frozen model
    return memory if isinstance(memory, dict) else {}


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
