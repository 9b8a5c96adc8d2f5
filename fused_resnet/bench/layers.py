"""A network's forward on the CPU, operation by operation: time, arithmetic, bytes, algorithm.

Each operation is timed inside a whole forward, in its order and with the caches as the previous
operation leaves them: a dispatch mode measures every operator. Those of a program's step are added
up, and what the step does is read from the program (:mod:`fused_resnet.inference.explain`). Such a
forward alternates with an unobserved one, whose time beyond the sum of the operators is spent in
Python and the dispatcher.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C
from ..inference.explain import ExplainedStep, Explainer, describe, geometry
from ..inference.frozen_conv import FrozenConv
from ..inference.program import BoundProgram
from ..inference.run_steps import separate_operations

#: Operators of PyTorch's convolutions, which the tuner may choose for live weights.
_LIBRARY = ("aten.convolution", "mkldnn._convolution_pointwise")


@dataclass
class Layer:
    """One operator of one module, over a whole forward.

    Attributes:
        path: Path of the module that owns the weight; the operator's name if there is none.
        operator: Name of the operator.
        what: Kernel, stride, channels and size of a convolution; empty for other operators.
        algorithm: ``direct``, ``winograd 4x4``, ``winograd 2x2``, ``block`` or ``library`` for a
            convolution; empty for other operators.
        fused: Whether it is an operation of this package.
        calls: Number of calls in one forward.
        flops: Flops of the direct algorithm, a multiplication and an addition counted as two.
        bytes: Minimal traffic: each input and weight read once, each result written once.
        seconds: Time in each forward.
    """

    path: str
    operator: str
    what: str
    algorithm: str
    fused: bool
    calls: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds in one forward."""
        return statistics.median(self.seconds)


@dataclass
class Profile:
    """Times of a network's operators.

    Attributes:
        layers: The operators in the order of their first call.
        forward: Median seconds of an unobserved forward.
    """

    layers: list[Layer]
    forward: float

    @property
    def fused(self) -> list[Layer]:
        """Operations of this package."""
        return [layer for layer in self.layers if layer.fused]

    @property
    def others(self) -> list[Layer]:
        """PyTorch's operators."""
        return [layer for layer in self.layers if not layer.fused]

    @property
    def outside(self) -> float:
        """Seconds of a forward outside of all operators, in Python and the dispatcher."""
        return self.forward - sum(layer.median for layer in self.layers)


@dataclass(frozen=True)
class Machine:
    """Measured limits of the threads of this process.

    Attributes:
        flops: Flops per second of multiply-adds in registers, each counted as two.
        read: Bytes per second read from memory.
        copy: Bytes per second copied in memory, reads and writes both counted.
    """

    flops: float
    read: float
    copy: float


def machine(dtype: torch.dtype) -> Machine:
    """Measure the limits on PyTorch's threads, in about half a second.

    Args:
        dtype: Storage type of the products.
    """
    return Machine(_C.peak_flops(dtype), **_C.memory_bandwidth())


def profile(
    model: nn.Module,
    images: Tensor,
    *,
    forwards: int = 15,
    seconds: float = 10.0,
    progress: Callable[[], None] = lambda: None,
) -> Profile:
    """Time a network's operators; the convolutions of frozen blocks run as separate operations.

    Args:
        model: A frozen, fused or other network, in eval mode.
        images: One batch on the CPU.
        forwards: Number of forwards of each kind, observed and unobserved.
        seconds: Time limit, which applies after the third of them.
        progress: Called after each pair of forwards.
    """
    timer = _Timer(model)
    plain: list[float] = []
    with torch.inference_mode(), separate_operations(timer.run_step):
        for _ in range(2):  # allocates, tunes and packs
            model(images)
        began = time.perf_counter()
        for number in range(forwards):
            start = time.perf_counter()
            model(images)
            plain.append(time.perf_counter() - start)
            with timer:
                timer.forwards += 1
                model(images)
            progress()
            if number >= 2 and time.perf_counter() - began > seconds:
                break
    return Profile(timer.finished(), statistics.median(plain))


class _Timer(TorchDispatchMode):
    """Measures the time of every operator that is called while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forwards = 0
        self._layers: dict[tuple[str, str, str], Layer] = {}
        self._times: dict[tuple[str, str, str], dict[int, float]] = {}
        # Modules by the addresses of their weights: hooks would disable fusion.
        self._paths = {
            tensor.data_ptr(): path.rpartition(".")[0]
            for path, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel()
        }
        for path, module in model.named_modules():
            if isinstance(module, FrozenConv):
                self._paths[module.packed.data_ptr()] = path
        self._explainer = Explainer(model)
        self._steps: dict[tuple[BoundProgram, torch.Size], list[Layer]] = {}
        self._step: Layer | None = None  # the program's step that runs
        self._begins = False  # whether none of its operators was called yet

    def run_step(
        self, program: BoundProgram, index: int, x: Tensor, run: Callable[[], Tensor]
    ) -> Tensor:
        """Run a step of a program, whose operators' times are added up."""
        key = (program, x.shape)
        if key not in self._steps:
            steps = self._explainer(program, x).steps
            self._steps[key] = [_layer_of(step, x.element_size()) for step in steps]
        self._step, self._begins = self._steps[key][index], True
        try:
            return run()
        finally:
            self._step = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        result = func(*args, **kwargs)
        elapsed = time.perf_counter() - start
        layer = self._step or self._layer(func, args, kwargs, result)
        key = _key(layer)
        if self.forwards == 1 and (self._step is None or self._begins):
            self._begins = False  # every forward has the same calls
            known = self._layers.setdefault(key, replace(layer, flops=0, bytes=0))
            known.calls += 1
            known.flops += layer.flops
            known.bytes += layer.bytes
        times = self._times.setdefault(key, {})
        times[self.forwards] = times.get(self.forwards, 0.0) + elapsed
        return result

    def finished(self) -> list[Layer]:
        for key, layer in self._layers.items():
            layer.seconds = list(self._times[key].values())
        return list(self._layers.values())

    def _layer(self, func: Any, args: Any, kwargs: Any, result: Any) -> Layer:
        schema = func._schema
        values = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        operator = schema.name.replace("::", ".")
        fused = operator.startswith("fused_resnet")
        own = operator.rpartition(".")[2] if fused else ""
        tensors = list(_tensors(values.values()))
        # The convolution's path, not the common one with its batch norm.
        weights = _tensors(values[name] for name in ("packed", "weight", "W") if name in values)
        paths = [self._paths[t.data_ptr()] for t in weights if t.data_ptr() in self._paths]
        path = _common(paths) or operator
        moved = sum(_bytes(t) for t in (*tensors, *_tensors([result])))
        if own.startswith("conv_bn") or operator in _LIBRARY:
            return _conv(path, operator, values, result)
        flops = 2 * result.numel() * values["input"].shape[-1] if operator == "aten.linear" else 0
        return Layer(path, operator, "", "", fused, flops=flops, bytes=moved)


def _key(layer: Layer) -> tuple[str, str, str]:
    return layer.path, layer.operator, layer.what


def _layer_of(explained: ExplainedStep, itemsize: int) -> Layer:
    """A program's step without its time."""
    step, (n, c, *pixels) = explained.step, explained.x
    if step.operation == "conv":  # with a stride beyond the kernel not every pixel is read
        reach = zip(pixels, explained.result[2:], step.kernel, strict=True)
        pixels = [min(size, count * taps) for size, count, taps in reach]
    results = (1 + (step.residual >= 0)) * math.prod(explained.result)
    return Layer(
        explained.path or step.operation,
        step.operation,
        describe(explained),
        explained.algorithm,
        True,
        flops=explained.flops,
        bytes=(n * c * math.prod(pixels) + results) * itemsize + explained.weight_bytes,
    )


def _conv(path: str, operator: str, values: dict[str, Any], y: Tensor) -> Layer:
    """A convolution outside of programs."""
    x = values.get("x", values.get("input", values.get("X")))
    weight: Any = values.get("packed", values.get("weight", values.get("W")))
    assert x is not None
    shape = list(values.get("weight_shape", weight.shape))
    stride, padding, dilation = (list(values[n]) for n in ("stride", "padding", "dilation"))
    groups = values["groups"]
    k, depth, kh, kw = shape
    n, c, h, w = x.shape
    oh, ow = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, p, d, taps, s in zip((h, w), padding, dilation, (kh, kw), stride, strict=True)
    )
    residual = values.get("residual", values.get("other"))
    algorithm = "direct"
    if operator.startswith("fused_resnet_library") or operator in _LIBRARY:
        algorithm = "library"
    elif "winograd" in values:
        algorithm = _C.conv_algorithm(
            list(x.shape), shape, stride, padding, dilation, groups, x.dtype, values["winograd"]
        )
    # With a stride beyond the kernel not every pixel is read.
    read = n * c * min(h, oh * kh) * min(w, ow * kw) * x.element_size()
    moved = read + _bytes(weight) + _bytes(y) + (0 if residual is None else _bytes(residual))
    what = geometry(x.shape, k, (kh, kw), stride, groups)
    what += ", residual" if residual is not None else ""
    what += ", max-pool" if "pool_kernel" in values else ""
    flops = 2 * n * oh * ow * k * depth * kh * kw
    fused = operator.startswith("fused_resnet")
    return Layer(path, operator, what, algorithm, fused, flops=flops, bytes=moved)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _common(paths: list[str]) -> str:
    """The innermost module that contains all paths."""
    parts = [path.split(".") for path in dict.fromkeys(paths)]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def rows(found: Profile, top: Machine) -> list[dict[str, Any]]:
    """A JSON row for each layer, then ``total`` and ``outside``.

    Args:
        found: The times.
        top: The machine's limits.
    """
    result = [_row(layer, found, top) for layer in found.layers]
    fused = found.fused
    total = Layer(
        "total",
        "",
        "",
        "",
        True,
        sum(layer.calls for layer in fused),
        sum(layer.flops for layer in fused),
        sum(layer.bytes for layer in fused),
        [sum(layer.median for layer in fused)],
    )
    outside = Layer("outside", "", "", "", False, seconds=[found.outside])
    return [*result, _row(total, found, top), _row(outside, found, top)]


def _row(layer: Layer, found: Profile, top: Machine) -> dict[str, Any]:
    seconds = layer.median
    rate = math.inf if seconds <= 0 else 1 / seconds
    return {
        "path": layer.path,
        "operator": layer.operator,
        "what": layer.what,
        "algorithm": layer.algorithm,
        "fused": layer.fused,
        "calls": layer.calls,
        "ms": seconds * 1e3,
        "share_of_forward": seconds / found.forward,
        "gflop": layer.flops / 1e9,
        "gflops_per_s": layer.flops * rate / 1e9,
        "share_of_peak": layer.flops * rate / top.flops,
        "mb": layer.bytes / 1e6,
        "gb_per_s": layer.bytes * rate / 1e9,
        "share_of_bandwidth": layer.bytes * rate / top.read,
    }
