"""Whole networks on a GPU, timed: inference, also under CUDA graphs, and a training step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr

from . import gpu_cells
from .calibration import calibrate, randomise
from .clock import Call, Clock
from .networks import LIMITS, relative_error
from .subject import Subject

#: Number of images that are checked in float64.
CHECKED = 2

#: The order of the cells, the most important first, since time may run out.
ORDER = (
    ("resnet50", "bfloat16"),
    ("resnet18", "bfloat16"),
    ("resnet50", "tf32"),
    ("resnet50", "float16"),
    ("resnet18", "tf32"),
    ("resnet18", "float16"),
)
BATCHES = (256, 32, 1)

#: ``+graph`` replays a CUDA graph of the same calls.
INFERENCE = ("eager", "fused", "frozen", "eager+graph", "fused+graph", "frozen+graph")
TRAINING = ("eager", "fused")


def cells(batches: tuple[int, ...] = BATCHES, max_autotune: bool = False) -> list[dict[str, Any]]:
    """The cells of inference; those that compile for minutes come last.

    Args:
        batches: Batch sizes.
        max_autotune: Whether to measure ``torch.compile`` in that mode too.
    """
    shapes = [
        {"model": model, "batch": batch, "precision": precision, "size": 224}
        for model, precision in ORDER
        for batch in batches
    ]
    compiled = ["compile", *(["compile, max-autotune"] if max_autotune else [])]
    return [{**shape, "providers": list(INFERENCE)} for shape in shapes] + [
        {**shape, "providers": [name]} for name in compiled for shape in shapes
    ]


def training_cells() -> list[dict[str, Any]]:
    """The cells of training: a step of ResNet-50 in mixed precision with ``torch.amp``."""
    return [
        {"model": "resnet50", "batch": batch, "precision": precision, "size": 224}
        | {"providers": list(TRAINING)}
        for batch, precision in ((256, "bfloat16"), (64, "bfloat16"), (256, "float16"))
    ]


class _UnfusedBatchNorm(nn.BatchNorm2d):
    """A batch norm that is not fused, because its class is not ``nn.BatchNorm2d``."""


def unfused(name: str) -> nn.Module:
    """torchvision's network or, without torchvision, this package's with the same modules.

    Args:
        name: One of :data:`fused_resnet.models.sources.MODELS`.
    """
    try:
        import torchvision
    except ImportError:
        model: nn.Module = getattr(fr, name)(norm_layer=_UnfusedBatchNorm)
    else:
        model = getattr(torchvision.models, name)()
    return model


@functools.cache
def _parameters(name: str, size: int) -> dict[str, Tensor]:
    """Seeded parameters on the CPU, with batch norms calibrated on similar images."""
    torch.manual_seed(0)
    model = unfused(name)
    randomise(model, torch.Generator().manual_seed(0))
    calibrate(model, torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)))
    return model.state_dict()


def _model(name: str, size: int, fusible: bool) -> nn.Module:
    model: nn.Module = getattr(fr, name)() if fusible else unfused(name)
    model.load_state_dict(_parameters(name, size))
    return model.eval()


def run(
    model: str,
    batch: int,
    precision: str,
    size: int,
    providers: list[str],
    device: str = "cuda",
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure inference; ``benchmarks/gpu.py`` calls it in a worker process.

    Args:
        model: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: A key of :data:`fused_resnet.bench.gpu_cells.DTYPES`.
        size: Height and width of the images.
        providers: Names of the providers to measure.
        device: The device.
        rounds: Number of turns of each provider.

    Returns:
        The result of :func:`fused_resnet.bench.gpu_cells.measure`, with complete rows.
    """
    where, dtype = torch.device(device), gpu_cells.DTYPES[precision]
    with gpu_cells.settings(precision), torch.no_grad():
        generator = torch.Generator(where).manual_seed(0)
        images = torch.randn((batch, 3, size, size), generator=generator, device=where).to(dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        stored = _model(model, size, fusible=False).to(dtype)
        exact = copy.deepcopy(stored).double().to(where)(images[:CHECKED].double())

        def build(provider: str) -> Subject:
            kind, _, graph = provider.partition("+")
            call = _inference(kind, model, images)
            if graph:
                call = captured(call)
            return Subject(call, lambda: relative_error(call()[:CHECKED], exact))

        answer = gpu_cells.measure(
            {name: functools.partial(build, name) for name in providers},
            Clock(where),
            LIMITS["bfloat16" if precision == "tf32" else precision],
            1e3,
            "ms",
            rounds=rounds,
            round_seconds=0.05,
        )
    return _answer(answer, model, batch, precision, size)


def _inference(kind: str, name: str, images: Tensor) -> Call:
    size, dtype, device = images.shape[-1], images.dtype, images.device
    ours = kind in ("fused", "frozen")
    model = _model(name, size, fusible=ours).to(device)
    if kind == "frozen":
        model = fr.freeze(model, dtype=dtype)
    else:
        model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind == "fused":
        model = fr.fuse(model)
    run: Callable[[Tensor], Tensor] = model
    if kind.startswith("compile"):
        torch._dynamo.reset()
        run = torch.compile(model, mode="max-autotune" if "max" in kind else None)
    return lambda: run(images)


def captured(call: Call) -> Call:
    """Capture a call in a CUDA graph; the result replays it and returns the graph's output.

    Args:
        call: The function to capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tuning and allocation must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def run_training(
    model: str,
    batch: int,
    precision: str,
    size: int,
    providers: list[str],
    device: str = "cuda",
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure a training step: forward, loss, backward and SGD under autocast.

    The first step's loss is checked against the unfused network's in float32.

    Args:
        model: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: ``"bfloat16"`` or ``"float16"``, of autocast.
        size: Height and width of the images.
        providers: Names of the providers to measure.
        device: The device.
        rounds: Number of turns of each provider.

    Returns:
        The result of :func:`fused_resnet.bench.gpu_cells.measure`, with complete rows.
    """
    where = torch.device(device)
    memory: dict[str, float] = {}
    with gpu_cells.settings("tf32"):
        generator = torch.Generator(where).manual_seed(0)
        images = torch.randn((batch, 3, size, size), generator=generator, device=where)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (batch,), generator=generator, device=where)

        def loss_of(network: nn.Module) -> Tensor:
            return F.cross_entropy(network(images), labels)

        with torch.no_grad():
            exact = loss_of(_model(model, size, fusible=False).to(where).train())

        def build(provider: str) -> Subject:
            network = _model(model, size, fusible=provider == "fused").to(where).train()
            network = network.to(memory_format=torch.channels_last)
            if provider == "fused":
                network = fr.fuse(network)
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
            scaler = torch.amp.GradScaler(where.type, enabled=precision == "float16")
            losses: list[Tensor] = []

            def step() -> None:
                with torch.autocast(where.type, gpu_cells.DTYPES[precision]):
                    loss = loss_of(network)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses[1:] = [loss.detach()]

            if where.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            step()
            if where.type == "cuda":
                memory[provider] = (torch.cuda.max_memory_allocated() - before) / 2**30
            return Subject(step, lambda: relative_error(losses[0], exact))

        answer = gpu_cells.measure(
            {name: functools.partial(build, name) for name in providers},
            Clock(where),
            LIMITS[precision],
            1e3,
            "ms",
            rounds=rounds,
            round_seconds=0.2,
        )
    result = _answer(answer, model, batch, precision, size)
    for row in result["rows"]:
        row["memory_gib"] = memory.get(row["provider"])
    return result


def _answer(
    answer: dict[str, Any], model: str, batch: int, precision: str, size: int
) -> dict[str, Any]:
    rows = []
    for provider, row in answer["rows"].items():
        kind, _, graph = provider.partition("+")
        about = {"model": model, "batch": batch, "precision": precision, "size": size}
        about |= {"provider": kind, "graph": bool(graph)}
        if row["status"] == "ok":
            row["images_per_s"] = batch / row["median_ms"] * 1e3
        rows.append({**about, **row})
    return {"rows": rows, "lost": answer["lost"]}
