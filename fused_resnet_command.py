"""The command ``fused-resnet``: what it can answer without PyTorch, whose import takes seconds.

That is the version, the list of commands, and a command that doesn't exist. It lies beside the
package because importing anything of the package imports PyTorch.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

#: The commands, in the order of the list, and what each is for.
COMMANDS = {
    "info": "versions, build, instruction set, backends",
    "models": "the names of networks that the commands take",
    "verify": "errors of every operation and network against float64",
    "bench": "inference or training compared with PyTorch and other runtimes",
    "coverage": "how much of other libraries' networks runs fused",
    "tune": "time the backends for a network's calls, ahead of its use",
    "train": "train or fine-tune a network on your images",
    "story": "the ResNet paper's experiment: depth hurts plain networks",
    "freeze": "write one file that fused_resnet.load_frozen serves from",
    "serve-check": "a file that freeze wrote and the eager network: error, speed",
    "roofline": "bytes, flops and least microseconds of each layer on a GPU",
    "classify": "the five most probable classes of photographs",
    "demo": "ResNet-50 on a photograph, before and after fuse and freeze",
}

DESCRIPTION = "Fused residual networks for PyTorch: verify, benchmark, train, serve."


def version() -> str:
    """The package's version, without importing it."""
    text = (Path(__file__).with_name("fused_resnet") / "_version.py").read_text()
    return text.rpartition("__version__ = ")[2].strip().strip('"')


def help_text() -> str:
    """The answer to ``fused-resnet --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        (
            "usage: fused-resnet [-h] [--version] COMMAND ...",
            "",
            DESCRIPTION,
            "",
            "commands:",
            *lines,
            "",
            "fused-resnet COMMAND --help describes a command.",
        )
    )


def unknown(command: str) -> str:
    """The error of a command that doesn't exist.

    Args:
        command: As typed.
    """
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
    return f"fused-resnet: error: unknown command {command!r}; {meant}"


def answer(typed: Sequence[str]) -> int | None:
    """Answer what needs no PyTorch.

    Args:
        typed: Arguments without the program's name.

    Returns:
        The exit code; None if the first argument is a command.
    """
    if typed and typed[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if typed and typed[0] == "--version":
        print(version())
        return 0
    if not typed or typed[0] not in COMMANDS:
        reason = unknown(typed[0]) if typed else "fused-resnet: error: expected a command"
        print(f"{reason} (see fused-resnet --help)", file=sys.stderr)
        return 2
    return None


def main() -> int:
    """Run the command with the arguments of the process.

    Returns:
        The exit code: 0 success, 1 a failed check, 2 wrong usage or unusable input, 130
        interrupted.
    """
    code = answer(sys.argv[1:])
    if code is not None:
        return code
    from fused_resnet.cli import main as run

    return run()
