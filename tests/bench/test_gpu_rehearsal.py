"""Both windows of ``make gpu`` without a card: every step, on the simulator and the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


def test_rehearsal(tmp_path: Path) -> None:
    if not PROGRAM.exists():
        pytest.skip("the package is tested without its repository: no benchmarks/gpu.py")
    pytest.importorskip("triton")
    import simulator

    reason = simulator.missing()
    if reason:
        pytest.skip(reason)
    simulator.build()  # for all processes of the rehearsal, once
    command = [sys.executable, str(PROGRAM), "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work"), "--commit", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{done.stdout[-4000:]}"
    assert "gpu: rehearsal: as it should be" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gpu-caches.tar.xz"} | {
        f"gpu-rehearsal{window}{suffix}"
        for window in ("", "-second")
        for suffix in (".jsonl", ".json", ".txt")
    }
