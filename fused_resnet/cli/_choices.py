"""What the tuner chose for a network's calls, as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor, nn

from .. import _C, freeze, fuse
from ..models import resnet
from ..tuning import tuner
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
    """Those of a network of this package, fused and, on CUDA, frozen; in channels_last.

    On the CPU a frozen network has none: its weights are laid out for one backend.
    """
    model = fuse(getattr(resnet, name)().eval()).to(device=device, dtype=dtype)
    images = torch.zeros(batch, 3, size, size, dtype=dtype, device=device)
    images = images.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return calls_of(model, images) + calls_of(freeze(model, graphs=0), images)


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
    """A call in a few words: its operator where it has a short name, its input, its filters."""
    x = call.arguments[0]
    given = dict(zip(_NAMES[call.op], call.arguments, strict=False))
    shape = "x".join(map(str, x.shape))
    if call.op == "bn_add_relu":
        words = [f"{shape}, batch norm{' in training' if given['training'] else ''}"]
    elif call.op == "residual_block":
        widths = ", ".join(str(scale.numel()) for scale in given["scale"])
        words = [f"{shape}, {'bottleneck' if given['bottleneck'] else 'basic block'} of {widths}"]
    else:
        filters = given.get("weight_shape") or given["weight"].shape
        words = [f"{shape}, {filters[0]} of {filters[2]}x{filters[3]}"]
    stride = given.get("stride", 1)
    words += [f"stride {_one(stride)}"] if _one(stride) != 1 else []
    words += [f"{given['groups']} groups"] if given.get("groups", 1) > 1 else []
    words += ["residual"] if given.get("residual") is not None else []
    words += ["max-pool"] if "pool_kernel" in given else []
    words += [] if given.get("relu", True) else ["no ReLU"]
    words += ["packed"] if "packed" in given and call.op != "residual_block" else []
    return ", ".join(words)


def _one(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """A pair of equals as one of them."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)


#: By operator, the names of its arguments.
_NAMES = {
    schema.partition("(")[0]: re.findall(r"(\w+)(?:=\w+)?(?=[,)])", schema.partition(" ->")[0])
    for schema in _C.schemas()
}
