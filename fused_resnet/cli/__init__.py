"""The command ``fused-resnet``: one module per subcommand, each with ``add`` and ``run``.

Exit codes: 0 success, 1 a failed check, 2 wrong usage or unusable input, 130 interrupted. An error
is one line on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import BackendUnavailable, __version__
from ..models.optional import MissingPackageError
from . import bench, classify, coverage, demo, freeze, info, roofline, serve_check, tune, verify
from ._common import Parser, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="fused-resnet",
        description="Fused residual networks for PyTorch: verify, benchmark, freeze, serve.",
        epilog="fused-resnet COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for module in (
        info, verify, bench, coverage, tune, freeze, serve_check, roofline, classify, demo,
    ):  # fmt: skip
        module.add(commands)
    try:
        arguments = parser.parse_args(argv)
        arguments.typed = sys.argv[1:] if argv is None else list(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return int(code)
    except (UsageError, BackendUnavailable, MissingPackageError) as error:
        print(f"fused-resnet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused-resnet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe. Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
