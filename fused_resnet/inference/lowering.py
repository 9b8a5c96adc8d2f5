"""Lowering: from the graph of a frozen module to programs and what has to be called between them.

Each node of the graph either becomes part of a step or stays as it is. The steps whose inputs all
depend on one value form one program. A convolution waits until its result is read, so that the
addition, the ReLU and the max-pool after it become part of its step.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..backends.activation import Activation
from ..fusion.trace.aliasing import Aliases
from ..fusion.trace.errors import Untraceable
from ..fusion.trace.patterns import activation_at, addition, subsampling, zeros_of
from ..nn.module_kinds import is_hooked
from ..ops.program_steps import Step
from .frozen_conv import FrozenConv
from .layer_steps import (
    divided,
    inputs,
    is_layer,
    layer_of,
    size_after,
    unchanged_input,
)
from .program import Program
from .run_steps import TENSORS


class Value(NamedTuple):
    """A value of a program.

    Attributes:
        root: The node on which the program depends.
        number: Index of the value in the program: 0 for the root's own, -1 while it is not known.
    """

    root: fx.Node
    number: int


@dataclass
class Segment:
    """The steps that depend on one node alone.

    Attributes:
        steps: The steps, in the order in which they run.
        modules: The path of each step's module; empty for none.
        results: The node that a value stands for, by the value's index, for each value that is read
            outside.
        channels: Channels of each value, where they are known.
        sizes: How the height and width of each value follow from those of the input.
        tensors: Number of tensors of its steps.
        dtype: Dtype of the maps; None while no convolution says so.
    """

    steps: list[Step] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    results: dict[int, fx.Node] = field(default_factory=dict)
    channels: list[int | None] = field(default_factory=lambda: [None])
    sizes: list[Any] = field(default_factory=lambda: [(1, 1)])
    tensors: int = 0
    dtype: torch.dtype | None = None

    def program(self) -> Program:
        """The steps as a program whose outputs are the values that are read outside."""
        return Program(
            tuple(self.steps), tuple(self.modules), tuple(self.results), self.channels[0] or 0
        )


class Pending(NamedTuple):
    """A convolution whose result nobody has read yet.

    Attributes:
        step: Step of the convolution, without its tensors' index.
        path: Path of the convolution's module.
        source: Input of the convolution.
        residual: Value that is added to its result; None for none.
        depth: Number of convolutions between the program's input and its result.
    """

    step: Step
    path: str
    source: Value
    residual: Value | None
    depth: int


@dataclass
class LoweredGraph:
    """A graph, of which parts are programs.

    Attributes:
        segments: The programs, by the node on which each depends.
        value_of: The value that stands for a node.
        same: The node that made the input of a node that returns its input unchanged, by the
            latter.
        remaining: The nodes that are called as they are, in order.
    """

    segments: dict[fx.Node, Segment]
    value_of: dict[fx.Node, Value]
    same: dict[fx.Node, fx.Node]
    remaining: list[fx.Node]


def lower(module: nn.Module, graph: fx.Graph) -> LoweredGraph:
    """Find the programs of a graph.

    Args:
        module: The frozen module; paths in the graph are relative to it.
        graph: Graph of the module's forward.

    Raises:
        Untraceable: Something that is overwritten in place is read later.
    """
    lowering = _Lowering(module, graph)
    for node in graph.nodes:
        lowering.visit(node)
    return lowering.finish()


class _Lowering:
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.segments: dict[fx.Node, Segment] = {}
        self.state: dict[fx.Node, Value | Pending] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # of a node that returns its input
        self.depths: dict[Value, int] = {}
        self.flat: set[fx.Node] = set()  # those with the shape (N, C)
        self.subsampled: dict[fx.Node, tuple[fx.Node, tuple[int, int]]] = {}
        self.remaining: list[fx.Node] = []
        nodes = list(graph.nodes)
        for node in nodes:
            source = unchanged_input(module, node)
            if source is not None:
                self.same[node] = self._origin(source)
        self.readers = Counter(
            self._origin(source)
            for node in nodes
            if node not in self.same
            for source in inputs(node)
        )
        _check_writes(module, graph, nodes)

    # Nodes

    def visit(self, node: fx.Node) -> None:
        """Make a node part of a step, or leave it as it is."""
        if node in self.same:
            return
        if node.op in ("placeholder", "output") or not self._take(node):
            for source in dict.fromkeys(map(self._origin, inputs(node))):
                self._read_outside(source)
            if node.op != "placeholder":
                self.remaining.append(node)

    def finish(self) -> LoweredGraph:
        """What was found, once all nodes were visited."""
        if any(segment.steps and segment.dtype is None for segment in self.segments.values()):
            raise Untraceable("it has steps without a convolution")
        values = {n: v for n, v in self.state.items() if isinstance(v, Value)}
        segments = {n: s for n, s in self.segments.items() if s.results}
        return LoweredGraph(segments, values, self.same, self.remaining)

    def _origin(self, node: fx.Node) -> fx.Node:
        return self.same.get(node, node)

    def _take(self, node: fx.Node) -> bool:
        sides = addition(node)
        if sides is not None:
            return self._take_addition(node, *map(self._origin, sides[:2]))
        if node.op == "call_module":
            child: Any = self.module.get_submodule(str(node.target))
            if is_hooked(child) or len(inputs(node)) != 1 or node.kwargs:
                return False
            if isinstance(child, FrozenConv):
                return self._take_convolution(node, child)
        activation = activation_at(self.module, node)
        if activation:
            return self._take_activation(node, activation)
        if node.op == "call_function" and self._take_zero_padding(node):
            return True
        layer = layer_of(self.module, node)
        return layer is not None and self._take_layer(node, *layer)

    def _take_convolution(self, node: fx.Node, conv: FrozenConv) -> bool:
        source = self._value(self._origin(node.args[0]))  # type: ignore[arg-type]
        if len(node.args) != 1:
            return False
        segment = self._segment(source.root)
        if segment.dtype not in (None, conv.dtype):
            return False
        if segment.channels[source.number] not in (None, conv.in_channels):
            return False
        segment.dtype, segment.channels[source.number] = conv.dtype, conv.in_channels
        step = conv.step._replace(input=source.number, tensor=-1)
        depth = self.depths.get(source, 0) + 1
        self.state[node] = Pending(step, str(node.target), source, None, depth)
        return True

    def _take_addition(self, node: fx.Node, left: fx.Node, right: fx.Node) -> bool:
        waiting = [n for n in (left, right) if self._can_add_to(n)]
        # The longer branch takes the shorter one, whose result exists by then.
        waiting.sort(key=lambda n: self.state[n].depth, reverse=True)  # type: ignore[union-attr]
        for main in waiting:
            pending = self.state[main]
            assert isinstance(pending, Pending)
            other = right if main is left else left
            root, residual = pending.source.root, self._peek(other)
            if residual is None or (residual.root is not root and other is not root):
                continue
            if not self._same_shape(pending, other):
                continue
            residual = self._value(other) if other is not root else Value(root, 0)
            self.state[node] = pending._replace(residual=residual)
            return True
        return self._take_plain_addition(node, left, right)

    def _take_plain_addition(self, node: fx.Node, left: fx.Node, right: fx.Node) -> bool:
        """An addition of two maps of one program that no convolution takes over."""
        a, b = self._value(left), self._value(right)
        if a.root is not b.root or {left, right} & self.flat or not (a.number or b.number):
            return False
        segment = self._segment(a.root)
        shape = (segment.channels[a.number], segment.sizes[a.number])
        if None in shape or (segment.channels[b.number], segment.sizes[b.number]) != shape:
            return False
        self.state[node] = self._emit(a.root, Step("add_relu", a.number, b.number), "", *shape)
        return True

    def _can_add_to(self, node: fx.Node) -> bool:
        pending = self.state.get(node)
        if not isinstance(pending, Pending) or self.readers[node] != 1:
            return False
        return pending.residual is None and not pending.step.activation

    def _peek(self, node: fx.Node) -> Value | None:
        """The value of a node, whose index is not known yet while it is pending."""
        state = self.state.get(node)
        if isinstance(state, Pending):
            return Value(state.source.root, -1)
        return state or Value(node, 0)

    def _same_shape(self, pending: Pending, other: fx.Node) -> bool:
        """Whether an addition does not broadcast, whatever the size of the input."""
        segment = self._segment(pending.source.root)
        shape = self._shape_after(segment, pending)
        state = self.state.get(other, Value(other, 0))
        if isinstance(state, Pending):
            return self._shape_after(segment, state) == shape
        return (segment.channels[state.number], segment.sizes[state.number]) == shape

    @staticmethod
    def _shape_after(segment: Segment, pending: Pending) -> tuple[int, Any]:
        size = segment.sizes[pending.source.number]
        return pending.step.out_channels, size_after(size, pending.step)

    def _take_activation(self, node: fx.Node, activation: Activation) -> bool:
        source = self._origin(node.args[0])  # type: ignore[arg-type]
        pending = self.state.get(source)
        if self.readers[source] != 1:
            return False
        if isinstance(pending, Pending) and not pending.step.activation:
            step = pending.step._replace(activation=activation)
            self.state[node] = pending._replace(step=step)
            return True
        if isinstance(pending, Value) and pending.number:
            steps, i = self._segment(pending.root).steps, pending.number - 1
            if steps[i].operation == "add_relu" and not steps[i].activation:
                steps[i] = steps[i]._replace(activation=activation)
                self.state[node] = pending
                return True
        return False

    def _take_layer(self, node: fx.Node, kind: str, settings: dict[str, Any]) -> bool:
        source = self._origin(node.args[0])  # type: ignore[arg-type]
        state = self.state.get(source)
        if kind == "max_pool" and isinstance(state, Pending) and self.readers[source] == 1:
            plain = state.residual is None and not settings["ceil_mode"]
            if state.step.activation and plain:
                names = ("kernel", "stride", "padding")
                pool = {f"pool_{name}": settings[name] for name in names}
                step = state.step._replace(operation="conv_max_pool", **pool)
                self.state[node] = state._replace(step=step)
                return True
        if state is None and not (kind in ("max_pool", "avg_pool") and self._is_convolved(source)):
            return False  # no step of a program reads it, or comes before it
        if kind == "flatten":
            return self._take_flatten(node, source)
        value = self._value(source)
        segment = self._segment(value.root)
        path = ""
        size: Any = None
        if kind == "linear":
            linear: Any = self.module.get_submodule(str(node.target))
            if source not in self.flat or linear.weight.dtype is not segment.dtype:
                return False
            path, settings = str(node.target), {"out_channels": linear.out_features}
        elif source in self.flat:
            return False
        if kind == "global_avg_pool" and not settings.pop("keeps"):
            if not self._is_read_by_linear(node):
                return False
            self.flat.add(node)
        if kind == "linear":
            self.flat.add(node)
        made = Step(kind, value.number, **settings)
        channels = made.out_channels or segment.channels[value.number]
        if kind in ("max_pool", "avg_pool"):
            size = size_after(segment.sizes[value.number], made)
        self.state[node] = self._emit(value.root, made, path, channels, size)
        return True

    def _is_convolved(self, root: fx.Node) -> bool:
        """Whether a program with a convolution begins at a node."""
        segment = self.segments.get(root)
        return segment is not None and segment.dtype is not None

    def _take_flatten(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a flattened average is read by fully connected layers alone."""
        value = self._value(source)
        steps = self._segment(value.root).steps
        if not value.number or steps[value.number - 1].operation != "global_avg_pool":
            return False
        if source in self.flat or not self._is_read_by_linear(node):
            return False
        self.flat.add(node)
        self.state[node] = value
        return True

    def _is_read_by_linear(self, node: fx.Node) -> bool:
        """Whether fully connected layers read a node, and nothing else does."""
        readers = [
            reader
            for reader in self.graph.nodes
            if reader not in self.same and node in map(self._origin, inputs(reader))
        ]
        return bool(readers) and all(is_layer(self.module, n, nn.Linear) for n in readers)

    def _take_zero_padding(self, node: fx.Node) -> bool:
        """``pad(x[:, :, ::s, ::s])`` with channels of zeros on both sides."""
        if node.target is operator.getitem:
            strides = subsampling(node)
            readers = list(node.users)
            if strides is None or not readers or any(zeros_of(n) is None for n in readers):
                return False
            self.subsampled[node] = (self._origin(node.args[0]), strides)  # type: ignore[arg-type]
            return True
        zeros = zeros_of(node)
        known = self.subsampled.get(node.args[0]) if zeros is not None else None  # type: ignore[arg-type]
        if known is None or zeros is None:
            return False
        value = self._value(known[0])
        segment = self._segment(value.root)
        step = Step("zero_pad_shortcut", value.number, stride=known[1], zeros=zeros)
        channels = segment.channels[value.number]
        total = None if channels is None else channels + 2 * zeros
        size = divided(segment.sizes[value.number], known[1])
        self.state[node] = self._emit(value.root, step, "", total, size)
        return True

    # Values

    def _segment(self, root: fx.Node) -> Segment:
        return self.segments.setdefault(root, Segment())

    def _value(self, node: fx.Node) -> Value:
        """The value of a node; a convolution that waited becomes a step."""
        state = self.state.get(node)
        if state is None:
            return Value(node, 0)
        if isinstance(state, Value):
            return state
        residual = -1 if state.residual is None else state.residual.number
        root = state.source.root
        segment = self._segment(root)
        step = state.step._replace(residual=residual, tensor=segment.tensors)
        channels, size = self._shape_after(segment, state)
        value = self._emit(root, step, state.path, channels, size)
        self.depths[value] = state.depth
        self.state[node] = value
        return value

    def _emit(self, root: fx.Node, step: Step, path: str, channels: int | None, size: Any) -> Value:
        segment = self._segment(root)
        count = TENSORS.get(step.operation, 0)
        if count:
            step = step._replace(tensor=segment.tensors)
            segment.tensors += count
        segment.steps.append(step)
        segment.modules.append(path)
        segment.channels.append(channels)
        segment.sizes.append(size)
        value = Value(root, len(segment.steps))
        self.depths[value] = self.depths.get(Value(root, step.input), 0)
        return value

    def _read_outside(self, node: fx.Node) -> None:
        value = self._value(node)
        if value.number:
            self._segment(value.root).results.setdefault(value.number, node)


def _check_writes(module: nn.Module, graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Refuse a graph in which something is read after it was overwritten.

    Steps return new maps, so a reader of an overwritten one would see the old values.
    """
    aliases = Aliases(graph, module)
    order = {node: i for i, node in enumerate(nodes)}
    last = {n: max((order[u] for u in n.users), default=-1) for n in order}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        for root in aliases.roots[node]:
            sharing.setdefault(root, []).append(node)
    for node, at in order.items():
        for root in aliases.written(node):
            for other in sharing.get(root, []):
                if order[other] < at < last[other]:
                    raise Untraceable(f"{other} is read after {node} overwrote it")
            if root.op == "placeholder":
                raise Untraceable(f"{node} overwrites the module's input")
