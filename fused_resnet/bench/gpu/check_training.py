"""The training primitives of a backend on ResNet-50's shapes, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...backends import reference_training as reference
from ...backends.availability import BackendUnavailable
from ...ops import training
from .cases import Case, Row, Target, UnavailableError
from .check_conv import batch_of, compared
from .operands import DTYPES, EPS, feature_map
from .shapes import Layer, layers, stem
from .training_operands import TrainingOperands, training_operands


def cases(target: Target, backend: str, shard: int = 0, shards: int = 1) -> list[Case]:
    """The cases of a backend.

    Args:
        target: Device and sizes to run on.
        backend: Backend whose primitives are checked, a name that ``use_backend`` takes.
        shard: Index of the part of the cases to return, from 0.
        shards: Number of parts, each for a process of its own.
    """
    found = []
    for precision in ("bfloat16",) if target.tiny else ("bfloat16", "float16"):
        about = {"operation": "conv_forward", "backend": backend, "precision": precision}
        for layer in layers(target.tiny)[: 2 if target.tiny else None]:
            row = {**about, "what": layer.conv}
            run = functools.partial(_convolution, target, backend, layer, row)
            found.append(Case(f"{backend}: {layer.what}, training, {precision}", run, row))
        for layer in _ends(target.tiny):
            row = {**about, "operation": "block_end", "what": layer.conv}
            run = functools.partial(_end, target, backend, layer, row)
            found.append(Case(f"{backend}: end of {layer.what}, {precision}", run, row))
        row = {**about, "operation": "stem_end", "what": stem(target.tiny).conv}
        run = functools.partial(_stem, target, backend, row)
        found.append(Case(f"{backend}: stem, training, {precision}", run, row))
    return found[shard::shards]


def _ends(tiny: bool) -> list[Layer]:
    return [layer for layer in layers(tiny) if layer.add]


def _forced(target: Target, backend: str, name: str, arguments: tuple[Any, ...]) -> Any:
    """A primitive by the backend that the case is about."""
    try:
        with target.forced(backend):
            return getattr(training, name)(*arguments)
    except BackendUnavailable as error:
        raise UnavailableError(str(error)) from None


def _probe(target: Target, backend: str) -> None:
    """Ask a backend without primitives before the truth is computed, which takes longest.

    Raises:
        UnavailableError: It has none.
    """
    one = torch.ones(8, device=target.device)
    _forced(target, backend, "bn_coefficients", (one, one, one, one, EPS))


def _rows(
    target: Target,
    backend: str,
    about: Row,
    name: str,
    plan: str,
    arguments: tuple[Any, ...],
    exact: tuple[Any, ...],
    keep: Callable[[Any], list[Any]] = list,
) -> Row:
    """A row for one primitive; PyTorch's own calls behind the same signature are the measure."""
    with target.forced("library"):
        own = keep(_tuple(getattr(training, name)(*arguments)))
    truth = keep(_tuple(getattr(reference, name)(*exact)))
    call = functools.partial(_forced, target, backend, name, arguments)
    dtype = DTYPES[about["precision"]]
    row = {**about, "operation": name, "plan": plan}
    return compared(target, lambda: keep(_tuple(call())), own, truth, dtype, row)


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.double().contiguous() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


def _convolution(target: Target, backend: str, layer: Layer, about: Row) -> Iterator[Row]:
    _probe(target, backend)
    dtype = DTYPES[about["precision"]]
    with torch.no_grad():
        o = training_operands(layer, batch_of(target), dtype, target.generator())
        wide: TrainingOperands = o.double()
        for prologue in (False, True):
            plan = "with a prologue" if prologue else "plain"
            arguments = o.forward(layer, prologue), wide.forward(layer, prologue)
            yield _rows(target, backend, about, "conv_forward", plan, *arguments)
            for needs in ((True, False), (False, True), (True, True)):
                wanted = " and ".join(
                    name for name, need in zip(("data", "weight"), needs, strict=True) if need
                )
                arguments = (
                    o.backward(layer, prologue, *needs), wide.backward(layer, prologue, *needs),
                )  # fmt: skip
                yield _rows(
                    target, backend, about, "conv_backward", f"{wanted}, {plan}", *arguments
                )


def _end(target: Target, backend: str, layer: Layer, about: Row) -> Iterator[Row]:
    """The end of a block: with its identity, and with a projection."""
    _probe(target, backend)
    dtype, batch = DTYPES[about["precision"]], batch_of(target)
    with torch.no_grad():
        o = training_operands(layer, batch, dtype, target.generator())
        z, s, scale, shift = o.z, o.g, o.a, o.b
        dy = feature_map(layer.result(batch), dtype, target.generator())
        for plan, vectors in (("identity", (None, None)), ("projection", (o.a, o.c))):
            arguments = (z, scale, shift, s, *vectors, True)
            yield _rows(target, backend, about, "block_end", plan, arguments, _double(arguments))
            y = reference.block_end(*_double(arguments)).to(dtype)
            side = (s, o.c) if plan == "projection" else (None, None)
            arguments = (dy, y, z, o.b, *side, True)
            yield _rows(
                target, backend, about, "block_end_backward", plan, arguments, _double(arguments)
            )
        means = (o.a, o.b.abs() + 0.5, o.c, o.a, EPS)
        yield _rows(target, backend, about, "bn_coefficients", "", means, _double(means))
        sums = (o.a, o.b, o.c, o.b.abs() + 0.5, o.a, EPS, 1000)
        yield _rows(target, backend, about, "bn_backward_coefficients", "", sums, _double(sums))


def _stem(target: Target, backend: str, about: Row) -> Iterator[Row]:
    _probe(target, backend)
    dtype, batch, layer = DTYPES[about["precision"]], batch_of(target), stem(target.tiny)
    pool = ([3, 3], [2, 2], [1, 1])
    with torch.no_grad():
        o = training_operands(layer, batch, dtype, target.generator())
        arguments = (o.z, o.a, o.b, *pool)
        # Rounded values tie where exact ones don't, so where the maximum lies is not compared.
        yield _rows(
            target, backend, about, "stem_end", "", arguments, _double(arguments), lambda r: [r[0]]
        )
        with target.forced("library"):
            y, index = training.stem_end(*arguments)
        dy = torch.empty_like(y).normal_(generator=target.generator())
        backward: tuple[Any, ...] = (dy, index, o.z, o.a, o.b, o.c, *pool, True)
        yield _rows(target, backend, about, "stem_end_backward", "", backward, _double(backward))
