"""ResNet-50's layers in training at batch 256: statistics, gradients and batch norms.

Convolutions are measured in three directions: PyTorch's operator alone (``eager``), and by each
backend the training primitive, which includes what it fuses: the batch norm before the convolution,
the statistics after it, the gradient of batch norm, the ReLU mask and its sums. Where cuDNN's own
fused training graphs can be built, they are a peer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.availability import BackendUnavailable
from ...ops import training
from . import cudnn_graphs, timing
from .accuracy import relative
from .cases import Case, Row, Target, UnavailableError
from .check_others import MAPS, TINY_MAPS
from .layers import batch_of, work
from .operands import DTYPES, EPS, feature_map, vector
from .providers import LIMITS, cell
from .shapes import Layer, layers
from .training_operands import TrainingOperands, training_operands

#: Backends whose primitives are measured; one that has none is a row that says so.
BACKENDS = ("library", "cuda", "triton")

#: Convolutions before the batch norms.
HEAVIEST = 8

DIRECTIONS = ("forward", "data gradient", "weight gradient")

Call = Callable[[], Any]


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """A case for each convolution and for each map of a batch norm, the heaviest first.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    found = []
    distinct: dict[str, Layer] = {}
    for layer in layers(target.tiny):
        distinct.setdefault(layer.conv, layer)
    ranked = sorted(distinct.values(), key=lambda layer: -work(layer))
    for layer in ranked[: 1 if target.tiny else None]:
        about = {"batch": batch_of(target), "precision": precision, "fusion": "training"}
        about |= {"what": layer.conv, "count": layer.occurs}
        run = functools.partial(_convolution, target, layer, precision, about)
        found.append(Case(f"training {layer.conv}", run, about))
    for c, size in TINY_MAPS if target.tiny else MAPS:
        what = f"bn {c}, {size}x{size}"
        about = {"batch": batch_of(target), "precision": precision, "fusion": "training"}
        run = functools.partial(_batch_norm, target, c, size, precision, {**about, "what": what})
        found.append(Case(f"training {what}", run, {**about, "what": what}))
    # The heaviest convolutions, then batch norms, then the other convolutions.
    return found[:HEAVIEST] + found[len(ranked) :] + found[HEAVIEST : len(ranked)]


def forced(target: Target, backend: str, call: Call) -> Call:
    """A call whose backend is forced.

    Args:
        target: Device and sizes to run on.
        backend: Name of the backend.
        call: The call.
    """

    def run() -> Any:
        try:
            with target.forced(backend):
                return call()
        except BackendUnavailable as error:
            raise UnavailableError(str(error)) from None

    return run


def _convolution(target: Target, layer: Layer, precision: str, about: Row) -> Iterator[Row]:
    dtype, batch = DTYPES[precision], batch_of(target)
    size = batch * (layer.channels * layer.size**2 + 2 * layer.filters * layer.out**2)
    number = timing.sets(target, size * dtype.itemsize)
    with torch.no_grad():
        g = target.generator()
        rotating = [training_operands(layer, batch, dtype, g) for _ in range(number)]
        for direction in DIRECTIONS:
            # In training the truth is PyTorch's: a gradient of a whole batch in float64 takes long.
            row = {**about, "what": f"{direction} of {layer.conv}"}
            yield from _direction(target, layer, rotating, direction, precision, row)


def _direction(
    target: Target,
    layer: Layer,
    rotating: list[TrainingOperands],
    direction: str,
    precision: str,
    about: Row,
) -> Iterator[Row]:
    def ours(o: TrainingOperands) -> Call:
        if direction == "forward":
            return lambda: training.conv_forward(*o.forward(layer, True))
        needs = (direction == "data gradient", direction == "weight gradient")
        result = 0 if needs[0] else 1
        return lambda: _put_first(training.conv_backward(*o.backward(layer, True, *needs)), result)

    builds: dict[str, Callable[[], Sequence[Call]]] = {
        "eager": lambda: [_eager(layer, o, direction) for o in rotating]
    }
    for backend in BACKENDS:
        builds[backend] = functools.partial(_by, target, backend, [ours(o) for o in rotating])
    if direction == "forward":
        for backend in ("cuda", "triton"):
            name = f"{backend}, statistics"
            builds[name] = functools.partial(_statistics, target, backend, layer, rotating)
    builds["cudnn graph"] = lambda: [cudnn_graphs.call(layer, o, direction) for o in rotating]
    exact = forced(target, "library", ours(rotating[0]))()[0].double()
    plain = _eager(layer, rotating[0], direction)()
    alone = functools.partial(_distance, plain.double())
    yield from cell(
        target, builds, functools.partial(_distance, exact), LIMITS[precision], about,
        errors={"eager": alone, "cuda, statistics": alone, "triton, statistics": alone}
        if direction == "forward"
        else {"eager": alone},
    )  # fmt: skip


def _distance(truth: Tensor, result: Any) -> float:
    return relative(result if isinstance(result, Tensor) else result[0], truth)


def _put_first(results: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    return results[index], *results[:index], *results[index + 1 :]


def _by(target: Target, backend: str, calls: list[Call]) -> list[Call]:
    return [forced(target, backend, call) for call in calls]


def _statistics(
    target: Target, backend: str, layer: Layer, rotating: list[TrainingOperands]
) -> list[Call]:
    def call(o: TrainingOperands) -> Any:
        with target.operators(backend) as operators:
            return operators.conv_statistics(o.x, o.weight, None, *layer.geometry)

    return [functools.partial(call, o) for o in rotating]


def _eager(layer: Layer, o: TrainingOperands, direction: str) -> Call:
    """PyTorch's convolution alone."""
    if direction == "forward":
        return lambda: F.conv2d(o.x, o.weight, None, layer.stride, layer.padding)
    mask = [direction == "data gradient", direction == "weight gradient", False]
    stride, padding, dilation, groups = layer.geometry

    def call() -> Tensor:
        found = torch.ops.aten.convolution_backward(
            o.g, o.x, o.weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found[0] if mask[0] else found[1]

    return call


def _batch_norm(target: Target, c: int, size: int, precision: str, about: Row) -> Iterator[Row]:
    """Batch norm, addition and ReLU with the statistics of the batch, forward and backward."""
    dtype, g = DTYPES[precision], target.generator()
    shape = (batch_of(target), c, size, size)
    number = timing.sets(target, 3 * shape[0] * c * size * size * dtype.itemsize)
    with torch.no_grad():
        maps = [[feature_map(shape, dtype, g) for _ in range(3)] for _ in range(number)]
        weight, bias = vector(c, g, 0.2, 1.0), vector(c, g, 0.3)

        def eager(x: Tensor, r: Tensor) -> Tensor:
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
            return (y + r).relu_()

        def ours(operators: Any, x: Tensor, r: Tensor) -> Tensor:
            return operators.bn_add_relu(x, weight, bias, None, None, r, True, EPS, True)[0]

        builds: dict[str, Callable[[], Sequence[Call]]] = {
            "eager": lambda: [functools.partial(eager, x, r) for x, r, _ in maps]
        }
        for backend in ("cuda", "triton"):
            builds[backend] = functools.partial(_operators, target, backend, ours, maps)
        row = {**about, "what": f"forward of {about['what']}"}
        truth = eager(*maps[0][:2]).double()
        yield from cell(target, builds, functools.partial(_distance, truth), LIMITS[precision], row)

        var, mean = torch.var_mean(maps[0][0].float(), (0, 2, 3), correction=0)
        invstd = (var + EPS).rsqrt()
        y = eager(*maps[0][:2])

        def eager_backward(x: Tensor, _: Tensor, dy: Tensor) -> Tensor:
            masked = torch.ops.aten.threshold_backward(dy, y, 0)
            return torch.ops.aten.native_batch_norm_backward(
                masked, x, weight, None, None, mean, invstd, True, EPS, [True, True, True]
            )[0]

        def backward(operators: Any, x: Tensor, _: Tensor, dy: Tensor) -> Tensor:
            return operators.bn_add_relu_backward(
                dy, x, y, weight, mean, var, True, EPS, True, True
            )[0]

        builds = {"eager": lambda: [functools.partial(eager_backward, *m) for m in maps]}
        for backend in ("cuda", "triton"):
            builds[backend] = functools.partial(_operators, target, backend, backward, maps, 3)
        row = {**about, "what": f"backward of {about['what']}"}
        truth = eager_backward(*maps[0]).double()
        yield from cell(target, builds, functools.partial(_distance, truth), LIMITS[precision], row)


def _operators(
    target: Target, backend: str, call: Callable[..., Any], maps: list[list[Tensor]], of: int = 2
) -> list[Call]:
    def run(operands: list[Tensor]) -> Any:
        with target.operators(backend) as operators:
            return call(operators, *operands[:of])

    return [functools.partial(run, operands) for operands in maps]
