"""The table of every operation on every backend: no cell is empty, and failures are reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import emulation
import pytest
import torch
import verify_matrix
from torch import Tensor

from fused_resnet import ops
from fused_resnet.backends.availability import (
    DEVICE_TYPES,
    NAMES,
    BackendUnavailable,
    backends,
    resolve_backend,
)
from fused_resnet.cli import main
from fused_resnet.ops.registry import OPERATORS
from fused_resnet.verify import matrix

NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the cells run on it: tests/gpu has that"
)


#: The command, which runs on this machine's devices alone.
COMMAND = partial(main, ["verify", "--matrix", "--json", "--dtype", "float32"])


def cells(
    capsys: Any, run: Callable[[], int] = COMMAND
) -> tuple[int, dict[tuple[str, ...], dict[str, Any]]]:
    """The exit code, and the printed cells by their keys."""
    code = run()
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] == (code == 0)
    keys = ("operation", "mode", "dtype", "backend")
    return code, {tuple(cell[k] for k in keys): cell for cell in document["cells"]}


def skip_without(backend: str) -> None:
    reason = emulation.missing(backend)
    if reason:
        pytest.skip(reason)


@NO_GPU
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_cell_runs_within_its_bound(capsys, dtype):
    skip_without("cuda")
    skip_without("triton")
    code, found = cells(capsys, partial(verify_matrix.main, ["--json", "--dtype", dtype]))
    assert code == 0
    assert len(found) == len(matrix.LINES) * len(NAMES)
    for (operation, mode, name, backend), cell in found.items():
        assert cell["passed"]
        if backend == "library":
            exists = operation == "conv_bn_add_relu" and mode != "frozen" and name != "float64"
        else:
            exists = name != "float64" or backend in ("reference", "cpu")
        assert (cell["row"] is not None) == exists
        assert cell["runner"] == (emulation.NAMES.get(backend, "device") if exists else "")


@NO_GPU
def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # fewer wrap a cell
    monkeypatch.setattr(matrix, "LINES", matrix.LINES[:1])
    code, found = cells(capsys)
    assert code == 1
    for backend in ("cuda", "triton"):
        cell = found["bn_add_relu", "inference", "float32", backend]
        assert not cell["passed"]
        assert cell["row"] is None
        assert cell["reason"] == f"there is no device for it: {backends()[backend].reason}"
    assert found["bn_add_relu", "inference", "float32", "cpu"]["passed"]
    assert main(["verify", "--matrix", "--dtype", "float32"]) == 1
    shown = capsys.readouterr().out
    assert "not run (1)" in shown
    assert "(1) there is no device for it" in shown
    assert "5 cells, 2 failed or not run" in shown


class Wrong:
    """The CPU's operators; one result is off by one percent."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.fused_resnet, name)
        if name != "conv_bn_add_relu":
            return operator
        return lambda *arguments: operator(*arguments) * 1.01


@NO_GPU
def test_a_wrong_kernel_fails_its_cells_alone(capsys, monkeypatch):
    monkeypatch.setitem(OPERATORS, "cpu", Wrong())
    monkeypatch.setattr(matrix, "has", lambda o, m, d, backend: backend in ("reference", "cpu"))
    code, found = cells(capsys)
    assert code == 1
    failed = {key[:2] for key, cell in found.items() if not cell["passed"]}
    assert failed == {("conv_bn_add_relu", "inference")}


@NO_GPU
def test_a_kernel_that_raises_fails_its_cells_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # fewer wrap a cell

    def fails(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(ops, "residual_block", fails)
    monkeypatch.setattr(matrix, "LINES", matrix.LINES[-1:])
    monkeypatch.setattr(matrix, "has", lambda o, m, d, backend: backend == "cpu")
    code, found = cells(capsys)
    assert code == 1
    cell = found["residual_block", "frozen", "float32", "cpu"]
    assert cell["reason"] == "RuntimeError: no kernel"
    assert main(["verify", "--matrix", "--dtype", "float32"]) == 1
    assert "failed (1)" in capsys.readouterr().out


def test_emulation_ends_with_its_block():
    x = torch.zeros(1, 2, 3, 3)
    before = dict(OPERATORS), dict(DEVICE_TYPES)
    with emulation.forced("triton", operators := Wrong()):
        assert resolve_backend("bn_add_relu", x) == "triton"
        assert OPERATORS["triton"] is OPERATORS["cuda"] is operators
    assert before == (OPERATORS, DEVICE_TYPES)
    assert resolve_backend("bn_add_relu", x) == "cpu"


@NO_GPU
def test_a_gpus_backend_still_refuses_cpu_tensors():
    with pytest.raises(BackendUnavailable):
        matrix.use_backend("cuda").__enter__()
