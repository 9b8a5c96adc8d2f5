"""Parameters and comparisons for the tests of modules and networks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw every normalisation's statistics and affine parameters: fresh ones are 0 and 1.

    The last one of a residual branch is small, as in trained networks, so that activations do not
    grow from block to block.
    """
    g = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if not hasattr(module, "running_mean"):
            continue
        last = name.rpartition(".")[2] in ("bn2", "bn3")
        for key, low, high in (
            ("weight", 0.2, 0.5 if last else 1.5),
            ("bias", -0.3, 0.3),
            ("running_mean", -0.3, 0.3),
            ("running_var", 0.5, 2.0),
        ):
            tensor = getattr(module, key)
            if tensor is not None:
                draw = torch.rand(tensor.shape, generator=g, dtype=torch.float64)
                tensor.data.copy_(low + (high - low) * draw)
    return model


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    """A batch of noise, the same for the same shape and seed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def results(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and parameters, and buffers after one call and one backward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad()
    y = model(*leaves)
    outputs = y if isinstance(y, dict) else {"y": y}
    # Weights for the sum, so that no gradient cancels.
    sum((v * image(*v.shape, dtype=v.dtype, seed=3)).sum() for v in outputs.values()).backward()
    found = {f"output {k}": v.detach() for k, v in outputs.items()}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {f"grad of {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {k}": b.clone() for k, b in model.named_buffers()}
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9) -> None:
    """Tensors agree within ``limit`` relative to their norm or 1; integers are equal."""
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        if not truth.is_floating_point():
            assert torch.equal(got[name], truth), name
            continue
        distance = (got[name].double() - truth.double()).norm().item()
        scale = max(truth.double().norm().item(), 1.0)
        assert distance <= limit * scale, f"{name}: relative distance {distance / scale:.1e}"


def in_threads(work: Callable[[Any], None], *arguments: Any) -> None:
    """Run ``work`` on each argument concurrently, each in its own thread."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
