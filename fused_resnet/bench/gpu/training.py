"""A training step of the whole network: eager, compiled, and ours by each backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import fuse
from ..gpu_cells import settings
from . import plain, timing
from .accuracy import relative
from .cases import Case, Row, Target
from .networks import fusible
from .providers import LIMITS

#: The most important first: what a user gets, then what each backend gives when it is forced.
PROVIDERS = ("eager", "fused, auto", "fused, triton", "fused, cuda", "compile", "fused, library",
             "eager, again")  # fmt: skip
TINY_PROVIDERS = ("eager", "fused, cuda", "fused, triton", "compile")

#: Seconds of a turn.
TURN = 0.3


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """A case for each provider.

    Args:
        target: Device and sizes to run on.
        precision: Precision of autocast, a key of :data:`.operands.DTYPES`.
    """
    found = []
    for provider in TINY_PROVIDERS if target.tiny else PROVIDERS:
        about: Row = {"kind": "time", "what": f"training step of {plain.name_of(target)}"}
        about |= {"provider": provider, "batch": plain.batch_of(target), "unit": "ms"}
        about["precision"] = precision
        run = functools.partial(run_provider, target, provider, precision, about)
        found.append(Case(f"training, {provider}", run, about))
    return found


def run_provider(target: Target, provider: str, precision: str, about: Row) -> Iterator[Row]:
    """The row of a provider.

    Args:
        target: Device and sizes to run on.
        provider: Name of the provider, with the backend that is forced.
        precision: Precision of autocast, a key of :data:`.operands.DTYPES`.
        about: Keys of the row.
    """
    kind, _, backend = provider.partition(", ")
    forced = backend if kind == "fused" else "auto"
    with settings("tf32"), target.forced(forced):
        step = _step(target, kind, precision, about)
        exact = _loss(target, step)
        before = _memory(target)
        step()
        assert step.loss is not None
        error = relative(step.loss.reshape(1), exact.double().reshape(1))
        peak = _peak(target) - before
        if not error <= LIMITS[precision]:
            reason = f"the first loss is off by {error:.1e}, limit {LIMITS[precision]:.1e}"
            yield {**about, "status": "wrong", "reason": reason}
            return
        found = timing.times({provider: [step]}, target, False, TURN)[provider]
    row = {**about, "status": "ok", "error": error, "memory_gib": peak / 2**30}
    row |= timing.summary(found, "ms")
    if row["status"] == "ok":
        row["images_per_s"] = about["batch"] / row["median"] * 1e3
    yield row
    del step, found
    if target.is_card:
        torch.cuda.empty_cache()


def _step(target: Target, kind: str, precision: str, about: Row) -> plain.TrainingStep:
    if kind != "fused":
        return plain.training_step(
            target, precision, about.get("mode") if kind == "compile" else ""
        )
    network = fuse(plain.channels_last(fusible(target.tiny).train(), target))
    return plain.TrainingStep(network, target, precision)


@torch.no_grad()
def _loss(target: Target, step: plain.TrainingStep) -> torch.Tensor:
    """The unfused network's first loss, in float32."""
    model = plain.unfused(target.tiny).train().to(target.device)
    with target.forced("reference"):
        return F.cross_entropy(model(step.images), step.labels)


def _memory(target: Target) -> int:
    if not target.is_card:
        return 0
    torch.cuda.synchronize(target.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(target.device)
    return torch.cuda.memory_allocated(target.device)


def _peak(target: Target) -> int:
    return torch.cuda.max_memory_allocated(target.device) if target.is_card else 0
