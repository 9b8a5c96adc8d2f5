"""Frozen files: one file with everything that serving a network needs.

It is a safetensors file: tensors, and metadata as JSON, never code. The weights are the trained
network's own, neither folded nor packed. So the file suits every machine, dtype and version of the
package, the frozen network can be compared with the eager one, and folding and packing happen at
loading. The metadata has a SHA-256 of the file, since safetensors itself has no checksums and one
wrong bit in a weight would not show.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .._version import __version__
from ..models import resnet, sources
from ..models.weights import check_numbers
from ..ops.checks import DTYPES
from ..tuning import processor
from ..tuning.atomic_file import replacing
from . import preprocessing as preprocess
from .freeze import freeze
from .frozen_module import Frozen
from .identify import identify
from .preprocessing import Preprocessing

#: The file's kind, and the version of its layout.
KIND, FORMAT = "fused_resnet.frozen", 2

#: Bytes of a file's header; a ResNet-152's has 60 kB.
MOST_HEADER = 16 * 2**20

#: Bytes of the weights of any network that a file may name; the largest RegNet has 2 GB.
MOST_BYTES = 4 * 2**30

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

#: safetensors' names of the dtypes of parameters, statistics and batch counters.
_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}

#: In the place of the checksum while it is computed.
_UNHASHED = "0" * 64


class FrozenFile(NamedTuple):
    """The contents of a file.

    Attributes:
        network: The network's name for ``fused-resnet bench``: ``resnet50``, ``timm:resnet50``.
        classes: Length of the logits.
        dtype: The dtype of the frozen network's maps.
        winograd: Whether Winograd's algorithm may run.
        version: The version of the package that wrote it.
        state: The network's ``state_dict``, in the dtype of the trained network.
        labels: Names of the classes, in the order of the logits; None if unknown.
        preprocessing: Preparation of an image for the network; None if unknown.
    """

    network: str
    classes: int
    dtype: torch.dtype
    winograd: bool
    version: str
    state: dict[str, Tensor]
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def save_frozen(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    transform: Any = None,
    network: str | None = None,
    dtype: torch.dtype | None = None,
    winograd: bool = True,
) -> FrozenFile:
    """Write one file from which :func:`load_frozen` serves a trained network, on any machine.

    The file has the network's name, its weights, and no code, so the network has to be one that
    ``fused-resnet models`` lists; that it computes what the model does is checked on an image of
    noise.

    Args:
        model: The trained network, as its library built it, fused or not; it is not changed. Not a
            frozen one, whose batch norms are folded.
        path: The file, in an existing folder; an older file is replaced, atomically.
        labels: Names of the classes, in the order of the logits; None for none.
        transform: How images are prepared: torchvision's ``weights.transforms()``, a ``Compose`` of
            ``Resize``, ``CenterCrop`` and ``Normalize``, timm's ``resolve_data_config(...)``, or a
            dictionary with ``resize``, ``crop``, ``interpolation``, ``mean`` and ``std``; None for
            none. The loaded network has it as ``preprocessing``.
        network: The network's name, ``timm:resnet50`` for example; None to find it.
        dtype: The dtype of the frozen network's maps; None for the model's own.
        winograd: Whether 3x3 convolutions may run by Winograd's algorithm.

    Returns:
        The contents of the file.

    Raises:
        ValueError: The network is unknown or computes something else; the labels are not as many
            as the classes; the transform can't be stored; the model is frozen.
        TypeError: ``model`` is not a module, or ``dtype`` not float32, float64, bfloat16, float16.
        MissingPackageError: The network's library is not installed.
        OSError: The file can't be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_frozen: model: expected a module, got {type(model).__name__}")
    if any(isinstance(module, Frozen) for module in model.modules()):
        raise ValueError("save_frozen: model: is frozen already; give the model that was frozen")
    name, state = identify(model, network)
    own = dtype or next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    if own not in DTYPES:
        raise TypeError(f"save_frozen: dtype: expected one of ({', '.join(_DTYPES)}), got {own}")
    return write_frozen(
        path, name, state, dtype=own, winograd=winograd, labels=labels, transform=transform
    )


def write_frozen(
    path: str | os.PathLike[str],
    network: str,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    winograd: bool = True,
    labels: Sequence[str] | None = None,
    transform: Any = None,
) -> FrozenFile:
    """Write a file for :func:`load_frozen`, atomically.

    Args:
        path: The file, in an existing folder; an older file is replaced.
        network: A name that ``fused-resnet bench`` takes: ``resnet50``, ``timm:resnet50``,
            ``hf:microsoft/resnet-50``, ``cifar_resnet56``.
        state: The network's ``state_dict``, from which the number of classes is taken.
        dtype: The dtype of the frozen network's maps: float32, float64, bfloat16 or float16.
        winograd: Whether 3x3 convolutions may run by Winograd's algorithm.
        labels: Names of the classes, in the order of the logits; None for none.
        transform: How images are prepared: torchvision's ``weights.transforms()``, a ``Compose`` of
            ``Resize``, ``CenterCrop`` and ``Normalize``, timm's ``resolve_data_config(...)``, or a
            dictionary with ``resize``, ``crop``, ``interpolation``, ``mean`` and ``std``; None for
            none.

    Returns:
        The contents of the file.

    Raises:
        ValueError: The network is unknown (``UnknownNetworkError``), the weights do not fit it, the
            labels are not as many as the classes, or the transform can't be stored.
        MissingPackageError: Its library is not installed.
        OSError: The file can't be written.
    """
    network = sources.parse(network)
    check_numbers(state, network)
    classes = sources.classes_of(network, state)
    names = None if labels is None else tuple(labels)
    if names is not None and (len(names) != classes or not all(type(n) is str for n in names)):
        raise ValueError(f"labels: expected {classes} strings, one a class, got {len(names)}")
    preprocessing = None if transform is None else preprocess.of(transform)
    own = {
        # No view of a larger storage, and no storage twice.
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in _build(network, classes, dict(state)).state_dict().items()
    }
    file = FrozenFile(network, classes, dtype, winograd, __version__, own, names, preprocessing)
    document = {"kind": KIND, "format": FORMAT} | file._asdict()
    document["dtype"] = str(dtype).removeprefix("torch.")
    document["preprocessing"] = preprocessing and preprocessing._asdict()
    del document["state"]
    metadata = {"format": "pt", KIND: json.dumps(document), "sha256": _UNHASHED}
    with replacing(Path(path)) as part:
        safetensors.torch.save_file(own, part, metadata)
        with open(part, "r+b") as written:
            header = _read_header(written)
            checksum = _checksum(header, written)
            written.seek(8 + header.index(_hashed(_UNHASHED)))
            written.write(_hashed(checksum))
    return file


def read_frozen(path: str | os.PathLike[str]) -> FrozenFile:
    """Read a file and check all of its fields; no code in it is run.

    The header, the shape of every tensor and the checksum are checked before anything of a size
    that the file names is allocated.

    Args:
        path: A file that ``fused-resnet freeze`` wrote.

    Raises:
        ValueError: The file does not exist, is damaged, is of another kind or format, or its
            tensors are not those of its network.
        MissingPackageError: The network's library is not installed.
        MemoryError: There is not enough memory for the weights.
    """
    what = f"frozen file {os.fspath(path)!r}"
    try:
        with _opened(Path(path), what) as file, _memory(what):
            return _read(file, what)
    except OSError as error:
        raise ValueError(f"{what}: can't be read: {error.strerror or error}") from None


def _read(file: BinaryIO, what: str) -> FrozenFile:
    damaged = f"{what}: truncated or damaged, or not a file that fused-resnet freeze wrote"
    foreign = f"{what}: not a file that fused-resnet freeze wrote"
    try:
        header = _read_header(file)
        table = json.loads(header)
        metadata = table.pop("__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(damaged) from None
    document = _document(metadata, foreign)
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{what}: has format {document.get('format')!r} and was written by fused_resnet "
            f"{document.get('version')!r}; this version reads format {FORMAT}"
        )
    size = os.fstat(file.fileno()).st_size - len(header) - 8
    fields: dict[str, Any] = {}
    problem = ""
    try:
        fields = _fields(document)
        _check_fit(fields["network"], fields["classes"], _empty_state(table, size))
    except ValueError as error:
        problem = f"{what}: {error}"
    # A file that doesn't fit may be damaged, which is then what to say; unless it is so large that
    # no network of this kind can be meant.
    if not problem or size < MOST_BYTES:
        expected = str(metadata.get("sha256"))
        if _hashed(expected) not in header or _checksum(header, file, expected) != expected:
            raise ValueError(damaged)
    if problem:
        raise ValueError(problem)
    file.seek(0)
    try:
        state = safetensors.torch.load(file.read())
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(damaged) from error
    return FrozenFile(**fields, state=state)


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
        The frozen network of :func:`freeze`, from ``(N, 3, H, W)`` to logits ``(N, classes)``. Its
        ``labels`` are the names of the classes or None, and its ``preprocessing`` turns an image
        into ``(3, H, W)``, or is None.

    Raises:
        ValueError: The file does not exist, is damaged or of another kind, names a network that
            this version does not know, or its tensors are not those of its network.
        MissingPackageError: The network's library is not installed.
        MemoryError: There is not enough memory for the weights.
        TypeError: ``dtype`` is not float32, float64, bfloat16 or float16.
    """
    file = read_frozen(path)
    _compare_threads()
    with _memory(f"frozen file {os.fspath(path)!r}"):
        model = network_of(file).to(device)
        about: dict[str, Any] = {"labels": file.labels, "preprocessing": file.preprocessing}
        for name, value in about.items():
            setattr(model, name, value)
        return freeze(model, dtype or file.dtype, winograd=file.winograd, graphs=graphs)


def _compare_threads() -> None:
    """Warn where PyTorch has more threads than the container has processors.

    PyTorch counts the machine's. Threads that wait for each other on fewer processors than they
    are take many times as long as one.
    """
    threads, processors = torch.get_num_threads(), processor.available()
    if threads > processors and processor.quota() < threads:
        warnings.warn(
            f"fused_resnet: PyTorch has {threads} threads, and this container a quota of "
            f"{processors} processors: set OMP_NUM_THREADS={processors}, or call "
            f"torch.set_num_threads({processors})",
            stacklevel=3,
        )


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


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    try:
        # A FIFO would block, a device might never end.
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        regular = False
    if not regular:
        raise ValueError(f"{what}: there is no such file; check the path")
    with open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _memory(what: str) -> Iterator[None]:
    """Say that memory is missing, and not that the file is damaged."""
    try:
        yield
    except MemoryError:
        raise MemoryError(f"{what}: not enough memory for its weights") from None
    except RuntimeError as error:
        if "not enough memory" not in str(error):
            raise
        raise MemoryError(f"{what}: not enough memory for its weights") from None


def _read_header(file: BinaryIO) -> bytes:
    """The header's JSON; 8 bytes before it are its length.

    Raises:
        ValueError: The file is shorter than that.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= MOST_HEADER else b""
    if not header or len(header) != length:
        raise ValueError("no header")
    return header


def _hashed(checksum: str) -> bytes:
    return f'"sha256":"{checksum}"'.encode()


def _checksum(header: bytes, file: BinaryIO, current: str = _UNHASHED) -> str:
    """The SHA-256 of a file in which the place of the checksum has zeros."""
    content = hashlib.sha256(len(header).to_bytes(8, "little"))
    content.update(header.replace(_hashed(current), _hashed(_UNHASHED), 1))
    file.seek(8 + len(header))
    while block := file.read(2**20):
        content.update(block)
    return content.hexdigest()


def _document(metadata: Any, foreign: str) -> dict[str, Any]:
    """The fields of this package in a header's metadata."""
    try:
        document = json.loads(metadata[KIND])
        if document["kind"] == KIND:
            return dict(document)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(foreign)


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`FrozenFile`, without its tensors, of the right types."""
    expected = {"network": str, "classes": int, "dtype": str, "winograd": bool, "version": str}
    complete = all(type(document.get(key)) is kind for key, kind in expected.items())
    if not complete or document["dtype"] not in _DTYPES or not 0 < document["classes"] < 2**31:
        raise ValueError("some of its fields are missing or have the wrong type")
    fields = {key: document[key] for key in expected} | {"dtype": _DTYPES[document["dtype"]]}
    labels, stored = document.get("labels"), document.get("preprocessing")
    if labels is not None:
        if type(labels) is not list or not all(type(label) is str for label in labels):
            raise ValueError("its labels are not names of classes")
        if len(labels) != fields["classes"]:
            raise ValueError(f"has {len(labels)} labels for {fields['classes']} classes")
        fields["labels"] = tuple(labels)
    if stored is not None:
        fields["preprocessing"] = preprocess.read(stored)
    return fields


def _check_fit(network: str, classes: int, empty: dict[str, Tensor]) -> None:
    """Build the network on the meta device, where its size costs nothing, and compare.

    Args:
        network: Name of the network in the file.
        classes: Number of classes in the file.
        empty: Tensors on the meta device, by key.
    """
    network = sources.parse(network)
    found = sources.classes_of(network, empty)
    if found != classes:
        raise ValueError(f"says {classes} classes, and its weights have {found}")
    with torch.device("meta"):
        _build(network, classes, empty)


def _empty_state(table: dict[str, Any], size: int) -> dict[str, Tensor]:
    """A header's tensors on the meta device, for the network to compare its own with.

    Args:
        table: The header, without its metadata.
        size: Bytes of the file after the header.
    """
    state, stored = {}, 0
    for name, entry in table.items():
        try:
            kind = entry["dtype"]
            if kind not in _STORED:
                raise ValueError(f"{name} has dtype {kind!r}; expected one of {', '.join(_STORED)}")
            shape = [n if type(n) is int else -1 for n in entry["shape"]]
            tensor = torch.empty(shape, dtype=_STORED[kind], device="meta")
        except (TypeError, KeyError, RuntimeError):
            raise ValueError(f"{name} is not the entry of a tensor") from None
        state[name] = tensor
        stored += tensor.nbytes
    if stored != size:
        raise ValueError(f"its tensors have {stored} bytes, and it has {size}")
    return state
