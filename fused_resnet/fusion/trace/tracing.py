"""One module traced by itself: the operations of its own forward, with its children as leaves.

Tracing runs the forward once with stand-ins for its tensors. What that one run cannot show, it
assumes, and the assumptions are recorded beside the graph: every attribute that was read and its
value, every argument that was a tensor or was left at its default, and every question about a
shape. The forward that is made of a graph asks for them at each call.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .errors import Untraceable
from .purity import is_not_users, names_of, watching
from .results import Given, Results

#: What an argument was while the module was traced.
TENSOR, SEQUENCE, DEFAULT, UNUSED = "tensor", "sequence", "default", "unused"

#: Attributes that every module has for PyTorch's own use. The one that forwards ask for is kept.
_INTERNAL = set(nn.Module().__dict__) - {"training"}

#: Functions and methods that ask a tensor for its shape and for nothing else.
_SHAPE_METHODS = {"size", "dim", "ndimension"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype"}


@dataclass(frozen=True)
class Argument:
    """A parameter of a forward: how it was given, and its default."""

    name: str
    given: str
    default: Any = inspect.Parameter.empty
    keyword_only: bool = False


@dataclass
class Trace:
    """A graph and what it holds for.

    Attributes:
        graph: Nodes as ``torch.fx`` has them; children that were entered are not in it.
        arguments: Of the forward, in order.
        reads: ``(path of a module, attribute)`` and the value that it had.
        conditions: Nodes that were asked for their truth, and the answer that was taken.
        entered: Paths of the children whose forward was traced as part of this one.
        asks_types: Whether the code looks at the classes of modules or at what they have.
        asked: Paths of the children whose results' classes the code asked for.
        gave: What the entered children gave, where that is known.
        looked_into: Paths of the children that are no part of this trace, but whose code was read
            for what they give.
    """

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    conditions: list[tuple[fx.Node, bool]] = field(default_factory=list)
    entered: tuple[str, ...] = ()
    asks_types: bool = False
    asked: tuple[str, ...] = ()
    gave: dict[str, Given] = field(default_factory=dict)
    looked_into: tuple[str, ...] = ()


def trace(
    module: nn.Module,
    arguments: tuple[Argument, ...],
    enter: frozenset[str] = frozenset(),
    given: Mapping[str, Given] | None = None,
) -> Trace:
    """Trace the module's forward.

    Args:
        module: Its forward is that of its class.
        arguments: What is assumed of each of the forward's parameters.
        enter: Paths of the children to trace as part of the module, instead of as leaves.
        given: What children that are leaves give, by path, as far as it is known.

    Raises:
        AsksForResult: It asks for what a child gives that is not in ``given``.
        Untraceable: The forward's operations cannot be known from one run.
    """
    answers: list[bool] = []
    while True:
        tracer = _Tracer(module, arguments, enter, answers, given or {})
        try:
            return tracer.run()
        except Untraceable:
            raise
        except Exception as error:
            # A check of a shape that raises was answered the wrong way; anything else is final.
            taken = [answer for _, answer in tracer.conditions]
            if taken and not taken[-1] and len(taken) <= 8:
                answers = [*taken[:-1], True]
                continue
            raise Untraceable(f"torch.fx cannot trace it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def ways_to_call(module: nn.Module) -> Iterator[tuple[Argument, ...]]:
    """Assumptions about the forward's arguments, the plainest call first.

    Arguments without a default are tensors, or lists where their annotation says so; the first is
    tried as a list as well where the code asks for classes. Those whose default is None are tried
    at it and as tensors. All others keep their default.

    Args:
        module: Its forward is that of its class.

    Raises:
        Untraceable: The forward has no signature, or one that takes anything.
    """
    forward = type(module).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise Untraceable("its forward has no signature") from error
    base: list[Argument] = []
    optional: list[int] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable("its forward takes any arguments")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise Untraceable("its forward takes positional arguments only")
        given = DEFAULT
        if not _uses(forward, parameter.name):
            given = UNUSED
        elif parameter.default is parameter.empty:
            given = SEQUENCE if _is_sequence(parameter.annotation) else TENSOR
        elif parameter.default is None:
            optional.append(len(base))
        only = parameter.kind is parameter.KEYWORD_ONLY
        base.append(Argument(parameter.name, given, parameter.default, only))
    for chosen in range(1 << min(len(optional), 2)):
        arguments = list(base)
        for bit, index in enumerate(optional):
            if chosen >> bit & 1:
                old = arguments[index]
                arguments[index] = Argument(old.name, TENSOR, old.default, old.keyword_only)
        yield tuple(arguments)
    tensors = [a for a in base if a.given == TENSOR]
    if tensors and "isinstance" in _code_names(forward):
        first = tensors[0]
        as_list = Argument(first.name, SEQUENCE, first.default, first.keyword_only)
        yield tuple(as_list if a is first else a for a in base)


def _code_names(forward: Callable[..., Any]) -> frozenset[str]:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return frozenset() if code is None else names_of(code)


def _uses(forward: Callable[..., Any], name: str) -> bool:
    function = inspect.unwrap(forward)
    code = getattr(function, "__code__", None)
    if code is None or name in code.co_cellvars:
        return True
    import dis

    for instruction in dis.get_instructions(code):
        if "FAST" in instruction.opname and name in _names(instruction.argval):
            return True
    return False


def _names(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


def _is_sequence(annotation: Any) -> bool:
    if isinstance(annotation, str):
        text = annotation.rpartition(".")[2] if "[" not in annotation else annotation
        return text.removeprefix("typing.").partition("[")[0] in ("List", "list", "Sequence")
    return typing.get_origin(annotation) in (list, tuple) or annotation in (list, tuple)


class _Proxy(fx.Proxy):
    """A stand-in that passes for a tensor only where it must be one."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if is_not_users(sys._getframe(1).f_code.co_filename):
            return _Proxy
        if self.node.op == "placeholder" and self.node.target in self.tracer.lists:
            return list
        given = self.tracer.results.of(self.node, "asks for the class of a result")
        return Tensor if given is None else list

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _record_in_place(function: Callable[..., Any]) -> Callable[[_Proxy, Any], Any]:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch.fx has no assignments in place: Python would turn ``y += x`` into ``y = y + x``, and whoever
# else holds y would no longer see the sum.
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
    """Stands in a list that a child was given: what is there now, the child's code knows."""

    def refuse(self, *_: Any) -> Any:
        raise Untraceable("its forward reads a list that a child may have changed")

    __bool__ = __call__ = __eq__ = __getattr__ = __getitem__ = __iter__ = __len__ = refuse
    __hash__ = refuse
    __class__ = property(refuse)


def _forget(value: Any) -> None:
    """Make every list and dict in a child's arguments unreadable."""
    if type(value) in (list, dict):
        for key in list(value) if type(value) is dict else range(len(value)):
            _forget(value[key])
            value[key] = _Changed()
    elif type(value) is tuple:
        for part in value:
            _forget(part)


class _NoOtherTensors(TorchFunctionMode):
    """Refuses operations that the trace would compute once and keep: random numbers, constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            name = getattr(func, "__name__", str(func))
            raise Untraceable(f"its forward makes a tensor by itself ({name})")
        return func(*args, **kwargs)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self,
        module: nn.Module,
        arguments: tuple[Argument, ...],
        enter: frozenset[str],
        answers: list[bool],
        given: Mapping[str, Given],
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.tensors = {a.name for a in arguments if a.given == TENSOR}
        self.lists = {a.name for a in arguments if a.given == SEQUENCE}
        self.enter = {module.get_submodule(path): path for path in enter}
        self.answers = answers
        self.results = Results(module, self.tensors, given)
        self.gave: dict[str, Given] = {}
        self.vague: set[str] = set()
        self.paths = {m: path for path, m in module.named_modules()}
        self.reads: dict[tuple[str, str], Any] = {}
        self.copies: list[tuple[Any, Any]] = []
        self.conditions: list[tuple[fx.Node, bool]] = []
        self.names: set[str] = set()

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
            tuple(self.enter.values()),
            bool(self.names & {"isinstance", "type", "hasattr", "getattr"}),
            tuple(self.results.asked),
            {path: given for path, given in self.gave.items() if path not in self.vague},
        )

    # What torch.fx asks a tracer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.enter

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if m in self.enter:
            self._note(self.enter[m], result)
        else:
            _forget((args, tuple(kwargs.values())))
        return result

    def _note(self, path: str, result: Any) -> None:
        """Remember what an entered child gave, if it is the same at each of its calls."""
        given: Given = None
        asked = dict(self.results.asked)
        try:
            if type(result) is list:
                given = len(result)
            elif type(result) is not _Proxy or self.results.of(result.node, "") is not None:
                raise Untraceable("")
        except Untraceable:
            self.vague.add(path)
        self.results.asked = asked  # nobody has asked yet
        if self.gave.setdefault(path, given) != given:
            self.vague.add(path)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if obj.node.op == "call_module":
            length = self.results.of(obj.node, "goes through a result of unknown length")
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
            if argument.given != DEFAULT:
                value = self.create_proxy("placeholder", argument.name, (), {})
            if argument.keyword_only:
                keywords[argument.name] = value
            else:
                positional.append(value)

        def call(*values: Any) -> Any:
            with watching(self.names):
                return root_fn(*values, **keywords)

        return call, positional

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if attr_val is None or isinstance(attr_val, Tensor):
            for module, path in self.paths.items():
                for held in (module._parameters, module._buffers):
                    if held.get(attr, self) is attr_val:
                        self.reads[path, attr] = None if attr_val is None else Tensor
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_of_shape(obj.node):
            raise Untraceable("its forward branches on the values of a tensor")
        index = len(self.conditions)
        answer = self.answers[index] if index < len(self.answers) else False
        self.conditions.append((obj.node, answer))
        return answer

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            if type(a).__module__ != "collections":
                raise Untraceable(f"its forward returns or passes a {type(a).__name__}")
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", type(a), (pairs,), {})
        return super().create_arg(a)

    # What the forward reads of its modules

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Record that the forward read an attribute; returns what it is given to see."""
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


def _is_of_shape(node: fx.Node) -> bool:
    """Whether a node follows from the shapes and dtypes of the arguments alone."""
    if node.op == "placeholder":
        return False
    for source in node.all_input_nodes:
        asks = (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
            node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        )
        if source.op == "placeholder":
            if not asks:
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
    """Make every module tell the tracer what is read of it, and refuse to be written to."""

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
