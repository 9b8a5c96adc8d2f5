"""What the card can do at all: bandwidth of a copy, a matrix product, versions, tools."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import torch

from . import timing
from .cases import Case, Row, Target, note

#: Bytes of a copy, and the height and width of a matrix.
COPY, MATRIX = 2**31, 8192


def cases(target: Target) -> list[Case]:
    """Versions, then bandwidth and products.

    Args:
        target: Device and sizes to run on.
    """
    return [
        Case("versions", _versions),
        Case("copy", functools.partial(_copy, target)),
        Case("product", functools.partial(_product, target)),
    ]


def _versions() -> Iterator[Row]:
    from ...backends.availability import backends, build_info

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    for name in ("triton", "torchvision", "nvidia-cudnn-frontend"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    available = {name: str(status) for name, status in backends().items()}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    info = {key: str(value) for key, value in build_info().items()}
    yield note(text, versions=found, backends=available, build=info)


def _copy(target: Target) -> Iterator[Row]:
    size = 2**12 if target.tiny else COPY
    source = [torch.zeros(size, dtype=torch.uint8, device=target.device) for _ in range(2)]
    result = [torch.empty_like(s) for s in source]
    calls = [functools.partial(r.copy_, s) for r, s in zip(result, source, strict=True)]
    found = timing.summary(timing.times({"copy": calls}, target)["copy"], "us")
    row: Row = {"kind": "time", "what": f"copy of {size} bytes", "provider": "eager", "batch": 1}
    row |= {"precision": "bytes", "status": "ok", **found}
    if row["status"] == "ok":
        row["tb_per_s"] = 2 * size / row["median"] / 1e6
    yield row


def _product(target: Target) -> Iterator[Row]:
    n = 64 if target.tiny else MATRIX
    g = target.generator()
    operands = [
        torch.randn(2, n, n, generator=g, device=target.device).bfloat16() for _ in range(2)
    ]
    calls = [functools.partial(torch.mm, o[0], o[1]) for o in operands]
    found = timing.summary(timing.times({"mm": calls}, target)["mm"], "us")
    row: Row = {"kind": "time", "what": f"product of {n} x {n} matrices", "provider": "eager"}
    row |= {"batch": 1, "precision": "bfloat16", "status": "ok", **found}
    if row["status"] == "ok":
        row["tflop_per_s"] = 2 * n**3 / row["median"] / 1e6
    yield row
