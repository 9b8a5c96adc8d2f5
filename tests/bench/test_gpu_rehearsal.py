"""Both windows of ``make gpu`` without a card: every step, on the simulator and the interpreter."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu_children
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program is run in this process, and has it for itself elsewhere."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(ROOT)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("_as_before")
def test_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not PROGRAM.exists():
        pytest.skip("the package is tested without its repository: no benchmarks/gpu.py")
    pytest.importorskip("triton")
    import simulator

    reason = simulator.missing()
    if reason:
        pytest.skip(reason)
    simulator.build()  # for all processes of the rehearsal, once
    # How a child starts from nothing is tested in test_gpu_children.py.
    gpu_children.start_warm(monkeypatch)
    words = ["--rehearse", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *words, "--commit", "none"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 0, f"{err[-4000:]}\n{out[-4000:]}"
    assert "gpu: rehearsal: as it should be" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gpu-caches.tar.xz"} | {
        f"gpu-rehearsal{window}{suffix}"
        for window in ("", "-second")
        for suffix in (".jsonl", ".json", ".txt")
    }
