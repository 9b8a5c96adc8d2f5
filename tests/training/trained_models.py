"""A training step of a model by an emulated backend, beside float64 and PyTorch's own.

Maps are in half precision by autocast, parameters and statistics in float32. A gradient may be 1.5
times as far from float64 as PyTorch's own, over all parameters together: which element's ReLU turns
by rounding is chance, and alike for both.
"""

from __future__ import annotations

import copy
import re

import emulation
import torch
from networks import image
from tolerances import RATIO
from torch import Tensor, nn

import fused_resnet as fr


def launched(backend: str) -> list[str]:
    """The kernels since the last question, by their names in the source."""
    if backend == "triton":
        return [launch.kernel for launch in emulation._interpreter().launches()]
    names = [launch.kernel for launch in emulation._simulator().launches()]
    return [re.sub(r"^void |fr::|[<(].*$", "", name) for name in names]


def gradients(model: nn.Module, x: Tensor, backend: str, autocast: torch.dtype | None) -> dict:
    """The result, all gradients, and the running statistics after a step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    own = backend in emulation.NAMES
    with (
        emulation.emulated(backend) if own else fr.use_backend(backend),
        torch.autocast("cpu", autocast, enabled=autocast is not None),
    ):
        y = model(x)
        (y.double() * image(*y.shape, seed=3)).sum().backward()
        kernels = launched(backend) if own else []
    found = {"y": y.detach(), "x": x.grad}
    found |= {k: p.grad for k, p in model.named_parameters()}
    found |= {k: b.clone() for k, b in model.named_buffers() if "running" in k}
    counters = {k: int(b) for k, b in model.named_buffers() if not b.is_floating_point()}
    return {"found": found, "kernels": kernels, "counters": counters}


def distance(found: dict, truth: dict, names: list[str]) -> float:
    """Root mean square of the relative errors."""
    errors = [
        ((found[k].double() - truth[k]).norm() / truth[k].norm().clamp(min=1e-12)).item()
        for k in names
    ]
    return sum(e * e for e in errors) ** 0.5 / len(errors) ** 0.5


def assert_trained_as_exactly(
    backend: str, exact: nn.Module, x: Tensor, dtype: torch.dtype
) -> list[str]:
    """Trains three copies of a model one step; the kernels of the backend that ran."""
    with torch.no_grad():
        for p in exact.parameters():  # so that casting them is no part of the error
            p.copy_(p.to(dtype))
    exact = exact.double().train()
    eager, ours = (copy.deepcopy(exact).float() for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last)
    truth = gradients(exact, x.double(), "reference", None)
    theirs = gradients(eager, x, "reference", dtype)
    found = gradients(ours, x, backend, dtype)
    assert found["counters"] == truth["counters"]
    for name, value in theirs["found"].items():
        assert found["found"][name].dtype is value.dtype, name
    for part in ("statistics", "gradients"):
        names = [k for k in truth["found"] if ("running" in k) == (part == "statistics")]
        a, b = (distance(run["found"], truth["found"], names) for run in (found, theirs))
        print(f"{part}: {a:.2e}, PyTorch's own {b:.2e}")
        assert a <= RATIO * b, f"{part}: error {a:.2e}, PyTorch's own {b:.2e}"
    return found["kernels"]
