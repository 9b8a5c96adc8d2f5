"""A table of the backends that the tuner chose for a network's calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor, nn

from .. import _C, freeze, fuse
from ..tuning import tuner
from ._common import progress


def calls_of(model: nn.Module, images: Tensor) -> list[tuple[tuner.Call, int]]:
    """The distinct calls of a forward for which the tuner chooses, and how often each occurs.

    Args:
        model: The network.
        images: Batch of images, ``(N, 3, H, W)``.
    """
    with torch.no_grad(), tuner.recording() as calls:
        model(images)
    return _counted(calls)


def training_calls(
    network: nn.Module, batch: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[tuner.Call, int]]:
    """The calls of a fused network's training step, forward and backward, in channels_last.

    Args:
        network: Any of this package's networks.
        batch: Number of images.
        size: Height and width of the images.
        dtype: float32, or a 16-bit type for autocast.
        device: The device.
    """
    model = fuse(network).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    # Random ones: statistics of zeros would scale gradients until they overflow.
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=torch.channels_last)
    cast = torch.autocast(device, dtype, enabled=dtype is not torch.float32)
    with tuner.recording() as calls:
        with cast:
            result = model(images)
        result.float().sum().backward()
    return _counted(calls)


def _counted(calls: Sequence[tuner.Call]) -> list[tuple[tuner.Call, int]]:
    """Calls without their repetitions, and how often each occurs."""
    counts: dict[str, int] = {}
    first: dict[str, tuner.Call] = {}
    for call in calls:
        counts[call.key] = counts.get(call.key, 0) + 1
        first.setdefault(call.key, call)
    return [(first[key], count) for key, count in counts.items()]


def network_calls(
    network: nn.Module, batch: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[tuner.Call, int]]:
    """The calls of a network, fused and, on CUDA, frozen; in channels_last.

    On the CPU a frozen network has none, because its weights are packed for one backend.

    Args:
        network: Network in eval mode.
        batch: Number of images.
        size: Height and width of the images.
        dtype: Storage type.
        device: The device.
    """
    model = fuse(network).to(device=device, dtype=dtype)
    images = torch.zeros(batch, 3, size, size, dtype=dtype, device=device)
    images = images.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return calls_of(model, images) + calls_of(freeze(model, graphs=0), images)


def table_of(calls: list[tuple[tuner.Call, int]], title: str) -> Table:
    """Choose the backend of each call, with a progress bar, and show the times.

    The last row sums the calls of a forward: by each candidate alone, and by the choices.

    Args:
        calls: A result of :func:`calls_of`.
        title: Title of the table.
    """
    names = list(dict.fromkeys(name for call, _ in calls for name in call.candidates))
    table = Table(title=title, title_justify="left")
    table.add_column("call")
    table.add_column("times", justify="right")
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    table.add_column("runs on")
    table.add_column("of the default's time", justify="right")
    sums = dict.fromkeys([*names, "chosen", "default"], 0.0)
    with progress() as bar:
        task = bar.add_task("timing", total=len(calls))
        for call, count in calls:
            chosen, times = call.decide()
            bar.update(task, advance=1)
            missing = float("nan")
            cells = [f"{times[name]:.3f}" if name in times else "-" for name in names]
            share = times.get(chosen, missing) / times.get(call.default, missing)
            table.add_row(describe(call), str(count), *cells, chosen, f"{share:.2f}")
            for name in names:
                sums[name] += count * times.get(name, missing)
            sums["chosen"] += count * times.get(chosen, missing)
            sums["default"] += count * times.get(call.default, missing)
    table.add_section()
    share = sums["chosen"] / sums["default"] if sums["default"] else float("nan")
    cells = [f"{sums[name]:.2f}" for name in names]
    table.add_row("all", "", *cells, f"{sums['chosen']:.2f} ms", f"{share:.2f}")
    return table


def describe(call: tuner.Call) -> str:
    """A call in a few words: its input, its filters, and its other arguments.

    Args:
        call: The call.
    """
    x = call.arguments[0]
    arguments = dict(zip(_NAMES[call.op], call.arguments, strict=False))
    shape = "x".join(map(str, x.shape))
    if call.op == "bn_add_relu":
        words = [f"{shape}, batch norm{' in training' if arguments['training'] else ''}"]
    elif call.op == "residual_block":
        widths = ", ".join(str(scale.numel()) for scale in arguments["scale"])
        words = [
            f"{shape}, {'bottleneck' if arguments['bottleneck'] else 'basic block'} of {widths}"
        ]
    else:
        filters = arguments.get("weight_shape") or arguments["weight"].shape
        words = [f"{shape}, {filters[0]} of {filters[2]}x{filters[3]}"]
    stride = arguments.get("stride", 1)
    words += [f"stride {_one(stride)}"] if _one(stride) != 1 else []
    words += [f"{arguments['groups']} groups"] if arguments.get("groups", 1) > 1 else []
    words += ["residual"] if arguments.get("residual") is not None else []
    words += ["max-pool"] if "pool_kernel" in arguments else []
    words += [] if arguments.get("relu", True) else ["no ReLU"]
    words += ["packed"] if "packed" in arguments and call.op != "residual_block" else []
    words += ["forward"] if call.op == "conv_forward" else []
    words += ["backward"] if call.op == "conv_backward" else []
    return ", ".join(words)


def _one(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """A pair of equal numbers as one number."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)


#: The names of each operator's arguments.
_NAMES = {
    schema.partition("(")[0]: re.findall(r"(\w+)(?:=\w+)?(?=[,)])", schema.partition(" ->")[0])
    for schema in _C.schemas()
}
