"""Every operation on every backend, a GPU's kernels run on the CPU where there is no GPU.

``python tests/verify_matrix.py [--dtype float32,...] [--json [FILE]]`` prints the table of
``fused-resnet verify --matrix``. Without a GPU CUDA's kernels run in the simulator, which is
compiled at its first use, in minutes, and Triton's in the interpreter. Exit code 1 if a cell
failed or did not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import emulation
import torch

from fused_resnet.bench.results import save
from fused_resnet.cli import _matrix
from fused_resnet.cli._common import DTYPES, console, listed, one_of, print_json, writable


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="every operation on every backend")
    parser.add_argument(
        "--dtype",
        type=listed(one_of("dtype", DTYPES)),
        default=list(DTYPES),
        metavar="D,...",
        help=f"storage types (default: {','.join(DTYPES)})",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the cells to a file, or print JSON instead of the table",
    )
    arguments = parser.parse_args(argv)
    path = writable(arguments.json) if arguments.json not in (None, "-") else None
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    cells = _matrix.measure(dtypes, emulation.runners())
    document = _matrix.document(cells)
    if arguments.json == "-":
        print_json(document)
    else:
        console().print(_matrix.table(cells))
    if path is not None:
        save(path, document)
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
