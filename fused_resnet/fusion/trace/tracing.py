"""Tracing one module: the operations of its own forward, with its children as leaves.

The forward runs once with ``torch.fx`` proxies for its tensors. The assumptions of that run are
recorded with the graph: the value of every attribute that was read, the kind of every argument, and
the outcome of every condition on a shape. The generated forward checks them at each call.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .arguments import DEFAULT, SEQUENCE, TENSOR, Argument
from .errors import Untraceable
from .output_kinds import OutputKind, OutputKinds
from .outside import Outside
from .purity import checking_purity, is_library_file

#: Attributes of every module for PyTorch's internal use; ``training``, which forwards read, is not.
_INTERNAL = set(nn.Module().__dict__) - {"training"}

#: Methods and attributes of a tensor that depend only on its shape and dtype.
_SHAPE_METHODS = {"size", "dim", "ndimension"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype"}

#: Attributes of a tensor whose class is known.
_ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device
}  # fmt: skip


T = TypeVar("T", bound="_Tracer")


@dataclass
class Trace:
    """A graph and the assumptions under which it is valid.

    Attributes:
        graph: Graph of the forward; a submodule that was inlined has no node of its own.
        arguments: Arguments of the forward, in order.
        reads: The value of each attribute that was read, by ``(path of the module, attribute)``.
        conditions: The nodes on whose truth value the code branched, and the outcome traced.
        inlined: Paths of the submodules whose forward was traced as part of this one.
        inspects_types: Whether the code inspects classes or attributes with ``isinstance``,
            ``type``, ``hasattr`` or ``getattr``.
        inspected_outputs: Paths of the submodules whose result's class the code inspected.
        output_kinds: The kinds of the inlined submodules' results, where they are known.
        examined: Paths of the submodules that are leaves here, but were traced before to find out
            the kind of their result.
        outside: The variables and the defaults of the functions that ran.
    """

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    conditions: list[tuple[fx.Node, bool]] = field(default_factory=list)
    inlined: tuple[str, ...] = ()
    inspects_types: bool = False
    inspected_outputs: tuple[str, ...] = ()
    output_kinds: dict[str, OutputKind] = field(default_factory=dict)
    examined: tuple[str, ...] = ()
    outside: tuple[Outside, ...] = ()


def trace(
    module: nn.Module,
    arguments: tuple[Argument, ...],
    inline: frozenset[str] = frozenset(),
    output_kinds: Mapping[str, OutputKind] | None = None,
) -> Trace:
    """Trace the module's forward.

    Args:
        module: The module; its forward is the one of its class.
        arguments: The assumed kind of each parameter of the forward.
        inline: Paths of the submodules to trace as part of the module, instead of as leaves.
        output_kinds: The kinds of the results of submodules that are leaves, by path, where they
            are known.

    Raises:
        NeedsOutputKind: The code depends on the kind of a result that is not in ``output_kinds``.
        Untraceable: One run cannot show the operations of every call.
    """
    return first_trace(
        lambda outcomes: _Tracer(module, arguments, inline, outcomes, output_kinds or {})
    )[1]


def first_trace(make: Callable[[list[bool]], T]) -> tuple[T, Trace]:
    """The first run of a tracer that does not raise, over the outcomes of conditions on shapes.

    Args:
        make: Makes the tracer of one run; called with the outcomes of the first conditions.

    Raises:
        Untraceable: No run shows the operations of every call.
    """
    outcomes: list[bool] = []
    while True:
        tracer = make(outcomes)
        try:
            return tracer, tracer.run()
        except Untraceable:
            raise
        except Exception as error:
            # The branch taken last may be the one that raises, such as a check of a shape: try the
            # other one.
            taken = [outcome for _, outcome in tracer.conditions]
            if taken and not taken[-1] and len(taken) <= 8:
                outcomes = [*taken[:-1], True]
                continue
            raise Untraceable(f"torch.fx cannot trace it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


class _Proxy(fx.Proxy):
    """A proxy for whose result ``isinstance`` says Tensor or list where that is known."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if is_library_file(sys._getframe(1).f_code.co_filename):
            return _Proxy
        if self.node.op == "placeholder" and self.node.target in self.tracer.lists:
            return list
        size = _class_of_size(self.node)
        if size is not None:
            return size
        length = self.tracer.results.of(self.node, "inspects the class of a result")
        return Tensor if length is None else list

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(fx.proxy.Attribute):
    """An attribute of a proxy, whose class is that of a tensor's attribute where it is known."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if is_library_file(sys._getframe(1).f_code.co_filename):
            return _Attribute
        if self.attr not in _ATTRIBUTES:
            raise Untraceable(f"its forward inspects the class of {self.attr}")
        return _ATTRIBUTES[self.attr]


def _record_in_place(function: Callable[..., Any]) -> Callable[[_Proxy, Any], Any]:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch.fx.Proxy has no in-place operators, so Python would turn ``y += x`` into ``y = y + x``, and
# other references to y would miss the update.
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "matmul",
):
    setattr(_Proxy, f"__i{_name}__", _record_in_place(getattr(operator, f"__i{_name}__")))


class _Changed:
    """Replaces the items of a list that was passed to a child, which may have changed them."""

    def refuse(self, *_: Any) -> Any:
        raise Untraceable("its forward reads a list that a child may have changed")

    __bool__ = __call__ = __eq__ = __getattr__ = __getitem__ = __iter__ = __len__ = refuse
    __hash__ = refuse
    __class__ = property(refuse)


def _invalidate(value: Any) -> None:
    """Make the items of every list and dict in a child's arguments unreadable."""
    if type(value) in (list, dict):
        for key in list(value) if type(value) is dict else range(len(value)):
            _invalidate(value[key])
            value[key] = _Changed()
    elif type(value) is tuple:
        for item in value:
            _invalidate(item)


class _NoOtherTensors(TorchFunctionMode):
    """Refuses operations without a proxy, whose result would be a constant of the trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            name = getattr(func, "__name__", str(func))
            raise Untraceable(f"its forward makes a tensor by itself ({name})")
        return func(*args, **kwargs)


class _Tracer(fx.Tracer):
    """One run of a module's forward; the arguments are those of :func:`trace`.

    Args:
        outcomes: Outcomes of the first conditions on shapes; later ones are false.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        module: nn.Module,
        arguments: tuple[Argument, ...],
        inline: frozenset[str],
        outcomes: list[bool],
        output_kinds: Mapping[str, OutputKind],
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.tensors = {a.name for a in arguments if a.kind == TENSOR}
        self.lists = {a.name for a in arguments if a.kind == SEQUENCE}
        self.inline = {module.get_submodule(path): path for path in inline}
        self.outcomes = outcomes
        self.results = OutputKinds(module, self.tensors, output_kinds)
        self.inlined_kinds: dict[str, OutputKind] = {}
        self.unknown_kinds: set[str] = set()
        self.paths = {m: path for path, m in module.named_modules()}
        self.reads: dict[tuple[str, str], Any] = {}
        self.copies: list[tuple[Any, Any]] = []
        self.conditions: list[tuple[fx.Node, bool]] = []
        self.names: set[str] = set()
        self.beside: dict[types.FunctionType, Outside] = {}

    def run(self) -> Trace:
        with _recording(self), _NoOtherTensors():
            graph = self.trace(self.module)
        for original, copy in self.copies:
            if original != copy:
                raise Untraceable("its forward writes to an attribute")
        return Trace(
            graph,
            self.arguments,
            self.reads,
            self.conditions,
            tuple(self.inline.values()),
            bool(self.names & {"isinstance", "type", "hasattr", "getattr"}),
            tuple(self.results.inspected),
            {p: kind for p, kind in self.inlined_kinds.items() if p not in self.unknown_kinds},
            outside=tuple(self.beside.values()),
        )

    # Methods that torch.fx calls

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inline

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if m in self.inline:
            self._record_kind(self.inline[m], result)
        else:
            _invalidate((args, tuple(kwargs.values())))
        return result

    def _record_kind(self, path: str, result: Any) -> None:
        """Record the kind of an inlined submodule's result, if all of its calls agree."""
        kind: OutputKind = None
        inspected = dict(self.results.inspected)
        try:
            if type(result) is list:
                kind = len(result)
            elif type(result) is not _Proxy or self.results.of(result.node, "") is not None:
                raise Untraceable("")
        except Untraceable:
            self.unknown_kinds.add(path)
        self.results.inspected = inspected  # the traced code itself has not inspected the result
        if self.inlined_kinds.setdefault(path, kind) != kind:
            self.unknown_kinds.add(path)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if obj.node.op == "call_module":
            length = self.results.of(obj.node, "iterates over a result of unknown length")
            if length is not None:
                return iter([obj[index] for index in range(length)])  # type: ignore[index]
        return super().iter(obj)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        positional: list[Any] = [self.module]
        keywords: dict[str, Any] = {}
        for argument in self.arguments:
            value = argument.default
            if argument.kind != DEFAULT:
                value = self.create_proxy("placeholder", argument.name, (), {})
            if argument.keyword_only:
                keywords[argument.name] = value
            else:
                positional.append(value)

        def call(*values: Any) -> Any:
            with checking_purity(self.names, self.beside):
                return root_fn(*values, **keywords)

        return call, positional

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if attr_val is None or isinstance(attr_val, Tensor):
            for module, path in self.paths.items():
                for tensors in (module._parameters, module._buffers):
                    if tensors.get(attr, self) is attr_val:
                        self.reads[path, attr] = None if attr_val is None else Tensor
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_of_shape(obj.node):
            raise Untraceable("its forward branches on the values of a tensor")
        index = len(self.conditions)
        outcome = self.outcomes[index] if index < len(self.outcomes) else False
        self.conditions.append((obj.node, outcome))
        return outcome

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            if type(a).__module__ != "collections":
                raise Untraceable(f"its forward returns or passes a {type(a).__name__}")
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", type(a), (pairs,), {})
        return super().create_arg(a)

    # Attributes that the forward reads

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Record that the forward reads an attribute.

        Args:
            module: Module that has the attribute.
            name: Name of the attribute.
            value: Value of the attribute.

        Returns:
            The value, or a copy of a list, dict or set, so that writes to it are noticed.
        """
        if name.startswith("fused_resnet_"):
            return value
        path = self.paths.get(module)
        if path is None:
            raise Untraceable(f"its forward reads {name} of a module that is not its own")
        if isinstance(value, Tensor):
            raise Untraceable(f"its tensor {name} is neither a parameter nor a buffer")
        if isinstance(value, (list, dict, set)):
            if not _is_plain(value):
                raise Untraceable(f"its forward reads {name}, which can change unseen")
            self.reads.setdefault((path, name), _frozen(value))
            copy = type(value)(value)
            self.copies.append((type(value)(value), copy))
            return copy
        if not _is_plain(value) and not _is_constant_object(value):
            raise Untraceable(f"its forward reads {name}, which can change unseen")
        self.reads[path, name] = value
        return value


def _class_of_size(node: fx.Node) -> type | None:
    """The class of a tensor's size or of one of its numbers; None for any other node.

    PyTorch's functions inspect it too: ``F.avg_pool2d(x, x.size(3))``.
    """
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return torch.Size if node.target == "size" and len(node.args) == 1 else int
    if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]))
    if node.target is not operator.getitem or _class_of_size(node.args[0]) is not torch.Size:
        return None
    return {int: int, slice: torch.Size}.get(type(node.args[1]))


def _is_of_shape(node: fx.Node) -> bool:
    """Whether a node depends only on the shapes and dtypes of the arguments."""
    if node.op == "placeholder":
        return False
    for source in node.all_input_nodes:
        is_query = (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
            node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        )
        if source.op == "placeholder":
            if not is_query:
                return False
        elif not _is_of_shape(source):
            return False
    pure = getattr(node.target, "__module__", "") == "_operator" or node.target is getattr
    return pure or (node.op == "call_method" and node.target in _SHAPE_METHODS)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, torch.Size)


def _is_constant_object(value: Any) -> bool:
    kinds = (types.FunctionType, types.BuiltinFunctionType, type, torch.dtype, torch.memory_format)
    return isinstance(value, kinds)


def _frozen(value: Any) -> Any:
    return type(value)(value)


@contextmanager
def _recording(tracer: _Tracer) -> Iterator[None]:
    """Make all modules report reads of their attributes to the tracer, and refuse writes."""

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or name in _INTERNAL or isinstance(value, types.MethodType):
            return value
        if name not in self.__dict__ and isinstance(value, types.FunctionType):
            return value
        return tracer.read(self, name, value)

    def write(self: nn.Module, name: str, *_: Any) -> None:
        raise Untraceable(f"its forward writes to {name}")

    saved = {name: nn.Module.__dict__.get(name) for name in ("__setattr__", "__delattr__")}
    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    nn.Module.__setattr__ = write  # type: ignore[method-assign,assignment]
    nn.Module.__delattr__ = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        for name, function in saved.items():
            setattr(nn.Module, name, function)
