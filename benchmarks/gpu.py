"""The program of make gpu: builds for the card, checks and measures it, and writes what it found.

python benchmarks/gpu.py [--seconds 560] [--out FOLDER] [--caches ARCHIVE] [--rehearse]

Needs a GPU, torch for CUDA, nvcc, a C++ compiler, setuptools, pybind11 and pytest; no network and
no virtual environment. See benchmarks/gpu_window.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_window import card, rehearsal
from gpu_window.arguments import ROOT, parse
from gpu_window.window import Window


def main() -> int:
    arguments = parse()
    os.chdir(ROOT)
    if arguments.rehearse:
        return rehearsal.run(arguments)
    missing = card.missing()
    device = {}
    if not missing:
        try:
            device = card.describe()
        except ValueError as error:
            missing = [str(error)]
    if missing:
        print(f"gpu: missing: {'; '.join(missing)}", file=sys.stderr)
        return 2
    return Window(arguments, device).run()


if __name__ == "__main__":
    sys.exit(main())
