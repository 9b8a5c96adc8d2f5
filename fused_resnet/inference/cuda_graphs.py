"""CUDA graphs of a frozen model: when one is captured, and which calls replay it.

A frozen ResNet-50 is some fifty kernels of a few microseconds at small batches, and launching them
takes longer than running them. A graph of all of them is one launch. A graph belongs to one input
shape and one value of every setting that a call depends on (:func:`_settings`), and owns memory; so
a model keeps only a few, evicts the least recently used, and captures a shape at its second call.
Results do not change: a call that cannot be proved to equal the captured one runs the model.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils._pytree import tree_map

from ..backends.availability import _Marker, current_backend
from ..nn.module_kinds import PackedConv, is_hooked, original_class
from ..tuning.tf32 import conv_allows_tf32, matmul_allows_tf32
from .frozen_module import Derived
from .graph_capture import Graph, Recorder

#: Default of the number of graphs that a model keeps.
SIZE = 8

#: A shape is captured at its second call. Each eviction of its graph doubles that number: with more
#: shapes than graphs, a capture at every call would cost far more than graphs save.
CALLS = 2

#: Number of shapes whose calls are counted.
COUNTED = 256

#: Packages whose forwards have no side effects: for a model of their modules alone, a replay equals
#: a call.
KNOWN = ("torch", "torchvision", "fused_resnet")


class Calls(NamedTuple):
    """Calls of one shape.

    Attributes:
        seen: Number of calls that were not replayed.
        capture_at: The number at which a graph is captured; 0 for never.
    """

    seen: int
    capture_at: int


class Recorded(NamedTuple):
    """The state of a model at a capture.

    Attributes:
        generation: Number of times that the model's tensors were replaced.
        tensors: Tensors of the model.
        addresses: The tensors' data pointers, which a graph contains.
    """

    generation: int
    tensors: list[Tensor]
    addresses: list[int]

    def check(self, model: nn.Module) -> bool:
        """Whether the model has the same tensors at the same addresses.

        Args:
            model: The model whose state was recorded.
        """
        if self.generation != _generation(model):
            return False
        return self.addresses == [t.data_ptr() for t in self.tensors]


def is_one_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model is called with a tensor and nothing else.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


class Graphs:
    """The graphs of one frozen model, ``model.cuda_graphs``.

    A call is replayed, or captured, if its only argument is a plain 4-d map on CUDA, no hook, mode
    or transform observes the model, no tracer, compiler or other capture is active, and the model's
    modules and tensors are unchanged since the capture. In all other cases the model runs as it
    does without graphs. Copies and pickles of the model have none.

    Attributes:
        size: Maximum number of graphs; 0 for none. May be changed at any time.
        reuse_outputs: Return the graph's output buffer, which the model's next call overwrites,
            instead of a copy. False by default.

    Args:
        size: Maximum number of graphs.
        recorder: Captures graphs and orders their replays; None for a
            :class:`~fused_resnet.inference.graph_capture.Recorder`.
    """

    def __init__(self, size: int = SIZE, recorder: Any = None) -> None:
        self.size = size
        self.reuse_outputs = False
        self._recorder = recorder or Recorder()
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._calls: OrderedDict[Any, Calls] = OrderedDict()
        self._recorded: Recorded | None = None
        # Held while a call is enqueued: two threads must not write to one graph's input at once.
        self._lock = threading.Lock()

    # Copies and pickles keep the settings alone.

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "reuse_outputs": self.reuse_outputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
        self.reuse_outputs = state["reuse_outputs"]

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that each graph's capture allocated, by the shape and dtype of its input.

        Graphs share one memory pool: a later one may have allocated nothing.
        """
        with self._lock:
            return {_describe(graph.input): graph.bytes for graph in self._graphs.values()}

    def __str__(self) -> str:
        kept = [f"{name} ({taken / 2**20:.1f} MiB)" for name, taken in self.memory.items()]
        return f"{len(kept)} of at most {self.size} CUDA graphs{': ' * bool(kept)}{', '.join(kept)}"

    def clear(self) -> None:
        """Free all graphs and their memory."""
        with self._lock:
            self._drop()

    def run(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, convert: Any
    ) -> Any:
        """``forward`` of the converted arguments, replayed from a graph where possible.

        Args:
            model: The frozen model.
            forward: The model's forward.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            convert: Converts a map to the dtype and layout of ``forward``.

        Returns:
            The result of ``forward``.
        """
        # First, so that a compiler traces none of the rest.
        if not torch.compiler.is_compiling() and self._may_replay(model, args, kwargs):
            x = args[0]
            with self._lock:
                graph = self._graph_for(model, forward, x, convert)
                if graph is not None:
                    with self._recorder.in_turn(x.device):
                        graph.input.copy_(x)
                        graph.replay()
                        return graph.output if self.reuse_outputs else _clone(graph.output)
        if is_one_tensor(args, kwargs):
            return forward(convert(args[0]))  # a tenth of the time of tree_map
        args, kwargs = tree_map(convert, (args, kwargs))
        return forward(*args, **kwargs)

    def takes(self, x: Tensor) -> bool:
        """Whether a call with this map may be captured or replayed at all; not on a CPU.

        Args:
            x: The map.
        """
        takes: bool = self.size > 0 and self._recorder.takes(x)
        return takes

    def _may_replay(self, model: nn.Module, args: Any, kwargs: Any) -> bool:
        return (
            is_one_tensor(args, kwargs)
            and self.takes(args[0])
            and _is_unobserved()
            and _is_plain_map(args[0])
            and not getattr(model, "_is_replica", False)  # nn.DataParallel's share this object
        )

    def _graph_for(
        self, model: nn.Module, forward: Callable[..., Any], x: Tensor, convert: Any
    ) -> Graph | None:
        """The graph for this call, captured now if its turn has come; None if there is none."""
        if self._recorded is None:
            if any(map(is_hooked, _submodules(model))):  # since before it was frozen
                return None
        elif not self._recorded.check(model):
            self._drop()
        dtype = getattr(model, "frozen_dtype", None) or x.dtype
        key = (x.device, tuple(x.shape), dtype, *_settings(x.device.type))
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        calls = self._calls.pop(key, Calls(0, CALLS))
        calls = Calls(calls.seen + 1, calls.capture_at)
        self._calls[key] = calls
        while len(self._calls) > COUNTED:
            self._calls.popitem(last=False)
        if calls.capture_at == 0 or calls.seen < calls.capture_at:
            return None
        self._make_room(self.size - 1)
        try:
            with self._recorder.in_turn(x.device):
                graph = self._recorder.capture(forward, convert(x))
        except RuntimeError as error:
            self._calls[key] = Calls(0, 0)
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"fused_resnet: no CUDA graph for {_describe(x)}, which runs without one: {reason}",
                stacklevel=5,
            )
            return None
        # By now the first calls have cached what they create once (concatenated weights).
        self._recorded = _recorded(model)
        self._graphs[key] = graph
        return graph

    def _make_room(self, size: int) -> None:
        while len(self._graphs) > size:
            self._recorder.wait()
            key, _ = self._graphs.popitem(last=False)
            capture_at = self._calls.get(key, Calls(0, CALLS)).capture_at
            self._calls[key] = Calls(0, 2 * capture_at)

    def _drop(self) -> None:
        self._recorder.wait()
        self._graphs.clear()
        self._calls.clear()
        self._recorded = None


def size_for(model: nn.Module, requested: int | bool | None) -> int:
    """How many graphs a model keeps: as requested, or :data:`SIZE` where that is known to be safe.

    A replay runs no Python: a forward that counts its calls, or reads a switch, would be wrong.

    Args:
        model: The frozen model.
        requested: The argument ``graphs`` of :func:`fused_resnet.freeze`.
    """
    if requested is None or requested is True:
        packages = {
            original_class(module).__module__.partition(".")[0] for module in model.modules()
        }
        return SIZE if requested or packages <= set(KNOWN) else 0
    return int(requested)


def _is_plain_map(x: Any) -> bool:
    return (
        type(x)
        in (Tensor, nn.Parameter)  # no fake, proxy or subclass, which may override operators
        and x.dim() == 4
        and x.layout is torch.strided
        and x.numel() > 0
    )


def _is_unobserved() -> bool:
    """Whether no tracer, mode or transform is active: a replay has no operators to intercept."""
    return (
        not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _len_torch_dispatch_stack() == 0
        and all(isinstance(mode, _Marker) for mode in _get_current_function_mode_stack())
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _settings(device: str) -> tuple[Any, ...]:
    """Everything that a call depends on besides the input and the model."""
    return (
        current_backend(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        conv_allows_tf32(),
        matmul_allows_tf32(),
        torch.backends.cudnn.enabled,
    )


def _submodules(model: nn.Module) -> list[nn.Module]:
    """All modules but the model itself, whose hooks run around a replay as around its forward."""
    return [module for module in model.modules() if module is not model]


def _generation(model: nn.Module) -> int:
    derived: Derived | None = model.__dict__.get("_frozen_derived")
    return 0 if derived is None else derived.generation


def _recorded(model: nn.Module) -> Recorded:
    packed = [module.packed for module in model.modules() if isinstance(module, PackedConv)]
    tensors: list[Any] = [*model.parameters(), *model.buffers(), *packed]
    return Recorded(_generation(model), tensors, [t.data_ptr() for t in tensors])


def _clone(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _describe(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
