"""Inference of the whole network: eager, compiled, frozen and fused, by each backend."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ... import freeze, fuse
from ...models import resnet
from ..gpu_cells import settings
from . import plain, timing
from .accuracy import relative
from .cases import Case, Row, Target
from .operands import DTYPES
from .providers import LIMITS

#: Images that are checked in float64, and seconds of a turn.
CHECKED, TURN = 2, 0.1

#: By batch, the most important first. ``auto`` is what the tuner chooses; ``graph`` replays a CUDA
#: graph of the same call.
PROVIDERS = {
    "large": ("eager", "frozen, cuda", "frozen, triton", "frozen, auto", "compile", "fused, cuda",
              "fused, triton", "fused, auto"),
    "one": ("eager", "eager, graph", "frozen, auto", "frozen, auto, graph", "frozen, cuda, graph",
            "frozen, triton, graph", "compile", "compile, graph"),
}  # fmt: skip

#: In a rehearsal the interpreter of a whole network takes seconds: one of each path is enough.
TINY_PROVIDERS = {
    "large": ("eager", "frozen, cuda", "fused, triton", "compile"),
    "one": ("eager, graph", "frozen, auto"),
}


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """A case for each provider at each batch.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    found = []
    chosen = TINY_PROVIDERS if target.tiny else PROVIDERS
    for size, batch in (("large", plain.batch_of(target)), ("one", 1)):
        for provider in chosen[size]:
            about: Row = {"kind": "time", "what": f"inference of {plain.name_of(target)}"}
            about |= {"provider": provider, "batch": batch, "precision": precision, "unit": "ms"}
            run = functools.partial(run_provider, target, provider, batch, precision, about)
            found.append(Case(f"{provider}, batch {batch}", run, about))
    return found


def fusible(tiny: bool) -> nn.Module:
    """The network that is fused or frozen, with the unfused one's parameters.

    Args:
        tiny: Whether it is a rehearsal.
    """
    model = plain.unfused(tiny)
    if any(isinstance(m, plain.UnfusedBatchNorm) for m in model.modules()):
        model = resnet.resnet50()
        model.load_state_dict(plain.parameters(tiny))
    return model.eval()


def run_provider(
    target: Target, provider: str, batch: int, precision: str, about: Row
) -> Iterator[Row]:
    """The row of a provider.

    Args:
        target: Device and sizes to run on.
        provider: Name of the provider, with the backend that is forced.
        batch: Number of images.
        precision: A key of :data:`.operands.DTYPES`.
        about: Keys of the row.
    """
    kind, *how = provider.split(", ")
    graph = "graph" in how
    backend = next((name for name in how if name != "graph"), "auto")
    dtype = DTYPES[precision]
    with settings(precision), target.forced(backend):
        network = _network(kind, target, dtype, about)
        with torch.inference_mode():
            rotating = [plain.images(target, batch, dtype, seed) for seed in range(2)]
            truth = _exact(target, rotating[0][:CHECKED])
            calls: list[Callable[[], Any]] = [functools.partial(network, x) for x in rotating]
            error = relative(calls[0]()[:CHECKED], truth)
            if not error <= LIMITS[precision]:
                reason = f"relative error {error:.1e}, limit {LIMITS[precision]:.1e}"
                yield {**about, "status": "wrong", "reason": reason}
                return
            found = timing.times({provider: calls}, target, graph, TURN)[provider]
    row = {**about, "status": "ok", "error": error, **timing.summary(found, "ms")}
    if row["status"] == "ok":
        row["images_per_s"] = batch / row["median"] * 1e3
    yield row


def _exact(target: Target, images: Tensor) -> Tensor:
    # The same rounded weights in all: the difference is one of arithmetic.
    model = plain.unfused(target.tiny).to(images.dtype)
    with target.forced("reference"):
        return copy.deepcopy(model).double().to(target.device)(images.double())


def _network(kind: str, target: Target, dtype: torch.dtype, about: Row) -> Callable[..., Any]:
    if kind in ("eager", "compile"):
        model = plain.channels_last(plain.unfused(target.tiny), target, dtype)
        mode = about.get("mode")
        return model if kind == "eager" else plain.compiled(model, target, mode)
    model = fusible(target.tiny)
    if kind == "frozen":
        return freeze(model.to(target.device), dtype=dtype)
    return fuse(plain.channels_last(model, target, dtype))
