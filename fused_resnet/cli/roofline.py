"""``fused-resnet roofline``: the least time that a GPU can take, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from ..bench import gpu_results
from ..roofline import CARDS, FUSIONS, ITEMSIZE, Card, Kernel, kernels, total
from ._common import UsageError, console, listed, one_of, own_network, positive, print_json

#: The folder of measured results in a source checkout.
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "roofline",
        description="The time of a kernel is the larger of its bytes over the card's bandwidth and "
        "its flops over the card's peak for dense matrix products, as data sheets give them; m "
        "(memory) or c (compute) after it says which. Each input is read once, each result written "
        "once. The sum over all kernels is a ceiling: good software reaches 60 to 70% of it. No "
        "GPU is needed. Times measured by make gpu are shown if there is a results file of the "
        "card.",
    )
    parser.add_argument("model", type=own_network, help="for example resnet50")
    parser.add_argument("--batch", type=positive, default=256, help="images (default: 256)")
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", ITEMSIZE),
        default="bfloat16",
        help="bfloat16 (the default), float16, tf32, or float32 on CUDA cores",
    )
    parser.add_argument(
        "--fusion",
        type=one_of("fusion", [name for name in FUSIONS if " " not in name]),
        default="conv",
        help="none: convolution, batch norm, ReLU, addition and pool are a kernel each. conv (the "
        "default): a convolution with its batch norm, addition and ReLU is one kernel; the "
        "shortcut's convolution is another. block: also the stem with its max-pool, and "
        "every basic block or bottleneck of stages 1 and 2 with its shortcut. The second table "
        "also has the total with every block of all four stages as one kernel.",
    )
    parser.add_argument(
        "--size", type=positive, default=224, help="height and width of the images (default: 224)"
    )
    parser.add_argument(
        "--device",
        type=listed(one_of("device", CARDS)),
        default=["A100", "H100", "B200"],
        metavar="D,...",
        help=f"of {', '.join(CARDS)}, all SXM (default: A100,H100,B200)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON with one row per kernel")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="a results file of make gpu (default: those in benchmarks/results of the checkout)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    if arguments.size < 32:
        raise UsageError(f"roofline: --size: expected at least 32, got {arguments.size}")
    cards = [CARDS[name] for name in arguments.device]
    found, notes = _measured(arguments, cards)
    document = _document(arguments, cards, found, notes)
    if arguments.json:
        print_json(document)
        return 0
    parts = kernels(
        arguments.model, arguments.batch, arguments.dtype, arguments.fusion, arguments.size
    )
    out = console()
    out.print(_layers(arguments, cards, parts, found), highlight=False)
    out.print(_ceilings(cards, document["ceilings"]), highlight=False)
    for card in cards:
        out.print(f"{card.name}: {card.source}", highlight=False)
    for note in notes:
        out.print(note, highlight=False)
    return 0


Measured = dict[str, dict[str, float]]


def _measured(arguments: argparse.Namespace, cards: list[Card]) -> tuple[Measured, list[str]]:
    """Microseconds by card and kernel description, and a note on each card."""
    documents = _documents(arguments.results)
    found: Measured = {}
    notes = []
    for card in cards:
        mine = [(path, d) for path, d in documents if d["device"]["name"] in card.names]
        if not mine:
            where = arguments.results or "benchmarks/results"
            notes.append(f"{card.name}: nothing measured: no results file of that card in {where}")
            continue
        path, document = mine[-1]
        times = gpu_results.measured_us(
            document,
            fusion=arguments.fusion,
            batch=arguments.batch,
            precision=arguments.dtype,
        )
        if times:
            found[card.name] = times
            notes.append(f"{card.name}: measured in {path.name}, at {document['commit']}")
        else:
            notes.append(
                f"{card.name}: {path.name} has no layers of batch {arguments.batch}, "
                f"{arguments.dtype}, fusion {arguments.fusion}"
            )
    return found, notes


def _documents(path: Path | None) -> list[tuple[Path, gpu_results.Document]]:
    paths = [path] if path else sorted(RESULTS.glob("gpu-*.json"))
    try:
        return [(path, gpu_results.load(path)) for path in paths]
    except OSError as error:
        raise UsageError(f"roofline: can't read {error.filename!r}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"roofline: {error}") from None


def _document(
    arguments: argparse.Namespace, cards: list[Card], found: Measured, notes: list[str]
) -> dict[str, Any]:
    batch, dtype = arguments.batch, arguments.dtype
    levels = {
        fusion: kernels(arguments.model, batch, dtype, fusion, arguments.size) for fusion in FUSIONS
    }
    return {
        "model": arguments.model,
        "batch": batch,
        "dtype": dtype,
        "size": arguments.size,
        "fusion": arguments.fusion,
        "cards": {
            card.name: {
                "bandwidth": card.bandwidth,
                "peak": card.peaks[dtype],
                "source": card.source,
            }
            for card in cards
        },
        "kernels": [
            {
                "path": kernel.path,
                "what": kernel.what,
                "bytes_read": kernel.read,
                "bytes_written": kernel.written,
                "flops": kernel.flops,
                "intensity": kernel.intensity,
                "cards": {
                    card.name: {
                        "us": kernel.seconds(card, dtype) * 1e6,
                        "bound": kernel.bound(card, dtype),
                        "measured_us": found.get(card.name, {}).get(kernel.what),
                    }
                    for card in cards
                },
            }
            for kernel in levels[arguments.fusion]
        ],
        "ceilings": {
            fusion: {card.name: batch / total(parts, card, dtype) for card in cards}
            for fusion, parts in levels.items()
        },
        "notes": notes,
    }


def _layers(
    arguments: argparse.Namespace,
    cards: list[Card],
    parts: tuple[Kernel, ...],
    found: Measured,
) -> Table:
    """A row for each distinct kernel; equal layers share one."""
    dtype = arguments.dtype
    size = f"{arguments.size}x{arguments.size}"
    title = f"{arguments.model}, {size}, batch {arguments.batch}, {dtype}"
    table = Table(title=f"{title}, fusion {arguments.fusion}")
    table.add_column("first layer")
    table.add_column("kernel")
    for name in ("times", "MB read", "MB written", "GFLOP", "flop/B"):
        table.add_column(name, justify="right")
    for card in cards:
        table.add_column(f"{card.name} us", justify="right")
        if card.name in found:
            table.add_column("measured", justify="right")
    kinds: dict[str, list[Kernel]] = {}
    for kernel in parts:
        kinds.setdefault(kernel.what, []).append(kernel)
    for what, alike in kinds.items():
        kernel = alike[0]
        cells = []
        for card in cards:
            cells.append(f"{kernel.seconds(card, dtype) * 1e6:.1f} {kernel.bound(card, dtype)[0]}")
            if card.name in found:
                cells.append(_microseconds(found[card.name].get(what)))
        table.add_row(
            kernel.path,
            what,
            str(len(alike)),
            f"{kernel.read / 1e6:.1f}",
            f"{kernel.written / 1e6:.1f}",
            f"{kernel.flops / 1e9:.1f}",
            f"{kernel.intensity:.0f}",
            *cells,
        )
    table.add_section()
    cells = []
    for card in cards:
        cells.append(f"{total(parts, card, dtype) * 1e6:.1f}  ")
        if card.name in found:
            times = [found[card.name].get(kernel.what) for kernel in parts]
            known = [time for time in times if time is not None]
            complete = len(known) == len(times)
            cells.append(_microseconds(sum(known) if complete else None))
    table.add_row(
        "total",
        "",
        str(len(parts)),
        f"{sum(k.read for k in parts) / 1e6:.1f}",
        f"{sum(k.written for k in parts) / 1e6:.1f}",
        f"{sum(k.flops for k in parts) / 1e9:.1f}",
        "",
        *cells,
    )
    return table


def _ceilings(cards: list[Card], ceilings: dict[str, dict[str, float]]) -> Table:
    table = Table(title="thousand images a second")
    table.add_column("at most, by fusion")
    for card in cards:
        table.add_column(card.name, justify="right")
    for fusion, by_card in ceilings.items():
        table.add_row(fusion, *(f"{by_card[card.name] / 1e3:.1f}" for card in cards))
    return table


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
