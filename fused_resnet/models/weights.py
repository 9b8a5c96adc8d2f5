"""Loads weights from a file, a dict or torchvision; only tensors, no pickled code."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..ops.checks import DTYPES

#: A torchvision enum or its name, the path of a file, or a state dict.
Source = Any

logger = logging.getLogger(__name__)

#: Keys under which training scripts store the state dict of a checkpoint, the preferred first: the
#: trained weights, then their exponential moving average.
_NESTED = (
    "state_dict", "model_state_dict", "model", "net", "module",
    "model_ema", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip

#: What DataParallel, torch.compile, Lightning and averaged models put before the keys.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "ema.")
#: How a pickle of torch.save begins that is no zip: protocol 2, and its magic number.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def load_weights(
    source: Source, *, name: str | None = None, progress: bool = True
) -> dict[str, Tensor]:
    """Load a state dict onto the CPU.

    What training scripts put around a state dict (``{"state_dict": ...}``, ``{"model": ...}``, or
    an average under ``"model_ema"`` if that is all there is) is removed, as are the prefixes that
    wrappers add to all keys (``module.``, ``_orig_mod.``, ``model.``); the logger
    ``fused_resnet.models.weights`` says what, at level ``INFO``.

    The checksums of a ``.pth`` file are verified before it is read, which ``torch.load`` does not
    do. The format that ``torch.save`` wrote before 1.6 has none (a warning says so), and neither
    has ``.safetensors``.

    Args:
        source: A path to a ``.pth``, ``.pt`` or ``.safetensors`` file; the name of a torchvision
            enum (``"IMAGENET1K_V2"`` with ``name``, or ``"ResNet50_Weights.IMAGENET1K_V2"``); the
            enum itself; or a dict of tensors.
        name: The network's name in torchvision; None if ``source`` does not need it.
        progress: Show the progress of a download.

    Returns:
        Tensors by key.

    Raises:
        ValueError: An unknown file or name; a truncated file; a file with code or objects other
            than tensors. The message names the file and a remedy.
        RuntimeError: torchvision is needed and not installed, or a download failed.
        TypeError: ``source`` is of another type.
    """
    if isinstance(source, Mapping):
        return _state_dict(source, "weights")
    if isinstance(source, str | os.PathLike) and is_path(source):
        path = Path(source)
        what = f"weights file {str(path)!r}"
        state = _state_dict(_read(path), what)
        check_numbers(state, what)
        return state
    entry = _torchvision_entry(source, name)
    try:
        state = entry.get_state_dict(progress=progress, check_hash=True)
    except OSError as error:
        raise RuntimeError(
            f"weights {entry}: the download failed ({error}); give weights= the path of a file"
        ) from error
    return _state_dict(state, f"weights {entry}")


def load_into(model: nn.Module, source: Source, *, name: str, progress: bool = True) -> None:
    """Load weights into a network; if they do not fit, the network is not changed.

    Args:
        model: The network.
        source: A torchvision enum or its name, the path of a file, or a state dict.
        name: The network's name, for torchvision's enums and for messages.
        progress: Show the progress of a download.

    Raises:
        ValueError: The weights cannot be read, or have other keys or shapes than the network.
        RuntimeError: torchvision is needed and not installed, or a download failed.
        TypeError: ``source`` is of another type.
    """
    state = load_weights(source, name=name, progress=progress)
    what = f"file {str(source)!r}" if isinstance(source, str | os.PathLike) else "dict"
    own = model.state_dict()
    # A prefix of all of the network's own keys was taken for a wrapper's.
    prefix = _common_prefix(own)
    state = {prefix + key: value for key, value in state.items()}
    problem = _mismatch(own, state)
    if problem:
        raise ValueError(
            f"{name}: weights {what} do not fit: {problem}; choose the network and the number of "
            "classes that they were saved from"
        )
    model.load_state_dict(state)


def check_numbers(state: Mapping[str, Tensor], what: str) -> None:
    """Check that the tensors have numbers that a network can be given.

    Args:
        state: Tensors by key.
        what: Source of the tensors, for the error message.

    Raises:
        ValueError: A tensor is on the meta device, sparse, quantised, complex, or of integers and
            no batch counter; the message names it.
    """
    for key, value in state.items():
        plain = value.dtype in DTYPES or key.endswith("num_batches_tracked")
        if not plain or value.layout is not torch.strided or value.is_meta or value.is_nested:
            raise ValueError(
                f"{what}: {key}: expected a dense tensor of real numbers, got {value.dtype}, "
                f"{value.layout}, on {value.device}"
            )


def number_of_classes(name: str, source: Source | None) -> int | None:
    """The number of classes of torchvision's weights; None for other sources.

    Args:
        name: The network's name in torchvision.
        source: A torchvision enum or its name, the path of a file, a state dict, or None.
    """
    if source is None or isinstance(source, Mapping):
        return None
    if isinstance(source, str | os.PathLike) and is_path(source):
        return None
    return len(_torchvision_entry(source, name).meta["categories"])


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether a source is the path of a file rather than the name of a torchvision enum.

    Args:
        source: The path or the name.
    """
    text = os.fspath(source)
    return (
        not isinstance(source, str)
        or text.endswith(_SUFFIXES)
        or os.sep in text
        or Path(text).is_file()
    )


def _torchvision_entry(source: Source, name: str | None) -> Any:
    try:
        from torchvision.models import WeightsEnum, get_model_weights, get_weight
    except ImportError as error:
        raise RuntimeError(
            f"weights {source!r}: torchvision is needed for weights by name; run: pip install "
            "torchvision, or give the path of a .pth or .safetensors file"
        ) from error
    if isinstance(source, WeightsEnum):
        return source
    if not isinstance(source, str):
        raise TypeError(
            "weights: expected a path, a torchvision enum or its name, or a dict of tensors, "
            f"got {type(source).__name__}"
        )
    try:
        return (
            get_weight(source) if "." in source or name is None else get_model_weights(name)[source]
        )
    except (KeyError, ValueError, AttributeError) as error:
        known = [] if name is None else [entry.name for entry in get_model_weights(name)]
        raise ValueError(
            f"weights {source!r}: neither a file nor one of torchvision's weights"
            + (f" for {name} ({', '.join(known)})" if known else "")
        ) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"weights file {str(path)!r}: there is no such file; check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _verify_checksums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # If the archive is intact, or a global is refused, the pickle has more than tensors.
        if zipfile.is_zipfile(path) or "GLOBAL" in str(error):
            raise ValueError(
                f"weights file {str(path)!r}: holds code or objects other than tensors, which are "
                "not loaded; save model.state_dict() instead"
            ) from error
        raise _damaged(path) from error
    except Exception as error:  # a damaged file can raise any exception in the unpickler
        raise _damaged(path) from error


def _verify_checksums(path: Path) -> None:
    """Verify those of a zip, which ``torch.load`` does not do; warn about the format without.

    One wrong bit in a weight would not show. ``torch.save`` stores entries as they are, so one that
    is compressed, and may be a thousand times as large as the file, is not of its making.

    Raises:
        ValueError: A checksum is wrong, or an entry is compressed.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            legacy = file.read(16).startswith(_LEGACY)
        if legacy:
            warnings.warn(
                f"fused_resnet: weights file {str(path)!r}: the format that torch.save wrote "
                "before 1.6 has no checksums, so damage can't be seen; load it and save it again",
                stacklevel=2,
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            total = sum(entry.file_size for entry in entries)
            intact = stored and total <= path.stat().st_size and archive.testzip() is None
    except Exception as error:  # a damaged archive can raise any exception in its reader
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path) from error


def metadata_of(source: Source) -> dict[str, str]:
    """What a ``.safetensors`` file says of its weights; empty for any other source.

    Args:
        source: A path to a file of weights, the name of a torchvision enum, the enum itself, or a
            dict of tensors.

    Raises:
        ValueError: The file is damaged.
    """
    if not isinstance(source, str | os.PathLike) or Path(source).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(source, "pt") as opened:
            return dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(Path(source)) from error


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"weights file {str(path)!r}: truncated or not a file of weights; download or save it again"
    )


def _state_dict(loaded: Any, what: str) -> dict[str, Tensor]:
    removed = []
    while isinstance(loaded, Mapping):
        found = [key for key in _NESTED if isinstance(loaded.get(key), Mapping)]
        if not found:
            break
        removed.append(f"took {found[0]!r}" + (f" and not {found[1]!r}" if found[1:] else ""))
        loaded = loaded[found[0]]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(
            f"{what}: expected a dict of tensors (a state_dict), got "
            f"{'an empty one' if isinstance(loaded, Mapping) else type(loaded).__name__}"
        )
    odd = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(
            f"{what}: expected tensors only, got {type(loaded[odd[0]]).__name__} under {odd[0]!r}; "
            "save model.state_dict() alone"
        )
    state, stripped = strip_prefixes(loaded)
    if removed or stripped:
        logger.info("%s: %s", what, ", ".join(removed + stripped))
    return state


def strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove what wrappers put before all keys of a state dict, and the counter of an average.

    Args:
        state: Tensors by key.

    Returns:
        The tensors by their own keys, and what was removed, in words.
    """
    found, removed = dict(state), []
    if "n_averaged" in found and len(found) > 1:  # torch.optim.swa_utils.AveragedModel
        del found["n_averaged"]
        removed.append("left out 'n_averaged'")
    prefix = _common_prefix(found)
    if prefix:
        found = {key.removeprefix(prefix): value for key, value in found.items()}
        removed.append(f"removed the prefix {prefix!r}")
    return found, removed


def _common_prefix(keys: Iterable[str]) -> str:
    """Of :data:`_PREFIXES`, those with which all keys begin, one after another."""
    left, prefix = list(keys), ""
    while more := next((p for p in _PREFIXES if left and all(k.startswith(p) for k in left)), ""):
        left = [key.removeprefix(more) for key in left]
        prefix += more
    return prefix


def _mismatch(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """How keys and shapes differ; empty if they do not."""
    problems = []
    # Files from before 2018 have no batch counter; load_state_dict sets it to 0.
    missing = [k for k in expected if k not in got and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in got if k not in expected]
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    shapes = [
        f"{k} has shape {tuple(got[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in got and got[k].shape != expected[k].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    return ", ".join(problems)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
