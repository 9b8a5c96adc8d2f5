"""One file with all that a frozen network needs, for the machine that serves it.

It is an archive of ``torch.save`` that ``weights_only=True`` reads: names, numbers and tensors, and
never code. The weights are the trained network's own, neither folded nor packed. So the file is the
same for every machine, dtype and version of the package, whoever reads it can hold the frozen
network against the eager one, and folding and packing happen where it is loaded.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._version import __version__
from ..models import resnet, sources
from ..ops.checks import DTYPES
from ..tuning.atomic_file import replacing
from .freeze import freeze

#: What the file says it is, and the version of its layout.
KIND, FORMAT = "fused_resnet.frozen", 1

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class FrozenFile(NamedTuple):
    """What a file holds.

    Attributes:
        network: As ``fused-resnet bench`` names it: ``resnet50``, ``timm:resnet50``.
        classes: Length of the logits.
        dtype: Of the frozen network's maps.
        winograd: Whether Winograd's algorithm may run.
        version: Of the package that wrote it.
        state: The network's ``state_dict``, in the dtype that it was trained in.
    """

    network: str
    classes: int
    dtype: torch.dtype
    winograd: bool
    version: str
    state: dict[str, Tensor]


def write_frozen(
    path: str | os.PathLike[str],
    network: str,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    winograd: bool = True,
) -> FrozenFile:
    """Write a file for :func:`load_frozen`, whole or not at all.

    Args:
        path: Of the file, in a folder that exists; an older one is replaced.
        network: A name that ``fused-resnet bench`` takes: ``resnet50``, ``timm:resnet50``,
            ``hf:microsoft/resnet-50``, ``cifar_resnet56``.
        state: Its weights, with the number of classes that they have.
        dtype: float32, float64, bfloat16 or float16, for :func:`freeze`.
        winograd: For :func:`freeze`.

    Returns:
        What was written.

    Raises:
        ValueError: No such network (``UnknownNetworkError``), or the weights are not its own.
        MissingPackageError: Its library is not installed.
        OSError: The file can't be written.
    """
    network = sources.parse(network)
    classes = sources.classes_of(network, state)
    own = dict(_build(network, classes, dict(state)).state_dict())
    file = FrozenFile(network, classes, dtype, winograd, __version__, own)
    content = file._asdict() | {
        "kind": KIND,
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with replacing(Path(path)) as part:
        torch.save(content, part)
    return file


def read_frozen(path: str | os.PathLike[str]) -> FrozenFile:
    """What a file holds, every part of it checked; nothing in it is run.

    Args:
        path: Of a file that ``fused-resnet freeze`` wrote.

    Raises:
        ValueError: There is no such file, or it is damaged or another one. The message says which.
    """
    what = f"frozen file {os.fspath(path)!r}"
    content = _content(Path(path), what)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{what}: not a file that fused-resnet freeze wrote")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{what}: has format {content.get('format')!r} and was written by fused_resnet "
            f"{content.get('version')!r}; this version reads format {FORMAT}"
        )
    state = content.get("state")
    expected = {"network": str, "classes": int, "dtype": str, "winograd": bool, "version": str}
    whole = (
        all(isinstance(content.get(key), kind) for key, kind in expected.items())
        and content["dtype"] in _DTYPES
        and isinstance(state, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    )
    if not whole:
        raise ValueError(f"{what}: parts of it are missing or not what they should be")
    fields = {name: content[name] for name in FrozenFile._fields}
    return FrozenFile(**fields | {"dtype": _DTYPES[content["dtype"]]})


def load_frozen(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    device: str | torch.device = "cpu",
    graphs: int | bool | None = None,
) -> nn.Module:
    """The frozen network of a file that ``fused-resnet freeze`` wrote, packed for this machine.

    A network of torchvision or of the paper needs no other package; one of timm or transformers
    needs that one. No code is loaded from the file.

    Args:
        path: Of the file.
        dtype: As for :func:`freeze`; None for the file's.
        device: The CPU or a CUDA device, where it will run.
        graphs: As for :func:`freeze`.

    Returns:
        What :func:`freeze` returns: ``(N, 3, H, W)`` to logits ``(N, classes)``.

    Raises:
        ValueError: There is no such file, or it is damaged, another one, or names a network that
            this version doesn't know.
        MissingPackageError: The network's library is not installed.
        TypeError: ``dtype`` is not one of these.
    """
    file = read_frozen(path)
    try:
        model = network_of(file)
    except ValueError as error:
        raise ValueError(f"frozen file {os.fspath(path)!r}: {error}") from None
    return freeze(model.to(device), dtype or file.dtype, winograd=file.winograd, graphs=graphs)


def network_of(file: FrozenFile) -> nn.Module:
    """The network with its weights, before it is frozen."""
    return _build(sources.parse(file.network), file.classes, file.state)


def _build(network: str, classes: int, state: dict[str, Tensor]) -> nn.Module:
    """The package's own network where there is one, else its library's."""
    if network in sources.MODELS:
        model: nn.Module = getattr(resnet, network)(weights=state, num_classes=classes)
        return model.eval()
    return sources.our_model(network, state)


def _content(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{what}: there is no such file; check the path")
    damaged = f"{what}: truncated or damaged, or not a file that fused-resnet freeze wrote"
    try:
        # torch.load does not compare checksums, and one wrong bit in a weight would not show.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{what}: holds code or other objects, which are not loaded") from None
    except Exception as error:  # a damaged file can raise anything from inside the readers
        raise ValueError(damaged) from error
