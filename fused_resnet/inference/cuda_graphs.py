"""CUDA graphs of a frozen model: which calls are replayed from one, and when one is recorded.

A frozen ResNet-50 is some fifty kernels of a few microseconds at small batches, and launching them
takes longer than running them. A graph of all of them is one launch. It stands for one input shape
and one setting of whatever a call depends on (:func:`_settings`), and holds memory for it; so there
are at most a few of them, the least recently used gives way, and a shape is recorded when it comes
for the second time. All of it is invisible but for the time: a call that cannot be proved to be the
recorded one runs the model itself.
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
from ..nn.module_kinds import is_hooked, original_class
from .graph_capture import Graph, Recorder
from .guard import Guard

#: Graphs that a model keeps, unless :func:`fused_resnet.freeze` is told otherwise.
SIZE = 8

#: A shape's call that is recorded is its second. Each time its graph had to give way to others,
#: twice as many calls are waited for: where there are more shapes than graphs, recording one for
#: every call would cost far more than graphs save.
CALLS = 2

#: Shapes whose calls are counted.
COUNTED = 256

#: Packages whose modules do nothing in a forward but compute: where all of a model's are theirs, a
#: replay is the same as a call.
KNOWN = ("torch", "torchvision", "fused_resnet")


class Calls(NamedTuple):
    """Of one key: calls that were not replayed, and the one that is to be recorded; 0 for never."""

    seen: int
    wanted: int


class Recorded(NamedTuple):
    """A model as it was when a graph of it was recorded."""

    snapshot: Guard
    tensors: list[Tensor]
    addresses: list[int]

    def holds(self) -> bool:
        """Whether its modules and tensors are the same, where they were, and nobody hooks in."""
        return self.snapshot.holds() and self.addresses == [t.data_ptr() for t in self.tensors]


def is_one_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model is called with a tensor and nothing else."""
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


class Graphs:
    """The graphs of one frozen model, ``model.cuda_graphs``.

    A call is replayed, or recorded, if its only argument is a plain 4-d map on CUDA, nothing looks
    into the model (hooks, modes, transforms), nobody traces, compiles or records a graph of their
    own, and the model's modules and tensors are those that were recorded. In all other cases the
    model runs as it does without graphs. Copies and pickles of the model begin without any.

    Attributes:
        size: How many are kept; 0 keeps none. May be changed at any time.
        reuse_outputs: Give out the graph's own output, which the model's next call overwrites,
            in place of a copy. False unless it is set.

    Args:
        size: See above.
        recorder: Records a graph, and orders the replays.
    """

    def __init__(self, size: int = SIZE, recorder: Any = None) -> None:
        self.size = size
        self.reuse_outputs = False
        self._recorder = recorder or Recorder()
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._calls: OrderedDict[Any, Calls] = OrderedDict()
        self._recorded: Recorded | None = None
        # Held while a call is put on the stream: two threads write to one graph's input in turn.
        self._lock = threading.Lock()

    # Copies and pickles: the settings alone.

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "reuse_outputs": self.reuse_outputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
        self.reuse_outputs = state["reuse_outputs"]

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that each graph's recording took, by the shape and dtype of its input.

        Graphs share what they can: one that was recorded later may have needed nothing more.
        """
        with self._lock:
            return {_words(graph.input): graph.bytes for graph in self._graphs.values()}

    def __str__(self) -> str:
        held = [f"{name} ({taken / 2**20:.1f} MiB)" for name, taken in self.memory.items()]
        return f"{len(held)} of at most {self.size} CUDA graphs{': ' * bool(held)}{', '.join(held)}"

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop()

    def run(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, convert: Any
    ) -> Any:
        """``forward`` of the converted arguments, by a graph where there may be one.

        Args:
            model: Whose forward it is.
            forward: Takes the arguments.
            args: As the model was given them.
            kwargs: As ``args``.
            convert: Makes of a map the one that ``forward`` takes: dtype and layout.
        """
        # A compiler that traces this reads no further.
        if not torch.compiler.is_compiling() and self._may_replay(model, args, kwargs):
            x = args[0]
            with self._lock:
                graph = self._graph_for(model, forward, x, convert)
                if graph is not None:
                    with self._recorder.in_turn(x.device):
                        graph.input.copy_(x)
                        graph.replay()
                        return graph.output if self.reuse_outputs else _copied(graph.output)
        if is_one_tensor(args, kwargs):
            return forward(convert(args[0]))  # as below, in a tenth of the time
        args, kwargs = tree_map(convert, (args, kwargs))
        return forward(*args, **kwargs)

    def _may_replay(self, model: nn.Module, args: Any, kwargs: Any) -> bool:
        return (
            self.size > 0
            and is_one_tensor(args, kwargs)
            and _nobody_looks_in()
            and _is_plain_map(args[0])
            and self._recorder.takes(args[0])
            and not getattr(model, "_is_replica", False)  # nn.DataParallel's share this object
        )

    def _graph_for(
        self, model: nn.Module, forward: Callable[..., Any], x: Tensor, convert: Any
    ) -> Graph | None:
        """The one for this call, recorded now if it is time for it; None where there is none."""
        if self._recorded is None or not self._recorded.holds():
            if any(map(is_hooked, _inside(model))):
                return None
            if self._recorded is not None:
                self._drop()
        key = (x.device, tuple(x.shape), *_settings(x.device.type))
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        calls = self._calls.pop(key, Calls(0, CALLS))
        calls = Calls(calls.seen + 1, calls.wanted)
        self._calls[key] = calls
        while len(self._calls) > COUNTED:
            self._calls.popitem(last=False)
        if calls.wanted == 0 or calls.seen < calls.wanted:
            return None
        self._make_room(self.size - 1)
        try:
            with self._recorder.in_turn(x.device):
                graph = self._recorder.capture(forward, convert(x))
        except RuntimeError as error:
            self._calls[key] = Calls(0, 0)
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"fused_resnet: no CUDA graph for {_words(x)}, which runs without one: {reason}",
                stacklevel=5,
            )
            return None
        # What the first calls made once (weights joined on CUDA) is part of the state by now.
        self._recorded = _recorded(model)
        self._graphs[key] = graph
        return graph

    def _make_room(self, size: int) -> None:
        while len(self._graphs) > size:
            self._recorder.wait()
            key, _ = self._graphs.popitem(last=False)
            wanted = self._calls.get(key, Calls(0, CALLS)).wanted
            self._calls[key] = Calls(0, 2 * wanted)

    def _drop(self) -> None:
        self._recorder.wait()
        self._graphs.clear()
        self._calls.clear()
        self._recorded = None


def size_for(model: nn.Module, asked: int | bool | None) -> int:
    """How many graphs a model keeps: as asked for, or :data:`SIZE` where it is known to be safe.

    A replay runs no Python: a forward that counts its calls, or reads a switch, would not notice.
    """
    if asked is None or asked is True:
        packages = {
            original_class(module).__module__.partition(".")[0] for module in model.modules()
        }
        return SIZE if asked or packages <= set(KNOWN) else 0
    return int(asked)


def _is_plain_map(x: Any) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)  # no fake, no proxy, nothing with a mind of its own
        and x.dim() == 4
        and x.layout is torch.strided
        and x.numel() > 0
    )


def _nobody_looks_in() -> bool:
    """No tracer, mode or transform: they see a call's operators, and would see none of a replay."""
    return (
        not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _len_torch_dispatch_stack() == 0
        and all(isinstance(mode, _Marker) for mode in _get_current_function_mode_stack())
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _settings(device: str) -> tuple[Any, ...]:
    """All that a call depends on besides the input and the model."""
    return (
        current_backend(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.enabled,
    )


def _inside(model: nn.Module) -> list[nn.Module]:
    """All modules but the model itself, whose hooks run around a graph as around its forward."""
    return [module for module in model.modules() if module is not model]


def _recorded(model: nn.Module) -> Recorded:
    snapshot = Guard(_inside(model), model)
    tensors = snapshot.tensors()
    return Recorded(snapshot, tensors, [t.data_ptr() for t in tensors])


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _words(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
