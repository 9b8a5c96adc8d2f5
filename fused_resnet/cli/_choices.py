"""What the tuner chose for a network's calls, as a table."""

from __future__ import annotations

import torch
from rich.table import Table
from torch import Tensor, nn

from .. import fuse, tuner
from ..models import resnet
from ._common import progress


def calls_of(model: nn.Module, images: Tensor) -> list[tuple[tuner.Call, int]]:
    """The different calls of a forward that the tuner decides, and how often each comes."""
    with torch.no_grad(), tuner.recording() as calls:
        model(images)
    counts: dict[str, int] = {}
    first: dict[str, tuner.Call] = {}
    for call in calls:
        counts[call.key] = counts.get(call.key, 0) + 1
        first.setdefault(call.key, call)
    return [(first[key], count) for key, count in counts.items()]


def network_calls(
    name: str, batch: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[tuner.Call, int]]:
    """Those of a fused network of this package, in channels_last."""
    model = fuse(getattr(resnet, name)().eval()).to(device=device, dtype=dtype)
    images = torch.zeros(batch, 3, size, size, dtype=dtype, device=device)
    return calls_of(
        model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    )


def table_of(calls: list[tuple[tuner.Call, int]], title: str) -> Table:
    """Decide each call, with a progress bar, and show what was chosen and by how much.

    The last row adds up a forward's calls: by each candidate alone, and by the fastest of each.
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
    """A convolution in a few words: its input, its filters, what follows."""
    x, weight = call.arguments[:2]
    residual, stride, groups, relu = (call.arguments[i] for i in (7, 8, 11, 13))
    words = [f"{'x'.join(map(str, x.shape))}, {weight.shape[0]} of {weight.shape[2]}x"]
    words[0] += str(weight.shape[3])
    words += [f"stride {stride[0]}"] if tuple(stride) != (1, 1) else []
    words += [f"{groups} groups"] if groups > 1 else []
    words += ["residual"] if residual is not None else []
    words += [] if relu else ["no ReLU"]
    return ", ".join(words)
