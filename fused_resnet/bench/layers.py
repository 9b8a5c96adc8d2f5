"""A network's forward on the CPU, operation by operation: time, arithmetic, bytes, algorithm.

Each operation is timed where it runs: a forward goes through the network as always, in its own
order and with the caches as the operation before leaves them, while a dispatch mode takes the time
of every operator that is called. Such a forward alternates with one that nobody watches; what that
one takes beyond the operators' sum is Python's and the dispatcher's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C
from ..inference.frozen_block import separate_convolutions
from ..inference.frozen_conv import FrozenConv

#: Operators of convolutions that are not this package's: what the tuner may choose for live ones.
_LIBRARY = ("aten.convolution", "mkldnn._convolution_pointwise")


@dataclass
class Layer:
    """One operator of one module, over a whole forward.

    Attributes:
        path: Of the module whose weight it computes with; the operator's name where there is none.
        operator: Its name.
        what: Kernel, stride, channels and size of the map; empty for what is no convolution.
        algorithm: How it is computed: ``direct``, ``winograd 4x4``, ``winograd 2x2``, ``block`` or
            ``library``; empty for what is no convolution.
        fused: Whether it is an operation of this package.
        calls: In one forward.
        flops: Of the direct sum, a multiplication and an addition counted as two.
        bytes: What must move at least: each input and weight read once, each result written once.
        seconds: One number a forward.
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
    """What came of a network's forwards.

    Attributes:
        layers: In the order of their first call.
        forward: Median seconds of a forward that nobody watched.
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
        """Seconds of a forward outside of every operator: Python's and the dispatcher's."""
        return self.forward - sum(layer.median for layer in self.layers)


@dataclass(frozen=True)
class Machine:
    """What the threads of this process can do at most, measured.

    Attributes:
        flops: Multiply-adds in registers, a second, each counted as two.
        read: Bytes a second from memory.
        copy: Bytes a second from memory to memory, read and written ones counted.
    """

    flops: float
    read: float
    copy: float


def machine(dtype: torch.dtype) -> Machine:
    """Measure, on PyTorch's threads as they are set; about half a second."""
    return Machine(_C.peak_flops(dtype), **_C.memory_bandwidth())


def profile(
    model: nn.Module,
    images: Tensor,
    *,
    forwards: int = 15,
    seconds: float = 10.0,
    progress: Callable[[], None] = lambda: None,
) -> Profile:
    """Time a network's operators, those of frozen residual blocks one by one.

    Args:
        model: Frozen, fused, or any other, in eval.
        images: One batch on the CPU.
        forwards: Of each kind, watched and not.
        seconds: After which there are no more, from the third on.
        progress: Called after each of them.
    """
    watch = _Watch(model)
    plain: list[float] = []
    with torch.inference_mode(), separate_convolutions(model):
        for _ in range(2):  # what is allocated, tuned or joined once
            model(images)
        began = time.perf_counter()
        for number in range(forwards):
            start = time.perf_counter()
            model(images)
            plain.append(time.perf_counter() - start)
            with watch:
                watch.forwards += 1
                model(images)
            progress()
            if number >= 2 and time.perf_counter() - began > seconds:
                break
    return Profile(watch.finished(), statistics.median(plain))


class _Watch(TorchDispatchMode):
    """Takes the time of every operator that is called while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forwards = 0
        self._layers: dict[tuple[str, str, str], Layer] = {}
        self._times: dict[tuple[str, str, str], dict[int, float]] = {}
        # By where a weight lies: hooks would make the network take other ways.
        self._paths = {
            tensor.data_ptr(): path.rpartition(".")[0]
            for path, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel()
        }
        for path, module in model.named_modules():
            if isinstance(module, FrozenConv):
                self._paths[module.packed.data_ptr()] = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        result = func(*args, **kwargs)
        elapsed = time.perf_counter() - start
        layer = self._layer(func, args, kwargs, result)
        key = (layer.path, layer.operator, layer.what)
        known = self._layers.setdefault(key, layer)
        if self.forwards == 1:  # every forward has the same calls
            known.calls += 1
            if known is not layer:
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
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        operator = schema.name.replace("::", ".")
        fused = operator.startswith("fused_resnet")
        own = operator.rpartition(".")[2] if fused else ""
        tensors = list(_tensors(given.values()))
        # The convolution's own path, not the one that it shares with its batch norm.
        weights = _tensors(given[name] for name in ("packed", "weight", "W") if name in given)
        paths = [self._paths[t.data_ptr()] for t in weights if t.data_ptr() in self._paths]
        path = _common(paths) or operator
        moved = sum(_bytes(t) for t in (*tensors, *_tensors([result])))
        if own.startswith("conv_bn") or operator in _LIBRARY:
            return _conv(path, operator, given, result)
        flops = 2 * result.numel() * given["input"].shape[-1] if operator == "aten.linear" else 0
        return Layer(path, operator, "", "", fused, flops=flops, bytes=moved)


def _conv(path: str, operator: str, given: dict[str, Any], y: Tensor) -> Layer:
    x = given.get("x", given.get("input", given.get("X")))
    assert x is not None
    weight = given.get("weight", given.get("W"))
    shape = list(given["weight_shape"] if weight is None else weight.shape)
    stride, padding, dilation = (list(given[n]) for n in ("stride", "padding", "dilation"))
    groups = given["groups"]
    k, depth, kh, kw = shape
    n, c, h, w = x.shape
    oh, ow = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, p, d, taps, s in zip((h, w), padding, dilation, (kh, kw), stride, strict=True)
    )
    packed: Any = given.get("packed", weight)
    residual = given.get("residual", given.get("other"))
    algorithm = "direct"
    if operator.startswith("fused_resnet_library") or operator in _LIBRARY:
        algorithm = "library"
    elif "winograd" in given:
        algorithm = _C.conv_algorithm(
            list(x.shape), shape, stride, padding, dilation, groups, x.dtype, given["winograd"]
        )
    # With a stride beyond the kernel not every pixel is read.
    read = n * c * min(h, oh * kh) * min(w, ow * kw) * x.element_size()
    moved = read + _bytes(packed) + _bytes(y) + (0 if residual is None else _bytes(residual))
    slash = f"/{stride[0]}" if stride[0] > 1 else ""
    what = f"{kh}x{kw}{slash} {c} to {k}, {h}x{w}"
    what += f", {groups} groups" if groups > 1 else ""
    what += ", residual" if residual is not None else ""
    what += ", max-pool" if "pool_kernel" in given else ""
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
    """The innermost module that holds them all."""
    parts = [path.split(".") for path in dict.fromkeys(paths)]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def rows(found: Profile, top: Machine) -> list[dict[str, Any]]:
    """A JSON row for each layer, then ``total`` and ``outside``."""
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
