"""Frozen files: one file with everything that serving a network needs.

It is an archive of ``torch.save`` that ``weights_only=True`` reads: names, numbers and tensors, and
never code. The weights are the trained network's own, neither folded nor packed. So the file suits
every machine, dtype and version of the package, the frozen network can be compared with the eager
one, and folding and packing happen at loading.
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

#: The file's kind, and the version of its layout.
KIND, FORMAT = "fused_resnet.frozen", 1

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class FrozenFile(NamedTuple):
    """The contents of a file.

    Attributes:
        network: The network's name for ``fused-resnet bench``: ``resnet50``, ``timm:resnet50``.
        classes: Length of the logits.
        dtype: The dtype of the frozen network's maps.
        winograd: Whether Winograd's algorithm may run.
        version: The version of the package that wrote it.
        state: The network's ``state_dict``, in the dtype of the trained network.
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
    """Write a file for :func:`load_frozen`, atomically.

    Args:
        path: The file, in an existing folder; an older file is replaced.
        network: A name that ``fused-resnet bench`` takes: ``resnet50``, ``timm:resnet50``,
            ``hf:microsoft/resnet-50``, ``cifar_resnet56``.
        state: Its ``state_dict``, from which the number of classes is taken.
        dtype: The dtype of the frozen network's maps: float32, float64, bfloat16 or float16.
        winograd: Whether 3x3 convolutions may run by Winograd's algorithm.

    Returns:
        The contents of the file.

    Raises:
        ValueError: The network is unknown (``UnknownNetworkError``), or the weights do not fit it.
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
    """Read a file and check all of its fields; no code in it is run.

    Args:
        path: A file that ``fused-resnet freeze`` wrote.

    Raises:
        ValueError: The file does not exist, is damaged, or is of another kind or format.
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
    complete = (
        all(isinstance(content.get(key), kind) for key, kind in expected.items())
        and content["dtype"] in _DTYPES
        and isinstance(state, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    )
    if not complete:
        raise ValueError(f"{what}: some of its fields are missing or have the wrong type")
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

    torchvision's networks and those of the paper need no other package; those of timm and
    transformers need theirs. No code is loaded from the file.

    Args:
        path: The file.
        dtype: The dtype of the feature maps; None for the one in the file.
        device: The CPU or a CUDA device on which the network runs.
        graphs: Number of CUDA graphs to keep, as in :func:`freeze`; None for its default.

    Returns:
        The frozen network, as from :func:`freeze`: ``(N, 3, H, W)`` to logits ``(N, classes)``.

    Raises:
        ValueError: The file does not exist, is damaged or of another kind, or names a network that
            this version does not know.
        MissingPackageError: The network's library is not installed.
        TypeError: ``dtype`` is not float32, float64, bfloat16 or float16.
    """
    file = read_frozen(path)
    try:
        model = network_of(file)
    except ValueError as error:
        raise ValueError(f"frozen file {os.fspath(path)!r}: {error}") from None
    return freeze(model.to(device), dtype or file.dtype, winograd=file.winograd, graphs=graphs)


def network_of(file: FrozenFile) -> nn.Module:
    """The network with its weights, not frozen.

    Args:
        file: The contents of a frozen file.
    """
    return _build(sources.parse(file.network), file.classes, file.state)


def _build(network: str, classes: int, state: dict[str, Tensor]) -> nn.Module:
    """The package's own network if it has one, else its library's."""
    if network in sources.MODELS:
        model: nn.Module = getattr(resnet, network)(weights=state, num_classes=classes)
        return model.eval()
    return sources.our_model(network, state)


def _content(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{what}: there is no such file; check the path")
    damaged = f"{what}: truncated or damaged, or not a file that fused-resnet freeze wrote"
    try:
        # torch.load does not verify checksums, and one wrong bit in a weight would not show.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{what}: contains code or other objects, which are not loaded") from None
    except Exception as error:  # the readers raise anything on a damaged file
        raise ValueError(damaged) from error
