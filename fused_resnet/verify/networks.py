"""Whole networks against float64: inference, and one training step.

The training step has two kinds of parameters, because the gradient of ReLU is discontinuous: an
activation whose sign changes by rounding changes every gradient before it, and on small maps
PyTorch's own float32 gradients differ from float64 by 1e-2. In float64, with ordinary parameters,
no sign changes, and fused and unfused must agree in every tensor. In float32 the parameters keep
every activation away from zero (:func:`_clear_of_kinks`), so that errors are those of arithmetic
alone and their ratio is sharp.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr

from ..backends.availability import use_backend
from ..bench.calibration import batch_norms, last_batch_norms
from ..bench.networks import random_model
from .rows import Comparison, Row, compare, relative_error, worst

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

#: Images of 64x64 leave 2x2 in the last stage; a batch of 4 gives its batch norms 16 values each.
BATCH, SIZE = 4, 64

#: Seeds of parameters and images. The error of a deep network averages over enough terms for one.
SEEDS = {"resnet101": (0,), "resnet152": (0,)}
DEFAULT_SEEDS = (0, 1)

#: In float32 Winograd's algorithm trades digits for speed: up to this error it passes whatever the
#: ratio.
WINOGRAD_BOUND = 5e-6

#: Bound in float64, where the unfused network is the truth.
FLOAT64_BOUND = 1e-9


def verify_networks(
    models: Sequence[str] = MODELS,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    backend: str = "auto",
    seeds: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """Rows of each network: inference fused and frozen, and a training step.

    Networks are torchvision's, with seeded parameters; errors are taken over all seeds together.
    The training step is verified in float32 and float64.

    Args:
        models: Names of torchvision's residual networks.
        dtypes: Storage types.
        backend: A name of :func:`fused_resnet.backends`, or ``"auto"``.
        seeds: Seeds of parameters and images; :data:`SEEDS` if None.
        progress: Called with a short text before each part.

    Raises:
        BackendUnavailable: The backend cannot run here.
        MissingPackageError: torchvision is not installed.
    """
    for name in models:
        progress(f"{name} inference")
        own_seeds = SEEDS.get(name, DEFAULT_SEEDS) if seeds is None else seeds
        problems = [_problem(name, seed) for seed in own_seeds]
        yield from _inference(name, problems, dtypes, backend)
        for dtype in (torch.float32, torch.float64):
            if dtype in dtypes:
                progress(f"{name} training step {str(dtype).removeprefix('torch.')}")
                yield from _training(name, problems, dtype, backend)


class Problem(NamedTuple):
    """What a network is verified with.

    Attributes:
        model: The network, float32, in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, float32.
        labels: Class of each image, ``(N,)``, int64.
        seed: Seed from which all of them are drawn.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    seed: int


def _problem(name: str, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(1000 + seed)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(0, 1000, (BATCH,), generator=generator)
    return Problem(random_model(name, images, seed=seed), images, labels, seed)


def _inference(
    name: str, problems: Sequence[Problem], dtypes: Sequence[torch.dtype], backend: str
) -> Iterator[Row]:
    logits: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    for model, images, _, _ in problems:
        for dtype in dict.fromkeys((torch.float64, *dtypes)):
            # The truth has the rounded parameters, so that only arithmetic is compared.
            stored = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = images.to(dtype).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                runs = {"unfused": stored(x), "truth": copy.deepcopy(stored).double()(x.double())}
                with use_backend(backend):
                    runs["fused"] = fr.fuse(stored)(x)
                    runs["frozen"] = fr.freeze(stored, winograd=False)(x)
                    runs["frozen, Winograd"] = fr.freeze(stored)(x)
            for run, answer in runs.items():
                logits.setdefault((dtype, run), []).append(answer)
    for dtype, run in itertools.product(dtypes, ("fused", "frozen", "frozen, Winograd")):
        truth = logits[dtype, "truth"]
        error = relative_error(logits[dtype, run], truth)
        own = relative_error(logits[dtype, "unfused"], truth)
        comparison = _comparison(f"{run}: logits", error, own, dtype)
        if dtype is torch.float32 and run == "frozen, Winograd":
            bound = max(comparison.bound, WINOGRAD_BOUND)
            comparison = Comparison(comparison.what, error, own, bound)
        yield worst([comparison], name, "inference", dtype, "channels_last")


def _training(
    name: str, problems: Sequence[Problem], dtype: torch.dtype, backend: str
) -> Iterator[Row]:
    exact = dtype is torch.float64
    truth, own, answer = (dict[str, list[Tensor]]() for _ in range(3))
    for original, images, labels, seed in problems:
        model = copy.deepcopy(original)
        if not exact:
            _clear_of_kinks(model, torch.Generator().manual_seed(seed))
        _step(truth, copy.deepcopy(model).double(), images.double(), labels, each=exact)
        stored = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = images.to(dtype).contiguous(memory_format=torch.channels_last)
        if not exact:
            _step(own, copy.deepcopy(stored), x, labels, each=exact)
        with use_backend(backend):
            _step(answer, fr.fuse(stored), x, labels, each=exact)
    for part in ("loss", "gradients", "running statistics"):
        comparisons = []
        for what in (key for key in truth if key.startswith(part)):
            error = relative_error(answer[what], truth[what])
            own_error = 0.0 if exact else relative_error(own[what], truth[what])
            comparisons.append(_comparison(what, error, own_error, dtype))
        yield worst(comparisons, name, f"training step: {part}", dtype, "channels_last")


def _step(
    into: dict[str, list[Tensor]], model: nn.Module, images: Tensor, labels: Tensor, each: bool
) -> None:
    """One training step; append losses, gradients and statistics, singly or grouped by kind."""
    losses = F.cross_entropy(model.train()(images), labels, reduction="none")
    losses.mean().backward()
    into.setdefault("loss", []).append(losses.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        kind = {1: name.rpartition(".")[2], 2: "weight of fc", 4: "convolutions"}[parameter.dim()]
        into.setdefault(f"gradients: {name if each else kind}", []).append(parameter.grad)
    for name, buffer in model.named_buffers():
        kind = name if each else name.rpartition(".")[2]
        into.setdefault(f"running statistics: {kind}", []).append(buffer)


def _comparison(what: str, error: float, own_error: float, dtype: torch.dtype) -> Comparison:
    if dtype is torch.float64:
        return Comparison(what, error, None, FLOAT64_BOUND)
    return compare(what, error, own_error, dtype)


@torch.no_grad()
def _clear_of_kinks(model: nn.Module, generator: torch.Generator) -> None:
    """Shift every batch norm by six deviations, so that each channel has one sign.

    One channel in four becomes negative where only a ReLU reads it. Both summands of a residual
    addition are positive: opposite signs could cancel, and rounding would decide the sum's sign.
    """
    summands = {id(bn) for bn in last_batch_norms(model)}
    summands |= {id(m[1]) for path, m in model.named_modules() if path.endswith("downsample")}
    for bn in batch_norms(model):
        sign = torch.ones_like(bn.weight)
        if id(bn) not in summands:
            sign[torch.rand(sign.shape, generator=generator) < 0.25] = -1.0
        bn.bias.copy_(6.0 * sign * bn.weight)
    # Activations of 6 and more would make logits of 10 and more, and a softmax of one or two
    # classes, whose rounding would dominate every gradient's error.
    model.get_parameter("fc.weight").mul_(0.1)
