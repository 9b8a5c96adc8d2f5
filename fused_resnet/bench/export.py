"""Exports a problem's network to the format of another runtime.

Run as ``python -m fused_resnet.bench.export FORMAT MODEL FOLDER``, in a separate process: the
imports and allocations of an exporter must not count as the runtime's time and memory.
"""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.optional import install_line
from ..models.sources import plain_model
from .problem import read_problem
from .subject import UnavailableError


def exported(kind: str, model: str, folder: Path) -> Path:
    """The exported network, which the first process that needs it writes.

    Args:
        kind: A key of :data:`FORMATS`.
        model: The network's name.
        folder: The problem's folder.

    Returns:
        The path without suffixes.

    Raises:
        RuntimeError: The exporter failed; the message is its last line.
    """
    path = folder / kind
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.with_suffix(".done").exists():
            done = subprocess.run(
                [sys.executable, "-m", __name__, kind, model, str(folder)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
                raise RuntimeError(f"export to {kind}: {lines[-1]}")
            path.with_suffix(".done").touch()
    return path


def require(*packages: str) -> None:
    """Check that packages are installed.

    Args:
        packages: Names of top-level modules.

    Raises:
        UnavailableError: One is missing; the message says what to install.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed; run: {install_line('bench')}")


def _onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    torch.onnx.export(
        network,
        (images,),
        str(path.with_suffix(".onnx")),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _ncnn(network: nn.Module, images: Tensor, path: Path) -> None:
    import pnnx

    # ncnn's maps have no batch dimension.
    torch.jit.trace(network, images[:1]).save(str(path.with_suffix(".pt")))
    outputs = {
        name: f"{path}.{suffix}"
        for name, suffix in (
            ("pnnxparam", "pnnx.param"),
            ("pnnxbin", "pnnx.bin"),
            ("pnnxpy", "pnnx.py"),
            ("pnnxonnx", "pnnx.onnx"),
            ("ncnnparam", "param"),
            ("ncnnbin", "bin"),
            ("ncnnpy", "py"),
        )
    }
    size = ",".join(map(str, images[:1].shape))
    # fp16=0: weights stay float32; by default they are rounded to float16 in the file.
    command = [pnnx.EXEC_PATH, f"{path}.pt", f"inputshape=[{size}]f32", "fp16=0"]
    command += [f"{name}={file}" for name, file in outputs.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=path.parent)


#: The exporters by format.
FORMATS: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {"onnx": _onnx, "ncnn": _ncnn}


def main(kind: str, model: str, folder: str) -> None:
    """Export one network.

    Args:
        kind: A key of :data:`FORMATS`.
        model: The network's name.
        folder: The problem's folder.
    """
    problem = read_problem(Path(folder))
    network = plain_model(model, problem.state)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        FORMATS[kind](network, problem.images, Path(folder) / kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
