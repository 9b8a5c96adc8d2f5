"""From an image to a network's input: what a frozen file stores of a transform, and runs again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..models.optional import library

#: Ways to interpolate, as Pillow and torchvision name them.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class Preprocessing(NamedTuple):
    """Resize, crop the centre, scale to 0 to 1, and normalise; calling it prepares an image.

    Attributes:
        resize: Pixels of the image's shorter side before the crop; 0 to keep the image's size.
        crop: Height and width of the centre that is kept; 0 to keep all.
        interpolation: One of :data:`INTERPOLATIONS`.
        mean: Subtracted from each channel, of values from 0 to 1.
        std: Each channel's divisor after that.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any) -> Tensor:
        """Prepare one image.

        Args:
            image: A PIL image in RGB, or a tensor ``(3, H, W)`` of bytes (not for ``lanczos``).

        Returns:
            ``(3, H, W)``, float32; ``[None]`` makes it a batch of one.

        Raises:
            MissingPackageError: torchvision is not installed.
        """
        library("torchvision")
        import torch
        from torchvision.transforms.v2 import InterpolationMode, functional

        x = image
        if self.resize:
            mode = InterpolationMode[self.interpolation.upper()]
            x = functional.resize(x, [self.resize], mode, antialias=True)
        if self.crop:
            x = functional.center_crop(x, [self.crop, self.crop])
        x = functional.to_dtype(functional.to_image(x), torch.float32, scale=True)
        result: Tensor = functional.normalize(x, list(self.mean), list(self.std))
        return result.as_subclass(Tensor)


def read(fields: Any) -> Preprocessing:
    """Check what a file says.

    Args:
        fields: A dictionary with the attributes of :class:`Preprocessing`.

    Raises:
        ValueError: A field is missing, of another type, or out of range.
    """
    try:
        resize, crop, interpolation, mean, std = (fields[key] for key in Preprocessing._fields)
        sizes = all(type(n) is int and 0 <= n < 2**16 for n in (resize, crop))
        numbers = [float(n) for n in (*mean, *std) if type(n) in (int, float)]
        finite = len(numbers) == len(mean) + len(std) and all(map(math.isfinite, numbers))
        if (
            sizes
            and finite
            and interpolation in INTERPOLATIONS
            and len(mean) == len(std) <= 64
            and 0 not in std
        ):
            return Preprocessing(resize, crop, interpolation, tuple(mean), tuple(std))
    except (TypeError, KeyError):
        pass
    raise ValueError("its preprocessing is not resize, crop, interpolation, mean and std")


def of(transform: Any) -> Preprocessing:
    """What a transform does, if that is to resize, crop the centre, scale and normalise.

    Args:
        transform: A :class:`Preprocessing` or a dictionary of its attributes; torchvision's
            ``weights.transforms()``; a ``Compose`` of torchvision's, which timm's
            ``create_transform`` makes; or timm's ``resolve_data_config(...)``.

    Raises:
        ValueError: It does something else; the message names it.
    """
    if isinstance(transform, Preprocessing):
        return read(transform._asdict())
    if isinstance(transform, Mapping):
        return _of_timm(transform) if "input_size" in transform else read(transform)
    if hasattr(transform, "crop_size") and hasattr(transform, "resize_size"):
        preset = transform
        return read(
            {
                "resize": _one(preset.resize_size, preset),
                "crop": _one(preset.crop_size, preset),
                "interpolation": _interpolation(preset),
                "mean": tuple(preset.mean),
                "std": tuple(preset.std),
            }
        )
    if hasattr(transform, "transforms"):
        return _of_steps(transform.transforms)
    raise ValueError(
        f"transform: expected torchvision's or timm's transform, or a dictionary of "
        f"{', '.join(Preprocessing._fields)}, got {type(transform).__name__}"
    )


def _of_steps(steps: Sequence[Any]) -> Preprocessing:
    """What the steps of a ``Compose`` do."""
    found: dict[str, Any] = {"resize": 0, "crop": 0, "interpolation": "bilinear"}
    order = []
    for step in steps:
        kind = type(step).__name__
        if kind == "Resize":
            found |= {"resize": _one(step.size, step), "interpolation": _interpolation(step)}
        elif kind == "CenterCrop":
            found["crop"] = _one(step.size, step)
        elif kind == "Normalize":
            values = (step.mean, step.std)
            lists = [v.tolist() if isinstance(v, Tensor) else list(v) for v in values]
            found |= {"mean": tuple(lists[0]), "std": tuple(lists[1])}
        elif kind not in ("ToTensor", "MaybeToTensor", "PILToTensor", "ToImage", "MaybePILToTensor",
                          "ConvertImageDtype", "ToDtype"):  # fmt: skip
            raise ValueError(
                f"transform: {kind} can't be stored; use Resize, CenterCrop, Normalize"
            )
        order.append(kind)
    known = [kind for kind in order if kind in ("Resize", "CenterCrop", "Normalize")]
    if known != sorted(known, key=("Resize", "CenterCrop", "Normalize").index):
        raise ValueError("transform: expected Resize, CenterCrop and Normalize in this order, once")
    return read({"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} | found)


def _of_timm(config: Mapping[str, Any]) -> Preprocessing:
    size = config["input_size"][-1]
    if config["input_size"][-2:] != (size, size) and list(config["input_size"][-2:]) != [size] * 2:
        raise ValueError(f"transform: expected square images, got {config['input_size']}")
    if config.get("crop_mode", "center") != "center":
        raise ValueError(f"transform: expected crop_mode center, got {config['crop_mode']!r}")
    return read(
        {
            "resize": math.floor(size / config.get("crop_pct", 0.875)),
            "crop": size,
            "interpolation": config.get("interpolation", "bilinear"),
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
        }
    )


def _one(size: Any, step: Any) -> int:
    """A size for both sides, or for the shorter one."""
    sizes = [size] if isinstance(size, int) else list(size)
    if not sizes or any(n != sizes[0] for n in sizes):
        raise ValueError(f"transform: {type(step).__name__} to {size}: expected one size")
    # Resize((s, s)) squeezes an image that isn't square, where Resize(s) keeps its shape.
    if len(sizes) > 1 and type(step).__name__ == "Resize":
        raise ValueError(
            f"transform: Resize to {tuple(sizes)} distorts images; use Resize({sizes[0]})"
        )
    return int(sizes[0])


def _interpolation(step: Any) -> str:
    mode = step.interpolation
    return str(getattr(mode, "value", mode)).lower()
