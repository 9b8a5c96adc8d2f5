"""Training units on CUDA under ``auto``: the fastest convolution of each layer, in each direction.

The candidates are Triton's kernels; those in CUDA C++, whose batch norm before the convolution is a
pass of its own and whose weight gradient is PyTorch's; and PyTorch's convolutions between Triton's
passes, behind the same calls. What is kept for backward does not depend on who computed it, so that
forward and backward are timed, and chosen, apart. All other primitives are Triton's. Where nothing
may be timed no unit runs, and operations run one by one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..backends.availability import current_backend, resolve_backend
from ..tuning import tuner
from .registry import OPERATORS, primitives_of
from .training_tuned_cpu import cpu_primitives

#: The name of this choice among the backends of units.
TUNED = "tuned"

#: Those that have the training primitives by themselves.
UNIT_BACKENDS = ("cpu", "cuda", "library", "triton")

#: The candidate that runs without timings.
_DEFAULT = "library"


def unit_backend(x: Tensor) -> str:
    """Whose primitives compute a training unit; empty where its operations run one by one.

    Args:
        x: The input, whose device and dtype count.
    """
    backend = resolve_backend("training_unit", x)
    if backend != "cuda" or current_backend() != "auto":
        return backend if backend in UNIT_BACKENDS else ""
    if torch.compiler.is_compiling() or tuner.mode() == "0":
        return ""
    return TUNED if _triton_runs(x.device) else ""


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton compiles and launches here: without a C compiler, for example, it cannot.

    Every other backend on CUDA does without Triton: its failure is no error but a warning, once.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        zero = torch.zeros(1, device=device)
        primitives_of("triton").bn_coefficients(zero, zero, None, None, 1.0)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"fused_resnet: training without Triton, which fails: {first}", stacklevel=2)
        return False
    return True


def unit_primitives(backend: str) -> Any:
    """The training primitives of a backend, or those that are chosen call by call.

    Args:
        backend: One of :data:`UNIT_BACKENDS`, or :data:`TUNED`.
    """
    if backend == "cpu":
        return cpu_primitives()
    return _tuned() if backend == TUNED else primitives_of(backend)


@functools.cache
def _tuned() -> Any:
    own = primitives_of("triton")
    chosen = {
        "conv_forward": _conv_forward,
        "conv_bn_forward": _conv_bn_forward,
        "conv_backward": _conv_backward,
    }
    return SimpleNamespace(**{**vars(own), **chosen})


@functools.cache
def _candidates() -> dict[str, Any]:
    """The candidates' convolutions, forward and backward, by the names of their backends."""
    kernels = importlib.import_module("fused_resnet.backends.triton")
    names = ("conv_forward", "conv_bn_forward", "conv_backward")
    around = {name: functools.partial(getattr(kernels, name), pytorch=True) for name in names}
    cuda = primitives_of("cuda")
    own = {"conv_forward": cuda.conv_forward, "conv_backward": cuda.conv_backward}
    return {
        "triton": OPERATORS["triton"],
        "cuda": SimpleNamespace(**own, conv_bn_forward=_cuda_bn),
        "library": SimpleNamespace(**around),
    }


def _cuda_bn(
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    momentum: float,
    eps: float,
    winograd: bool,
    activation: int = 1,
) -> tuple[Tensor, ...]:
    """``conv_bn_forward``: the convolution in CUDA C++, and then Triton for the numbers."""
    z, mean, var = primitives_of("cuda").conv_forward(
        x, x_scale, x_shift, weight, stride, padding, dilation, groups, True, winograd, activation
    )
    triton = primitives_of("triton")
    if running_mean is not None and running_var is not None:
        count = z.shape[0] * z.shape[2] * z.shape[3]
        triton.bn_update_running(mean, var, running_mean, running_var, momentum, count)
    if batches is not None:
        batches.add_(1)
    return z, mean, var, *triton.bn_coefficients(mean, var, bn_weight, bn_bias, eps)


def _choose(op: str, arguments: tuple[Any, ...]) -> Any:
    """The candidate for a call, with its operators as attributes."""
    candidates = _candidates()
    return candidates[tuner.choose(op, _DEFAULT, candidates, arguments)]


def _conv_forward(*arguments: Any) -> Any:
    return _choose("conv_forward", arguments).conv_forward(*arguments)


def _conv_bn_forward(*arguments: Any) -> Any:
    # By the times of conv_forward: a call that is timed runs many times, and this one writes.
    x, x_scale, x_shift, weight, *rest = arguments
    timed = (x, x_scale, x_shift, weight, *rest[5:9], True, *rest[11:])
    return _choose("conv_forward", timed).conv_bn_forward(*arguments)


def _conv_backward(*arguments: Any) -> Any:
    return _choose("conv_backward", arguments).conv_backward(*arguments)
