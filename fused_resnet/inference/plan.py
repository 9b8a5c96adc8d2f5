"""The plan of a frozen module: its programs, and what is called between them.

It refers to submodules by their paths and holds no tensor and no module, so copies and pickles have
it too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ..fusion.trace.errors import Untraceable
from ..ops.program_steps import Step
from .frozen_trace import FrozenGraph
from .lowering import LoweredGraph, lower
from .program import Program


class Slot(NamedTuple):
    """Stands for a value in the arguments of a call and in the result of a plan.

    Attributes:
        number: Number of the value.
    """

    number: int


class Run(NamedTuple):
    """A program.

    Attributes:
        program: Index of the program.
        input: The slot of its input.
        outputs: The slots of its outputs.
    """

    program: int
    input: int
    outputs: tuple[int, ...]


class Call(NamedTuple):
    """What is called between programs.

    Attributes:
        kind: ``call_module``, ``call_method``, ``get_attr`` or ``call_function``.
        target: A path, the name of a method, or the module and the name of a function.
        args: Positional arguments, with slots.
        kwargs: Keyword arguments, with slots.
        output: The slot of the result.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


@dataclass(frozen=True)
class Plan:
    """A forward as programs and calls.

    Attributes:
        names: Names of the arguments that are tensors; they come first.
        defaults: The values that its other arguments must have, by name.
        programs: The programs.
        items: Programs and calls, in the order in which they run.
        result: The result, with slots.
        conditions: Slots of conditions on shapes, and the truth values that they must have.
        size: Number of slots; the first ones are the tensors.
        dim: Number of dimensions that the first tensor must have; 0 for any.
        single: Whether the forward is one program with one result.
        channels: Channels that the first tensor must have; 0 for any.
    """

    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    programs: tuple[Program, ...]
    items: tuple[Run | Call, ...]
    result: Any
    conditions: tuple[tuple[int, bool], ...]
    size: int
    dim: int = 0
    single: bool = field(init=False)
    channels: int = field(init=False)

    def __post_init__(self) -> None:
        whole = len(self.items) == 1 and isinstance(self.items[0], Run)
        single = whole and self.result == Slot(1) and len(self.programs[0].outputs) == 1
        object.__setattr__(self, "single", single)
        first = self.items[0]
        begins = isinstance(first, Run) and first.input == 0
        object.__setattr__(self, "channels", self.programs[0].channels if begins else 0)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The tensors of a call; None if the plan is not for this call.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        given = dict(zip(self.parameters, args, strict=False))
        if len(args) > len(self.parameters) or given.keys() & kwargs.keys():
            return None
        given |= kwargs
        tensors = tuple(given.pop(name, None) for name in self.names)
        known = dict(self.defaults)
        if not all(isinstance(t, Tensor) for t in tensors) or not given.keys() <= known.keys():
            return None
        same = all(v is known[k] or (type(v) is bool and v == known[k]) for k, v in given.items())
        return tensors if same else None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the forward's parameters, in order."""
        return (*self.names, *(name for name, _ in self.defaults))


def plan_of_step(step: Step, dim: int) -> Plan:
    """The plan of a module that is one step.

    Args:
        step: It reads value 0.
        dim: Number of dimensions that its input must have.
    """
    program = Program((step,), ("",), (1,))
    items = (Run(0, 0, (1,)),)
    return Plan(("x",), (), (program,), items, Slot(1), (), 2, dim)


def plan_of(module: nn.Module, traced: FrozenGraph) -> Plan | None:
    """The plan of a module; None where nothing of it is a program.

    Args:
        module: The module.
        traced: Graph of the forward.

    Raises:
        Untraceable: What is called cannot be written down.
    """
    lowered = lower(module, traced.graph)
    if not lowered.segments:
        return None
    return _Planner(traced, lowered).plan()


class _Planner:
    def __init__(self, traced: FrozenGraph, lowered: LoweredGraph) -> None:
        self.traced, self.lowered = traced, lowered
        self.slots: dict[fx.Node, int] = {}
        self.items: list[Run | Call] = []
        self.programs: list[Program] = []

    def plan(self) -> Plan:
        conditions = dict(self.traced.conditions)
        result: Any = None
        tensors = [node for node in self.traced.graph.nodes if node.op == "placeholder"]
        self.slots = {node: i for i, node in enumerate(tensors)}
        for node in tensors:
            self._run(node)
        for node in self.lowered.remaining:
            if node.op == "output":
                result = self._with_slots(node.args[0])
            elif node.users or node in conditions:
                self._call(node)
        return Plan(
            self.traced.tensors,
            tuple(self.traced.defaults.items()),
            tuple(self.programs),
            tuple(self.items),
            result,
            tuple((self.slots[n], outcome) for n, outcome in conditions.items()),
            len(self.slots),
        )

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        args, kwargs = self._with_slots(node.args), self._with_slots(node.kwargs)
        if node.op == "call_function":
            target = _home_of(target)
        self.slots[node] = len(self.slots)
        self.items.append(Call(node.op, target, args, kwargs, self.slots[node]))
        self._run(node)

    def _run(self, node: fx.Node) -> None:
        """Run the program that depends on a node, which now exists."""
        segment = self.lowered.segments.get(node)
        if segment is None:
            return
        outputs = []
        for result in segment.results.values():
            self.slots[result] = len(self.slots)
            outputs.append(self.slots[result])
        self.items.append(Run(len(self.programs), self.slots[node], tuple(outputs)))
        self.programs.append(segment.program())

    def _with_slots(self, value: Any) -> Any:
        return mapped(value, lambda v: Slot(self._slot_of(v)) if isinstance(v, fx.Node) else v)

    def _slot_of(self, node: fx.Node) -> int:
        if node in self.slots:
            return self.slots[node]
        node = self.lowered.same.get(node, node)
        if node in self.slots:
            return self.slots[node]
        value = self.lowered.value_of[node]
        if not value.number:
            return self.slots[value.root]
        return self.slots[self.lowered.segments[value.root].results[value.number]]


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A structure of tuples, lists, dictionaries and slices, with other leaves.

    Args:
        value: The structure; a named tuple is a leaf.
        leaf: Called with each leaf.
    """
    if type(value) is tuple:
        return tuple(mapped(v, leaf) for v in value)
    if isinstance(value, list):
        return [mapped(v, leaf) for v in value]
    if isinstance(value, dict):
        return {key: mapped(v, leaf) for key, v in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(v, leaf) for v in (value.start, value.stop, value.step)))
    return leaf(value)


def _home_of(function: Callable[..., Any]) -> tuple[str, str]:
    """The module and the name by which a function can be found again."""
    home = getattr(function, "__module__", None) or "torch"
    name = getattr(function, "__qualname__", "")
    for module, known in (
        (home, name),
        (home, getattr(function, "__name__", "")),
        ("operator", getattr(function, "__name__", "")),
        ("torch", getattr(function, "__name__", "")),
        ("torch.nn.functional", getattr(function, "__name__", "")),
    ):
        if known.isidentifier():
            found = getattr(importlib.import_module(module), known, None)
            if found is function:
                return module, known
    raise Untraceable(f"{function} has no name by which it can be found again")


@functools.cache
def function_of(home: tuple[str, str]) -> Callable[..., Any]:
    """The function that :func:`_home_of` named.

    Args:
        home: Module and name of the function.
    """
    found: Callable[..., Any] = getattr(importlib.import_module(home[0]), home[1])
    return found
