"""``fused-resnet info``: versions, the build, and what is available on this machine."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from .. import backends, build_info
from ..bench import environment
from ..tuning import cache as tuning_cache
from ..tuning import processor, tuner
from ..tuning.defaults import read_key
from ._common import console, print_json


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser("info")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--tuning", action="store_true", help="also the tuner's choices and every variable"
    )
    parser.set_defaults(run=run)


def collect() -> dict[str, Any]:
    """The facts that the command prints, as a dictionary for JSON."""
    return {
        "versions": environment.versions(),
        "commit": environment.commit(),
        "build": build_info(),
        "cpu": {"name": processor.name(), "cores": environment.cores()},
        "backends": {
            name: {"available": status.available, "reason": status.reason}
            for name, status in backends().items()
        },
        "tuner": {
            "file": _tuning_file(),
            "machines": [machine_choices(device) for device in _devices()],
        },
        "environment": {name: os.environ.get(name) for name, _, _ in environment.VARIABLES},
    }


def _tuning_file() -> str:
    try:
        return str(tuning_cache.path())
    except OSError as error:
        return f"none: {error}"


def _bfloat16(build: dict[str, Any]) -> str:
    """How convolutions multiply bfloat16 maps on the CPU."""
    if build["bfloat16"] == "bfloat16":
        by = {"amx": "AMX", "amx_emulated": "emulated AMX"}.get(build["isa"], "AVX512-BF16")
        return f"multiplied as bfloat16, by {by}"
    has = "avx512_bf16" in build["isa_supported"]
    why = f"forced by FUSED_RESNET_ISA={build['isa']}" if has else "no AVX512-BF16 here"
    return f"stored as bfloat16, multiplied as float32: {why}"


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def machine_choices(device: torch.device) -> dict[str, Any]:
    """The tuner's entries for a device: each call, its choice, and milliseconds by candidate.

    Args:
        device: The device.
    """
    machine = tuner.machine_of(device)
    calls = [
        {"call": key, "choice": tuner.fastest(times, device.type, times), "ms": times}
        for key, times in tuning_cache.load(machine).items()
    ]
    return {"machine": machine, "calls": calls}


def choices_table(known: dict[str, Any]) -> Table:
    """A table with one line per call.

    Args:
        known: A result of :func:`machine_choices`.
    """
    table = Table(title=f"chosen on {known['machine']}", title_justify="left", box=None)
    for name in ("call", "dtype", "runs on", "ms"):
        table.add_column(name)
    for entry in known["calls"]:
        conv = read_key(entry["call"])
        words = entry["call"] if conv is None else conv.words()
        ms = ", ".join(f"{name} {time:.3f}" for name, time in sorted(entry["ms"].items()))
        table.add_row(words, "" if conv is None else conv.dtype, entry["choice"], ms)
    return table


def run(arguments: argparse.Namespace) -> int:
    """Print the facts.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    facts = collect()
    if arguments.json:
        print_json(facts)
        return 0
    build = facts["build"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, version in facts["versions"].items():
        if version or arguments.tuning:
            table.add_row(name, version or "not installed")
    table.add_row("commit", facts["commit"] or "not a source checkout")
    table.add_row("processor", f"{facts['cpu']['name']}, {facts['cpu']['cores']} cores")
    # amx_emulated computes what AMX would, slowly, for tests.
    native = [isa for isa in build["isa_supported"] if isa != "amx_emulated"]
    aside = "" if build["isa"] in native else " (for tests, and slow)"
    isa = f"{build['isa']} in use{aside}, of {', '.join(native)}"
    table.add_row("instruction set", isa)
    table.add_row("bfloat16", _bfloat16(build))
    table.add_row("threads", str(build["threads"]))
    table.add_row("built with", f"torch {build['torch']}, {build['compiler']}")
    cuda = f"{build['cuda']} for {', '.join(build['cuda_archs'])}" if build["cuda"] else "no"
    table.add_row("built for CUDA", cuda)
    for name, status in facts["backends"].items():
        answer = status["reason"] or "available"
        style = "green" if status["available"] else "yellow"
        table.add_row(f"backend {name}", Text(answer, style=style))
    known = facts["tuner"]
    count = sum(len(machine["calls"]) for machine in known["machines"])
    table.add_row("tuner", f"{count} calls known (--tuning), in {known['file']}")
    for name, when, meaning in environment.VARIABLES:
        value = facts["environment"][name]
        if value is None and not arguments.tuning:
            continue
        table.add_row(name, f"{'not set' if value is None else value} ({when}: {meaning})")
    console().print(table, highlight=False)
    for machine in known["machines"]:
        if machine["calls"] and arguments.tuning:
            console().print(choices_table(machine), highlight=False)
    return 0
