"""The command ``fused-resnet``: one module per subcommand, each with ``add`` and ``run``.

``fused_resnet_command`` lists the subcommands; only the module of the one that runs is imported.

Exit codes: 0 success, 1 a failed check, 2 wrong usage or unusable input, 130 interrupted. An error
is one line on stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import fused_resnet_command

from .. import BackendUnavailable
from ..models.optional import MissingPackageError
from ._common import Parser, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    typed = sys.argv[1:] if argv is None else list(argv)
    answered = fused_resnet_command.answer(typed)
    if answered is not None:
        return answered
    parser = Parser(prog="fused-resnet")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    importlib.import_module(f".{typed[0].replace('-', '_')}", __name__).add(commands)
    try:
        arguments = parser.parse_args(typed)
        arguments.typed = typed
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
