"""``fused-resnet verify --matrix``: every operation on every backend, and no cell is empty."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

from fused_resnet import ops
from fused_resnet.backends.availability import NAMES, BackendUnavailable, resolve_backend
from fused_resnet.cli import main
from fused_resnet.ops.registry import OPERATORS
from fused_resnet.verify import emulation as seam
from fused_resnet.verify import matrix

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the cells run on it: tests/gpu has that"
)


def cells(capsys: Any, *flags: str) -> tuple[int, dict[tuple[str, ...], dict[str, Any]]]:
    code = main(["verify", "--matrix", "--json", *flags])
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] == (code == 0)
    keys = ("operation", "mode", "dtype", "backend")
    return code, {tuple(cell[k] for k in keys): cell for cell in document["cells"]}


def needed(backend: str) -> None:
    reason = emulation.missing(backend)
    if reason:
        pytest.skip(reason)


@NO_GPU
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_cell_runs_within_its_bound(capsys, dtype):
    needed("cuda")
    needed("triton")
    code, found = cells(capsys, "--dtype", dtype)
    assert code == 0
    assert len(found) == len(matrix.LINES) * len(NAMES)
    means = {"cuda": "simulator", "triton": "interpreter"}
    for (operation, mode, name, backend), cell in found.items():
        assert cell["passed"]
        if backend == "library":
            exists = operation == "conv_bn_add_relu" and mode != "frozen" and name != "float64"
        else:
            exists = name != "float64" or backend in ("reference", "cpu")
        assert (cell["row"] is not None) == exists
        assert cell["means"] == (means.get(backend, "device") if exists else "")


@NO_GPU
def test_without_a_checkout_the_cells_say_so(capsys, tmp_path, monkeypatch):
    """As from an installed wheel, which has no tests beside it."""
    monkeypatch.setattr(matrix, "LINES", matrix.LINES[:1])
    code, found = cells(capsys, "--dtype", "float32", "--checkout", str(tmp_path))
    assert code == 1
    for backend in ("cuda", "triton"):
        cell = found["bn_add_relu", "inference", "float32", backend]
        assert not cell["passed"]
        assert cell["row"] is None
        assert cell["reason"] == (
            f"there is no GPU, and no source checkout in {tmp_path} to emulate one (--checkout DIR)"
        )
    assert found["bn_add_relu", "inference", "float32", "cpu"]["passed"]
    assert main(["verify", "--matrix", "--dtype", "float32", "--checkout", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("not run (1)") == 2
    assert "(1) there is no GPU" in shown
    assert "5 cells, 2 failed or not run" in shown


def test_a_checkout_of_another_version_is_refused(tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / seam.FILE, tmp_path / seam.FILE)
    (tmp_path / "fused_resnet").mkdir()
    (tmp_path / "fused_resnet" / "_version.py").write_text('__version__ = "0.0.1"\n')
    with pytest.raises(seam.EmulationMissing, match=r"is version 0\.0\.1, and the package"):
        seam.load(tmp_path)


class Wrong:
    """The processor's own operators, but for a result that is off by a part in a hundred."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.fused_resnet, name)
        if name != "conv_bn_add_relu":
            return operator
        return lambda *arguments: operator(*arguments) * 1.01


@NO_GPU
def test_a_wrong_kernel_fails_its_cells_alone(capsys, monkeypatch):
    monkeypatch.setitem(OPERATORS, "cpu", Wrong())
    monkeypatch.setattr(matrix, "has", lambda o, m, d, backend: backend in ("reference", "cpu"))
    code, found = cells(capsys, "--dtype", "float32")
    assert code == 1
    failed = {key[:2] for key, cell in found.items() if not cell["passed"]}
    assert failed == {("conv_bn_add_relu", "inference")}


@NO_GPU
def test_a_kernel_that_raises_fails_its_cells_alone(capsys, monkeypatch):
    def fails(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(ops, "residual_block", fails)
    monkeypatch.setattr(matrix, "LINES", matrix.LINES[-1:])
    monkeypatch.setattr(matrix, "has", lambda o, m, d, backend: backend == "cpu")
    code, found = cells(capsys, "--dtype", "float32")
    assert code == 1
    cell = found["residual_block", "frozen", "float32", "cpu"]
    assert cell["reason"] == "RuntimeError: no kernel"
    assert main(["verify", "--matrix", "--dtype", "float32"]) == 1
    assert "failed (1)" in capsys.readouterr().out


def test_emulation_ends_with_its_block():
    x = torch.zeros(1, 2, 3, 3)
    before = dict(OPERATORS)
    with seam.emulated("triton", operators := Wrong()):
        assert resolve_backend("bn_add_relu", x) == "triton"
        assert OPERATORS["triton"] is OPERATORS["cuda"] is operators
    assert before == OPERATORS
    assert resolve_backend("bn_add_relu", x) == "cpu"


@NO_GPU
def test_a_gpus_backend_still_refuses_cpu_tensors():
    with pytest.raises(BackendUnavailable):
        matrix.use_backend("cuda").__enter__()
