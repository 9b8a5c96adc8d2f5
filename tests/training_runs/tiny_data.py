"""Small data sets that a network of 20 layers learns in a few steps, and runs on them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_resnet.training import Settings

CLASSES, SIZE = 3, 12
COUNT = {"train": 40, "val": 14}


def pixels(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise in which the label's channel is brighter: uint8 ``(N, 12, 12, 3)`` and labels."""
    random = np.random.default_rng(part == "val")
    labels = np.arange(COUNT[part]) % CLASSES
    images = random.integers(0, 120, (COUNT[part], SIZE, SIZE, 3))
    images[np.arange(len(labels)), :, :, labels] += 80
    return images.astype(np.uint8), labels


def archive(path: Path, **more: Any) -> str:
    arrays = {}
    for part in COUNT:
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = pixels(part)
    np.savez(path, **{**arrays, **more})
    return str(path)


def jpeg_archive(path: Path) -> str:
    """The same labels, the images as JPEG files behind each other."""
    from PIL import Image

    arrays = {}
    for part in COUNT:
        images, arrays[f"{part}_labels"] = pixels(part)
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=100, subsampling=0)
            files.append(file.getvalue())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
    np.savez(path, **arrays)
    return str(path)


def folder(path: Path) -> Path:
    """ImageFolder's layout, one PNG for each image."""
    from PIL import Image

    for part in COUNT:
        for i, (image, label) in enumerate(zip(*pixels(part), strict=True)):
            place = path / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    return path


def settings(data: str | Path, out: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "model": "cifar_resnet20",
        "epochs": 2,
        "batch": 8,
        "lr": 0.05,
        "device": "cpu",
        **more,
    }
    return Settings(data=str(data), out=str(out), **values)


def tensors(found: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(found, Tensor):
        return {path: found}
    if isinstance(found, bool | int | float):
        return {path: torch.tensor(found, dtype=torch.float64)}
    if isinstance(found, dict):
        parts = found.items()
    elif isinstance(found, list | tuple):
        parts = enumerate(found)
    else:
        return {}
    return {k: v for key, value in parts for k, v in tensors(value, f"{path}/{key}").items()}


def same_bits(one: Any, other: Any) -> None:
    """All but the times of two checkpoints."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if not key.endswith(("seconds", "images_per_s")):
            assert torch.equal(value, second[key]), key
